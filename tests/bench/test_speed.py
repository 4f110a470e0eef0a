"""Speed, startup time and memory of models, measured in separate processes."""

import json
from importlib import import_module

import numpy as np
import pytest
from in_process import run_here

from splitquant_mlx import RecipeError, SplitQuantError, cli
from splitquant_mlx.bench import speed
from splitquant_mlx.bench.speed import Workload, bench_speed, ratios, run_trial

SHORT = ["--prompt-tokens", "8", "--generation-tokens", "4"]


def test_models_alternate_and_are_compared(stories, split_stories, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(speed, "run_program", run_here)
    file = tmp_path / "speed.json"
    models = ["--model", str(split_stories), "--against", str(stories)]
    command = ["bench", *models, *SHORT, "--trials", "1", "--json", str(file)]
    assert cli.run(command) == 0
    out = capsys.readouterr().out
    assert "decode, tokens/s" in out and "resident in the process" in out
    result = json.loads(file.read_text())
    split, plain = result["models"]
    assert (split["model"], plain["model"]) == (str(split_stories), str(stories))
    for model in (split, plain):
        for key in ("prompt_tps", "generation_tps", "import_s", "load_s", "peak_bytes"):
            values = model[key]
            assert 0 < values["min"] == values["median"] == values["runs"][0]
        assert model["first_token_s"]["median"] > (
            model["import_s"]["median"] + model["load_s"]["median"]
        )
    (ratio,) = result["ratios"]
    for name, key in (("prefill_time", "prompt_tps"), ("decode_time", "generation_tps")):
        assert ratio[name]["median"] == plain[key]["median"] / split[key]["median"]
    assert ratio["load_s"]["median"] == split["load_s"]["median"] / plain["load_s"]["median"]
    assert ratio["peak_bytes"]["median"] == 1
    assert result["settings"] == {
        "prompt_tokens": 8, "generation_tokens": 4, "batch_size": 1, "trials": 1,
    }  # fmt: skip
    assert result["device"] in ("cpu", "gpu")
    assert f"computed on the {result['device'].upper()}." in out
    assert "mlx-lm" in result["versions"] and result["machine"]["cores"] >= 1


@pytest.mark.slow
def test_a_trial_runs_in_a_separate_process(stories):
    (result,) = bench_speed([str(stories)], Workload(prompt_tokens=8), trials=1)["models"]
    assert result["import_s"]["median"] > 0.1
    assert 50e6 < result["peak_bytes"]["median"] < 2e9


@pytest.mark.parametrize("batch_size", [1, 3])
def test_a_trial_generates_the_requested_tokens(split_stories, monkeypatch, batch_size):
    """Every answer has its full length."""
    name = "stream_generate" if batch_size == 1 else "batch_generate"
    module = import_module("mlx_lm.generate")
    original, calls = getattr(module, name), []

    def recorded(model, tokenizer, prompt, max_tokens):
        assert not tokenizer.eos_token_ids
        calls.append((np.atleast_2d(prompt).shape, max_tokens))
        return original(model, tokenizer, prompt, max_tokens=max_tokens)

    monkeypatch.setattr(module, name, recorded)
    workload = Workload(prompt_tokens=8, generation_tokens=6, batch_size=batch_size)
    result = run_trial(str(split_stories), workload)
    assert calls[-1] == ((batch_size, 8), 6)
    assert result["prompt_tps"] > 0 and result["generation_tps"] > 0
    assert result["imported_at"] + result["load_s"] < result["first_token_at"]


def test_ratio_is_of_medians_with_the_extremes_of_rounds():
    def runs(**values):
        rows = [dict(zip(values, row, strict=True)) for row in zip(*values.values(), strict=True)]
        return [{"import_s": 1, "first_token_s": 1, "peak_bytes": 1, **row} for row in rows]

    mine = runs(prompt_tps=[10, 20, 40], generation_tps=[2, 2, 2], load_s=[3, 1, 2])
    theirs = runs(prompt_tps=[30, 30, 20], generation_tps=[4, 6, 8], load_s=[1, 1, 1])
    result = ratios(mine, theirs)
    assert result["prefill_time"] == {"median": 1.5, "min": 0.5, "max": 3}
    assert result["decode_time"] == {"median": 3, "min": 2, "max": 4}
    assert result["load_s"] == {"median": 2, "min": 1, "max": 3}


def test_model_that_does_not_load_is_named(tmp_path):
    with pytest.raises(SplitQuantError, match=r"bench failed: .*no config\.json"):
        bench_speed([str(tmp_path)], Workload(prompt_tokens=1), trials=1)


def test_a_missing_command_is_named(capsys):
    assert cli.run(["bench"]) == 2
    assert (
        "expected a command, got none (see splitquant-mlx bench --help)" in capsys.readouterr().err
    )


@pytest.mark.parametrize("name", ["prompt_tokens", "generation_tokens", "batch_size"])
def test_empty_workload_is_refused(name):
    with pytest.raises(RecipeError, match=f"{name}: expected at least 1, got 0"):
        Workload(**{name: 0})
