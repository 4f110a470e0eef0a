"""Two ranks compute the same results as one process, and fail together."""

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import rank_work
import tiny
from ranks import finish, running

from splitquant_mlx import Recipe, convert
from splitquant_mlx.cli import run

SCRIPT = Path(rank_work.__file__)
pytestmark = pytest.mark.slow  # starts two processes and converts five models


@pytest.fixture(scope="module")
def outputs(split_32, stories, story_text, questions_file, tmp_path_factory):
    """Return the results of rank_work.py in one process and on each of two ranks."""
    home = tmp_path_factory.mktemp("home")
    (home / "models").mkdir()
    recipe = Recipe(method="splitquant", group_size=32)
    for name in ("llama", "qwen2", "qwen3_moe"):
        source = tiny.write_checkpoint(home / "sources" / name, name)
        convert(source, home / "models" / name, recipe=recipe)
    shutil.copytree(home / "sources" / "llama", home / "models" / "unquantized")
    rtn = Recipe(method="rtn", group_size=32)
    convert(home / "sources" / "llama", home / "models" / "rtn", recipe=rtn)
    shutil.copytree(home / "models" / "qwen2", home / "models" / "qwen2-pipeline")
    text = home / "text.txt"
    text.write_text(story_text[:2000], encoding="utf-8")
    lines = questions_file.read_text(encoding="utf-8").split("\n")
    questions = home / "questions.jsonl"
    questions.write_text("\n".join(lines[:5]), encoding="utf-8")
    shutil.copytree(split_32, home / "split")
    shutil.copytree(stories, home / "original")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SPLITQUANT_CACHE", str(home / "single"))
        single = rank_work.work(home, text, questions, None)
    cache = {"SPLITQUANT_CACHE": str(home / "together")}
    with running(sys.executable, SCRIPT, home, text, questions, environment=cache) as processes:
        ended = finish(processes)
    assert [code for code, _, _ in ended] == [0, 0], ended
    return json.loads(json.dumps(single)), [json.loads(out) for _, out, _ in ended]


def test_a_sharded_model_computes_the_same_logits(outputs):
    single, ranks = outputs
    assert len(single["logits"]) == 6
    for name, logits in single["logits"].items():
        expected = np.array(logits)
        for rank in ranks:
            actual = np.array(rank["logits"][name])
            assert np.abs(actual - expected).max() < 2e-5 * np.abs(expected).max(), name


def test_mlx_lm_shards_a_split_model(outputs):
    _, ranks = outputs
    for rank in ranks:
        assert np.allclose(rank["stock"], rank["logits"]["llama"], rtol=1e-5, atol=1e-6)


def test_all_ranks_use_the_token_sampled_by_rank_0(outputs):
    single, ranks = outputs
    assert len(set(single["sampled"])) > 1
    assert ranks[0]["sampled"] == ranks[1]["sampled"] == single["sampled"]


@pytest.mark.parametrize("task", ["perplexity", "kl", "arc", "letter"])
def test_an_evaluation_returns_the_same_values(outputs, task):
    single, ranks = outputs
    for rank in ranks:
        assert rank["evaluations"][task] == single["evaluations"][task]


def test_unshard_restores_the_order_of_sharded_items(outputs):
    single, ranks = outputs
    assert single["dealt"] == ranks[0]["dealt"] == ranks[1]["dealt"] == list("abcde")


def test_an_error_on_one_rank_is_raised_on_all(outputs):
    _, (first, second) = outputs
    elsewhere = ["FailedElsewhere", "rank 1: 1 does not want to"]
    differ = ["FailedElsewhere", "rank 1 has another recipe than rank 0: use one on all"]
    assert first["failures"] == [elsewhere, ["RecipeError", "0 does not want to"], differ]
    assert second["failures"][0] == ["RecipeError", "1 does not want to"]
    assert second["failures"][1:] == [["RecipeError", "1 does not want to"], differ]


def test_a_rank_without_the_others_is_refused(split_32, monkeypatch, capsys):
    monkeypatch.setenv("MLX_RANK", "1")
    assert run(["generate", "--device", "cpu", "--model", str(split_32)]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("splitquant-mlx: error: rank 1: mlx finds no other rank")
    assert run(["--version"]) == 0
    assert capsys.readouterr().out == ""
