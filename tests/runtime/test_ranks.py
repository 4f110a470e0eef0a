"""Two processes give what one does, and fail together."""

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
pytestmark = pytest.mark.slow  # two processes and five models of their own


@pytest.fixture(scope="module")
def worked(split_32, stories, story_text, questions_file, tmp_path_factory):
    """Return what rank_work.py says alone, and as each of two ranks."""
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
        patch.setenv("SPLITQUANT_CACHE", str(home / "alone"))
        alone = rank_work.work(home, text, questions, None)
    cache = {"SPLITQUANT_CACHE": str(home / "together")}
    with running(sys.executable, SCRIPT, home, text, questions, environment=cache) as processes:
        ended = finish(processes)
    assert [code for code, _, _ in ended] == [0, 0], ended
    return json.loads(json.dumps(alone)), [json.loads(out) for _, out, _ in ended]


def test_a_divided_model_computes_the_same(worked):
    alone, ranks = worked
    assert len(alone["logits"]) == 6
    for name, logits in alone["logits"].items():
        wanted = np.array(logits)
        for rank in ranks:
            found = np.array(rank["logits"][name])
            assert np.abs(found - wanted).max() < 2e-5 * np.abs(wanted).max(), name


def test_mlx_lm_on_its_own_divides_a_split_model(worked):
    _, ranks = worked
    for rank in ranks:
        assert np.allclose(rank["stock"], rank["logits"]["llama"], rtol=1e-5, atol=1e-6)


def test_all_ranks_take_the_token_that_rank_0_samples(worked):
    alone, ranks = worked
    assert len(set(alone["sampled"])) > 1
    assert ranks[0]["sampled"] == ranks[1]["sampled"] == alone["sampled"]


@pytest.mark.parametrize("task", ["perplexity", "kl", "arc", "letter"])
def test_an_evaluation_has_the_same_values(worked, task):
    alone, ranks = worked
    for rank in ranks:
        assert rank["evaluations"][task] == alone["evaluations"][task]


def test_work_is_dealt_out_and_collected_in_order(worked):
    alone, ranks = worked
    assert alone["dealt"] == ranks[0]["dealt"] == ranks[1]["dealt"] == list("abcde")


def test_where_one_rank_fails_all_do_and_know_why(worked):
    _, (first, second) = worked
    elsewhere = ["FailedElsewhere", "rank 1: 1 does not want to"]
    differ = ["FailedElsewhere", "rank 1 has another recipe than rank 0: give both the same"]
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
