"""The commands convert, inspect and doctor, as a user runs them."""

import json
import subprocess
import sys

import mlx.core as mx
import pytest

from splitquant_mlx import cli
from splitquant_mlx.inspection.doctor import Check, self_check


@pytest.fixture
def command(capsys):
    """Return a function that runs a command line and returns its standard output."""

    def run(*arguments, code=0):
        assert cli.run([str(argument) for argument in arguments]) == code
        return capsys.readouterr().out

    return run


def test_convert_tells_what_it_did(command, stories, tmp_path):
    out = command("convert", "--model", stories, "--mlx-path", tmp_path / "out")
    assert "30 split, 6 kept" in out
    assert "13.50 bits/weight" in out
    assert "no group size fits its width 172: model.layers.0.mlp.down_proj" in " ".join(out.split())
    assert f"splitquant-mlx chat --model {tmp_path / 'out'}" in out


def test_convert_takes_mlx_lm_flags(command, stories, tmp_path):
    flags = ["-q", "--q-bits", 8, "--q-group-size", 32, "--dtype", "float16"]
    command("convert", "--hf-path", stories, "--mlx-path", tmp_path / "out", *flags)
    manifest = json.loads((tmp_path / "out" / "splitquant.json").read_text())
    assert (manifest["recipe"]["bits"], manifest["recipe"]["group_size"]) == (8, 32)


def test_options_go_before_the_recipe_file(command, stories, tmp_path):
    (tmp_path / "mine.toml").write_text('clusters = 2\nbits = 3\nexclude = ["*.mlp.*"]\n')
    options = ["--recipe", tmp_path / "mine.toml", "--bits", 5]
    command("convert", "--model", stories, "--mlx-path", tmp_path / "out", *options)
    recipe = json.loads((tmp_path / "out" / "splitquant.json").read_text())["recipe"]
    assert (recipe["clusters"], recipe["bits"], recipe["exclude"]) == (2, 5, ["*.mlp.*"])


def test_inspect_lists_layers_of_a_converted_model(command, split_stories):
    out = command("inspect", "--model", split_stories)
    row = next(line for line in out.splitlines() if "layers.0.self_attn.q_proj" in line)
    manifest = json.loads((split_stories / "splitquant.json").read_text())
    layer = next(x for x in manifest["layers"] if x["path"].endswith("0.self_attn.q_proj"))
    assert "split 3 x 4 bits g64" in row and "13.50" in row
    assert all(f"{cut:.4g}" in row for cut in layer["cut_points"])
    assert "linear layers 13.50 bits/weight" in out


def test_inspect_shows_where_an_original_would_be_cut(command, stories, split_stories):
    out = command("inspect", "--model", stories)
    manifest = json.loads((split_stories / "splitquant.json").read_text())
    for layer in manifest["layers"]:
        row = next(line for line in out.splitlines() if line.startswith(f"{layer['path']} "))
        assert all(f"{cut:.4g}" in row for cut in layer["cut_points"])


@pytest.mark.parametrize("converted", [True, False])
def test_inspect_draws_a_histogram(command, stories, split_stories, tmp_path, converted):
    pytest.importorskip("matplotlib")
    model = split_stories if converted else stories
    layer, png = "model.layers.1.mlp.up_proj", tmp_path / "plot.png"
    out = command("inspect", "--model", model, "--layer", layer, "--png", png)
    assert "█" in out and "cut points: -0." in out
    assert out.count("^") == 2
    assert png.read_bytes().startswith(b"\x89PNG")


def test_inspect_names_what_it_does_not_find(capsys, stories):
    assert cli.run(["inspect", "--model", str(stories), "--layer", "model.layers.9"]) == 2
    assert "has no layer 'model.layers.9'" in capsys.readouterr().err
    assert cli.run(["inspect", "--model", str(stories), "--png", "x.png"]) == 2
    assert "say which with --layer" in capsys.readouterr().err


def test_doctor_reports_and_passes(command):
    out = command("doctor")
    assert "quantized model against numpy" in out and "FAILED" not in out
    assert "memory" in out and "mlx-lm" in out


def test_doctor_fails_when_a_device_computes_wrongly(capsys, monkeypatch):
    from splitquant_mlx.inspection import doctor

    monkeypatch.setattr(doctor, "self_check", lambda: [Check(name="x", difference=1, limit=0.1)])
    assert cli.run(["doctor"]) == 2
    assert "self-check failed (x)" in capsys.readouterr().err


def test_self_check_sees_a_wrong_kernel(monkeypatch):
    """A device whose quantized product is off by a percent does not pass."""
    right = mx.quantized_matmul
    monkeypatch.setattr(mx, "quantized_matmul", lambda *a, **k: right(*a, **k) * 1.01)
    checks = [check for check in self_check() if "quantized model" in check.name]
    assert checks and not any(check.passed for check in checks)


@pytest.mark.parametrize("name", ["convert", "generate", "chat", "serve", "inspect", "doctor"])
def test_unknown_device_is_refused(capsys, name, stories):
    options = [] if name == "doctor" else ["--model", str(stories)]
    assert cli.run([name, *options, "--device", "tpu"]) == 2
    assert "--device: wanted cpu or gpu, got 'tpu'" in capsys.readouterr().err


def test_version_and_module_form():
    done = subprocess.run(
        [sys.executable, "-m", "splitquant_mlx", "--version"], capture_output=True, text=True
    )
    assert done.returncode == 0 and done.stdout.startswith("splitquant-mlx 0.")
