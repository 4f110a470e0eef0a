"""`eval`: one model, one task, a table and JSON."""

import json

import pytest

from splitquant_mlx.cli import run


@pytest.fixture(autouse=True)
def separate_cache(tmp_path, monkeypatch):
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
    out, result = evaluated(
        "--task", "arc_easy", "--model", split_stories, "--reference", stories,
        "--data", questions_file, "--limit", 12,
    )  # fmt: skip
    values = result["values"]
    assert values["questions"] == 12 and len(values["correct"]) == 12
    assert values["accuracy"] == sum(values["correct"]) / 12
    differ = [a - b for a, b in zip(values["correct"], values["reference"]["correct"], strict=True)]
    assert values["comparison"]["only_first"] == differ.count(1)
    assert values["comparison"]["only_second"] == differ.count(-1)
    assert "McNemar" in out and "accuracy, by length (higher is better)" in out and " ± " in out
    assert result["versions"]["mlx"] and result["machine"]["cores"]


def test_perplexity_and_divergence(evaluated, stories, split_stories, text_file):
    text = ("--data", text_file, "--limit", 4)
    sizes = ("--context-length", 64)
    _, original = evaluated("--task", "perplexity", "--model", stories, *text, *sizes)
    assert 1 < original["values"]["perplexity"] < 20 and original["values"]["tokens"] == 4 * 63
    kl = ("--task", "kl", "--reference", stories, *text, *sizes)
    _, itself = evaluated(*kl, "--model", stories)
    assert itself["values"]["kl_mean"] < 1e-6 and itself["values"]["top1_agreement"] == 1
    _, split = evaluated(*kl, "--model", split_stories)
    assert 1e-4 < split["values"]["kl_mean"] < 0.1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--task", "kl"), "give --reference"),
        (("--task", "perplexity", "--reference", "x"), "takes no --reference"),
        (("--task", "arc_easy", "--limit", "0"), "limit: expected at least 1"),
        (("--task", "arc_easy", "--data", "missing.jsonl"), "missing.jsonl"),
        (("--task", "arc_easy", "--protocol", "guess"), "guess"),
    ],
)
def test_bad_settings_are_refused(arguments, message, stories, questions_file, capsys):
    extra = () if "--data" in arguments else ("--data", questions_file)
    assert run(["eval", "--model", str(stories), *arguments, *map(str, extra)]) == 2
    err = capsys.readouterr().err
    assert message in err and err.count("\n") == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--task", "ppl"], "did you mean perplexity?"),
        (["--task", "arc"], "did you mean arc_challenge or arc_easy?"),
        (["--task", "arc_easy,kl"], "expected the name of one task"),
        (["--task", "perplexity", "--context-length", "513"], "expected at most 512, the model's"),
    ],
)
def test_invalid_tasks_and_lengths_are_named(stories, tmp_path, capsys, options, message):
    (tmp_path / "text.txt").write_text("Once upon a time " * 400)
    code = run(["eval", str(stories), *options, "--data", str(tmp_path / "text.txt")])
    assert code == 2 and message in capsys.readouterr().err


def test_one_question_has_no_standard_error(stories, questions_file, tmp_path, capsys):
    one = tmp_path / "one.jsonl"
    one.write_text(questions_file.read_text(encoding="utf-8").splitlines()[0], encoding="utf-8")
    assert run(["eval", str(stories), "--task", "arc_easy", "--data", str(one)]) == 0
    shown = capsys.readouterr().out
    assert "accuracy" in shown and "nan" not in shown and "±" not in shown


def test_an_interval_is_one_row(stories, split_32, tmp_path, capsys):
    text = tmp_path / "text.txt"
    text.write_text("Once upon a time there was a happy fox. " * 100)
    options = ["--task", "kl", "--reference", str(stories), "--data", str(text)]
    options += ["--context-length", "64", "--json", str(tmp_path / "found.json")]
    assert run(["eval", str(split_32), *options]) == 0
    values = json.loads((tmp_path / "found.json").read_text())["values"]
    rows = [line for line in capsys.readouterr().out.splitlines() if "95 % interval" in line]
    assert len(rows) == 1 and values["kl_low"] < values["kl_high"]
    assert rows[0].endswith(f" {values['kl_low']:.4g} to {values['kl_high']:.4g}")
