"""`eval`: one model, one task, a table and JSON."""

import json

import pytest

from splitquant_mlx.cli import run


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("SPLITQUANT_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def evaluated(tmp_path, capsys):
    """Return a function that runs `eval` and returns what it printed and its JSON."""

    def evaluate(*arguments):
        file = tmp_path / "result.json"
        code = run(["eval", "--device", "cpu", "--json", str(file), *map(str, arguments)])
        out, err = capsys.readouterr()
        assert code == 0, err
        return out, json.loads(file.read_text())

    return evaluate


def test_arc_of_two_models_on_the_same_questions(evaluated, stories, split_stories, questions_file):
    out, found = evaluated(
        "--task", "arc_easy", "--model", split_stories, "--reference", stories,
        "--data", questions_file, "--limit", 12,
    )  # fmt: skip
    values = found["values"]
    assert values["questions"] == 12 and len(values["correct"]) == 12
    assert values["accuracy"] == sum(values["correct"]) / 12
    differ = [a - b for a, b in zip(values["correct"], values["reference"]["correct"], strict=True)]
    assert values["comparison"]["only_first"] == differ.count(1)
    assert values["comparison"]["only_second"] == differ.count(-1)
    assert "McNemar" in out and "accuracy_norm" in out
    assert found["versions"]["mlx"] and found["machine"]["cores"]


def test_perplexity_and_divergence(evaluated, stories, split_stories, text_file):
    text = ("--data", text_file, "--limit", 4)
    sizes = ("--context-length", 64)
    _, own = evaluated("--task", "perplexity", "--model", stories, *text, *sizes)
    assert 1 < own["values"]["perplexity"] < 20 and own["values"]["tokens"] == 4 * 63
    kl = ("--task", "kl", "--reference", stories, *text, *sizes)
    _, itself = evaluated(*kl, "--model", stories)
    assert itself["values"]["kl_mean"] < 1e-6 and itself["values"]["top1_agreement"] == 1
    _, split = evaluated(*kl, "--model", split_stories)
    assert 1e-4 < split["values"]["kl_mean"] < 0.1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--task", "kl"), "name it (--reference)"),
        (("--task", "perplexity", "--reference", "x"), "takes no --reference"),
        (("--task", "arc_easy", "--limit", "0"), "limit: wanted 1 or more"),
        (("--task", "arc_easy", "--data", "missing.jsonl"), "missing.jsonl"),
        (("--task", "arc_easy", "--protocol", "guess"), "guess"),
    ],
)
def test_bad_settings_are_refused(arguments, message, stories, questions_file, capsys):
    extra = () if "--data" in arguments else ("--data", questions_file)
    assert run(["eval", "--model", str(stories), *arguments, *map(str, extra)]) == 2
    err = capsys.readouterr().err
    assert message in err and err.count("\n") == 1
