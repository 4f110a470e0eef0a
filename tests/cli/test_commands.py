"""Commands of the command line on tiny models: convert, inspect, doctor and others."""

import dataclasses
import json
import subprocess
import sys
from io import StringIO
from typing import Any, get_args

import mlx.core as mx
import pytest
import typer

from splitquant_mlx import cli
from splitquant_mlx.cli import console
from splitquant_mlx.cli.summary import _rows
from splitquant_mlx.formats.manifest import LayerRecord, load_manifest
from splitquant_mlx.inspection.doctor import DeviceCheck, self_check
from splitquant_mlx.inspection.overview import group_layers
from splitquant_mlx.recipe import Method


@pytest.fixture
def command(capsys):
    """Return a function that runs a command line and returns its standard output."""

    def run(*arguments, code=0):
        assert cli.run([str(argument) for argument in arguments]) == code
        return capsys.readouterr().out

    return run


def test_convert_prints_a_summary(command, stories, tmp_path):
    out = command("convert", stories, "--mlx-path", tmp_path / "out")
    assert "30 split, 6 not quantized" in out
    assert "13.50 bits/weight" in out
    assert "no group size fits its width 172: model.layers.*.mlp.down_proj (5)" in out
    assert "not in LM Studio" in out and "--method auto" in out
    assert f"splitquant-mlx chat {tmp_path / 'out'}" in out
    assert not any(line != line.rstrip() for line in out.splitlines())


@pytest.mark.parametrize(
    ("options", "method"),
    [
        (["-q"], "rtn"),
        (["-q", "--method", "gptq"], "gptq"),
        (["--target-bpw", "5"], "auto"),
        (["--max-kl", "0.1", "-q"], "auto"),
        (["--target-size", "400kB"], "auto"),
        (["--fits", "2GB", "-q"], "auto"),
        ([], "splitquant"),
    ],
)
def test_options_choose_the_method(command, stories, options, method, monkeypatch):
    monkeypatch.setattr("splitquant_mlx.inspection.conversion_time._timed", lambda *_: 1e-3)
    out = command("convert", stories, "--dry-run", *options)
    assert out.split()[:2] == ["Method", method]


def test_a_dry_run_estimates_the_size_and_writes_nothing(command, stories, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert "GB are free)" in command("convert", stories, "-q", "--dry-run")
    estimate = json.loads(command("convert", stories, "-q", "--dry-run", "--json", "-"))
    assert list(tmp_path.iterdir()) == []
    command("convert", stories, "-q")
    (model,) = tmp_path.iterdir()
    assert model.name == f"{stories.name}-rtn-4bit"
    manifest = json.loads((model / "splitquant.json").read_text())
    assert estimate["stored_bytes"] == manifest["stored_bytes"]
    assert estimate["bits_per_weight"] == pytest.approx(manifest["bits_per_weight"])


@pytest.mark.parametrize("method", get_args(Method))
def test_a_dry_run_of_each_method(command, stories, method):
    options = ["--method", method, "--dry-run", "--json", "-"]
    estimate = json.loads(command("convert", stories, *options))
    assert 0 < estimate["stored_bytes"] < estimate["source_bytes"]
    assert 1e8 < estimate["memory_bytes"] < 3e9 and 0 < estimate["seconds"] < 3600


@pytest.mark.parametrize(
    ("method", "timed"), [("rtn", "from one layer"), ("gptq", "from one block")]
)
def test_a_dry_run_states_what_was_timed(command, stories, method, timed, monkeypatch):
    monkeypatch.setattr("splitquant_mlx.inspection.conversion_time._timed", lambda *_: 1e-3)
    out = command("convert", stories, "--method", method, "--dry-run")
    (line,) = (line for line in out.splitlines() if line.startswith("Time"))
    assert " about " in line and timed in line and len(line) <= 100


def test_a_setting_of_another_method_is_refused(stories, capsys):
    options = ["-q", "--num-samples", "4", "--dry-run"]
    assert cli.run(["convert", str(stories), *options]) == 2
    assert "calibration: not for method 'rtn'" in capsys.readouterr().err


def test_stages_match_the_tasks_of_a_conversion(stories, tmp_path, monkeypatch):
    """The numbered labels are those that a conversion reports, in the same order."""
    monkeypatch.setenv("SPLITQUANT_CACHE", str(tmp_path / "cache"))  # no text sampled before
    from contextlib import contextmanager

    from splitquant_mlx import Recipe, convert
    from splitquant_mlx.cli.convert import stages
    from splitquant_mlx.progress import Silent
    from splitquant_mlx.recipe import Calibration

    class Recorder(Silent):
        def __init__(self):
            self.labels = []

        @contextmanager
        def task(self, label, total=None):
            self.labels += [label] * (label not in self.labels)
            yield lambda amount, note="": None

    text = Calibration(num_samples=4, sequence_length=16)
    recipes = (
        Recipe(),
        Recipe(include=("*embed_tokens",), embeddings="quantize"),  # splits no layer
        Recipe(method="rtn"),
        Recipe(method="auto", refine=True, calibration=text),
    )
    for number, recipe in enumerate(recipes):
        recorder = Recorder()
        convert(stories, tmp_path / str(number), recipe=recipe, progress=recorder)
        assert set(recorder.labels) <= set(stages(recipe))
        assert [x for x in stages(recipe) if x in recorder.labels] == recorder.labels
        manifest = load_manifest(tmp_path / str(number))
        assert manifest
        assert ("choose bits" in manifest.seconds) == (recipe.method == "auto")


def test_models_and_cache_are_listed_and_cleared(command, split_stories, tmp_path, monkeypatch):
    monkeypatch.setenv("SPLITQUANT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    out = command("models", split_stories.parent)
    assert split_stories.name in out and "splitquant" in out
    assert out.splitlines()[3].split()[-1] == "no"  # runs in LM Studio
    (tmp_path / "cache" / "reference").mkdir(parents=True)
    (tmp_path / "cache" / "reference" / "x").write_bytes(bytes(5_000))
    assert "5.0 kB" in command("cache")
    assert "Removed 5.0 kB" in command("cache", "--clear")
    assert list((tmp_path / "cache").iterdir()) == []


def test_lmstudio_links_the_result(command, stories, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HOME", str(tmp_path))
    command("convert", stories, "-q", "--mlx-path", tmp_path / "out", "--lmstudio")
    link = tmp_path / ".lmstudio" / "models" / "splitquant-mlx" / "out"
    assert (link / "config.json").is_file()
    assert cli.run(["convert", str(stories), "--lmstudio", "--mlx-path", str(tmp_path / "x")]) == 2
    assert "LM Studio does not run split layers" in capsys.readouterr().err


def test_help_has_an_example_and_unbroken_names(command, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    out = command("convert", "--help")
    assert "Example: splitquant-mlx convert" in out
    assert "--group-size" in out and "also --q-group-size" in " ".join(out.split())
    assert all(len(line) <= 80 for line in out.splitlines())
    assert "Everyday" in command()


def test_every_command_accepts_its_model_as_argument_or_option():
    group: Any = typer.main.get_command(cli.app)
    commands: dict[str, Any] = {**group.commands, **group.commands["bench"].commands}
    for name in commands.keys() - {
        "bench",
        "run",
        "trial",
    }:  # run: a study is first
        kinds = {x.param_type_name for x in commands[name].params if "--model" in x.opts}
        first = next(iter(commands[name].params), None)
        assert not kinds or (first and first.param_type_name == "argument"), name


def test_help_is_a_command_and_aliases_are_explained(command, capsys):
    assert command("help") == command("--help")
    usage = command("help", "generate").splitlines()[0]
    assert usage == "Usage: splitquant-mlx generate [OPTIONS] [MODEL] [PROMPT]"
    assert "make-checkpoint [OPTIONS] SHAPE DIRECTORY" in command(
        "bench", "help", "make-checkpoint"
    )
    assert cli.run(["list"]) == 2
    assert "there is no command 'list': use 'models'" in capsys.readouterr().err
    assert cli.run(["convrt"]) == 2
    assert "Did you mean 'convert'?" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["completion"], "there is no command 'completion': use '--install-completion'"),
        (["convert", "a", "b"], "unexpected argument b: the directory to write is --mlx-path"),
        (["convert", "--metod", "gptq"], "No such option: --metod. Did you mean --method? (see"),
        (["convert", "a", "--bits", "4bit"], "--bits: expected an integer, got '4bit'"),
        (["convert", "a", "--target-bpw=x"], "--target-bpw: expected a number, got 'x'"),
        (["generate", "a", "--tmep", "1"], "No such option: --tmep. Did you mean --temp?"),
        (["bench", "sped"], "Did you mean 'speed'?"),
        (["bench", "sped", "--help"], "Did you mean 'speed'?"),
    ],
)
def test_usage_errors_name_the_likely_intention(capsys, arguments, message):
    assert cli.run(arguments) == 2
    assert message in capsys.readouterr().err


def test_a_misspelled_task_is_not_passed_to_lm_eval(stories, text_file, capsys):
    assert cli.run(["eval", str(stories), "--task", "perplexty", "--data", str(text_file)]) == 2
    assert "did you mean perplexity?" in capsys.readouterr().err


@pytest.mark.parametrize("stream", ["stdout", "stderr"])
def test_no_word_is_broken_on_a_terminal(stream, monkeypatch):
    class Terminal(StringIO):
        def isatty(self):
            return True

    monkeypatch.setenv("COLUMNS", "40")
    screen = Terminal()
    monkeypatch.setattr(sys, stream, screen)
    words = ["in", "/a/directory", "of", ":cat:"] * 4
    {"stdout": console.show, "stderr": console.print_stderr}[stream](" ".join(words))
    assert screen.getvalue().split() == words
    assert max(map(len, screen.getvalue().splitlines())) <= 40


def test_convert_accepts_flags_of_mlx_lm(command, stories, tmp_path):
    flags = ["-q", "--q-bits", 8, "--q-group-size", 32, "--dtype", "float16"]
    command("convert", "--hf-path", stories, "--mlx-path", tmp_path / "out", *flags)
    manifest = json.loads((tmp_path / "out" / "splitquant.json").read_text())
    assert (manifest["recipe"]["bits"], manifest["recipe"]["group_size"]) == (8, 32)


def test_options_take_precedence_over_the_recipe_file(command, stories, tmp_path):
    (tmp_path / "mine.toml").write_text('clusters = 2\nbits = 3\nexclude = ["*.mlp.*"]\n')
    options = ["--recipe", tmp_path / "mine.toml", "--bits", 5]
    command("convert", "--model", stories, "--mlx-path", tmp_path / "out", *options)
    recipe = json.loads((tmp_path / "out" / "splitquant.json").read_text())["recipe"]
    assert (recipe["clusters"], recipe["bits"], recipe["exclude"]) == (2, 5, ["*.mlp.*"])


def test_inspect_lists_layers_of_a_converted_model(command, split_stories):
    out = command("inspect", split_stories, "--layers")
    row = next(line for line in out.splitlines() if "layers.0.self_attn.q_proj" in line)
    manifest = json.loads((split_stories / "splitquant.json").read_text())
    layer = next(x for x in manifest["layers"] if x["path"].endswith("0.self_attn.q_proj"))
    assert "3 x 4 bits g64" in row and "13.50" in row
    out = command("inspect", split_stories, "--cut-points")
    row = next(line for line in out.splitlines() if "layers.0.self_attn.q_proj" in line)
    assert all(f"{cut:.4g}" in row for cut in layer["cut_points"])


def test_inspect_reads_no_weight_and_groups_layers(command, stories, split_stories, monkeypatch):
    monkeypatch.setattr(mx, "load", None)
    for model in (stories, split_stories):
        out = command("inspect", model)
        assert "Context" in out and "512 tokens" in out and "Memory to run" in out
        rows = [line.split() for line in out.splitlines()]
        assert ["self_attn.q_proj", "5"] in [row[:2] for row in rows]
        assert max(len(line) for line in out.splitlines() if "/" not in line) <= 80
    values = json.loads(command("inspect", stories, "--json", "-"))
    assert (values["method"], values["bits_per_weight"]) == ("", 32.0)


def test_inspect_groups_layers_by_name_and_form():
    layers = [
        LayerRecord(
            path=f"model.layers.{block}.{name}",
            kind="linear",
            action="quantize",
            shape=(8, 8),
            nbytes=1,
            bits_per_weight=1,
            bits=bits,
        )
        for block, name, bits in ((0, "q", 2), (0, "v", 4), (1, "q", 3), (1, "v", 4), (2, "q", 2))
    ]
    groups = [(name[-1], group[0].bits, len(group)) for name, group in group_layers(tuple(layers))]
    assert groups == [("q", 2, 2), ("q", 3, 1), ("v", 4, 2)]


def test_inspect_computes_cut_points_of_an_original(command, stories, split_stories):
    out = command("inspect", stories, "--cut-points")
    manifest = json.loads((split_stories / "splitquant.json").read_text())
    for layer in manifest["layers"]:
        path = layer["path"].removeprefix("model.")
        row = next(line for line in out.splitlines() if line.startswith(f"{path} "))
        assert all(f"{cut:.4g}" in row for cut in layer["cut_points"])


@pytest.mark.parametrize("converted", [True, False])
def test_inspect_draws_a_histogram(command, stories, split_stories, tmp_path, converted):
    pytest.importorskip("matplotlib")
    model = split_stories if converted else stories
    layer, png = "model.layers.1.mlp.up_proj", tmp_path / "plot.png"
    out = command("inspect", model, "--layer", layer, "--png", png, "--cut-points")
    assert "█" in out and "cut points: -0." in out
    assert out.count("^") == 2
    assert png.read_bytes().startswith(b"\x89PNG")


def test_inspect_errors(capsys, stories):
    assert cli.run(["inspect", "--model", str(stories), "--layer", "model.layers.9"]) == 2
    assert "--layer: there is no layer 'model.layers.9'" in capsys.readouterr().err
    assert cli.run(["inspect", str(stories), "--layer", "0.mlp.up_porj"]) == 2
    assert "model.layers.0.mlp.up_proj" in capsys.readouterr().err
    assert cli.run(["inspect", "--model", str(stories), "--png", "x.png"]) == 2
    assert "choose it with --layer" in capsys.readouterr().err


def test_doctor_reports_and_passes(command):
    out = command("doctor")
    assert "quantized model against numpy" in out and "FAILED" not in out
    assert "memory" in out and "mlx-lm" in out and "LM Studio" in out
    assert out.rstrip().endswith("Everything works.")


def test_doctor_fails_when_a_check_fails(capsys, monkeypatch):
    from splitquant_mlx.inspection import doctor

    failed = DeviceCheck(name="x", difference=1, limit=0.1)
    monkeypatch.setattr(doctor, "self_check", lambda: [failed])
    assert cli.run(["doctor"]) == 2
    assert "self-check failed (x)" in capsys.readouterr().err


def test_self_check_detects_a_wrong_kernel(monkeypatch):
    """A quantized product with an error of one percent does not pass."""
    right = mx.quantized_matmul
    monkeypatch.setattr(mx, "quantized_matmul", lambda *a, **k: right(*a, **k) * 1.01)
    checks = [check for check in self_check() if "quantized model" in check.name]
    assert checks and not any(check.passed for check in checks)


@pytest.mark.parametrize("name", ["convert", "generate", "chat", "serve", "inspect", "doctor"])
def test_unknown_device_is_refused(capsys, name, stories):
    options = [] if name == "doctor" else ["--model", str(stories)]
    assert cli.run([name, *options, "--device", "tpu"]) == 2
    assert "--device: expected one of 'cpu', 'gpu', got 'tpu'" in capsys.readouterr().err


def test_version_and_module_form():
    done = subprocess.run(
        [sys.executable, "-m", "splitquant_mlx", "--version"], capture_output=True, text=True
    )
    assert done.returncode == 0 and done.stdout.startswith("splitquant-mlx 0.")


def test_the_summary_of_auto_counts_all_quantized_layers(split_stories):
    manifest = load_manifest(split_stories)
    assert manifest
    layer = manifest.layers[0]
    layers = tuple(
        dataclasses.replace(layer, action="quantize", shape=(100, 64), nbytes=nbytes)
        for nbytes in (3200, 4000)
    )
    recipe, seconds = {**manifest.recipe, "method": "auto"}, {"total": 1.0, "read": 0.01}
    rows = dict(_rows(dataclasses.replace(manifest, layers=layers, recipe=recipe, seconds=seconds)))
    assert rows["Quantized"].startswith("4.50 bits/weight") and "Linear layers" not in rows
    assert rows["Time"] == "1.0 s"


@pytest.mark.parametrize(
    ("task", "message"),
    [
        ("perplexity", "Interrupted.\n"),
        ("arc_easy", "Interrupted. Run the same command to continue.\n"),
    ],
)
def test_an_interrupted_evaluation_continues_if_it_is_of_arc(
    stories, monkeypatch, capsys, task, message
):
    def interrupted(*args, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr("splitquant_mlx.evaluation.task.evaluate", interrupted)
    assert cli.run(["eval", str(stories), "--task", task]) == 130
    assert capsys.readouterr().err == message


def test_eval_is_refused_if_memory_is_too_small(stories, text_file, monkeypatch, capsys):
    monkeypatch.setattr("splitquant_mlx.runtime.memory.memory_bytes", lambda: 10_000_000)
    assert cli.run(["eval", str(stories), "--data", str(text_file)]) == 2
    assert f"evaluating {stories} needs about" in capsys.readouterr().err
