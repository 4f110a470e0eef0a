"""A result appears on the card of the model it was measured on, and on no other."""

import json
import re
import shutil

import pytest
import tiny
from cards import card
from in_process import run_here

from splitquant_mlx import Recipe, SplitQuantError, convert
from splitquant_mlx.cli import run
from splitquant_mlx.progress import Silent
from splitquant_mlx.publish.files import check_converted
from splitquant_mlx.publish.measurements import find_measurements
from splitquant_mlx.study import runner
from splitquant_mlx.study.runner import run_study
from splitquant_mlx.study.spec import load_study

STUDY = """
model = "{model}"
[measure]
arc = ["arc_easy"]
questions = 3
text_tokens = 128
context_length = 64
prompt_tokens = 0
[[variants]]
name = "plain"
method = "rtn"
[[variants]]
name = "split"
"""
QUESTION = {
    "question": "w2 w3 w4",
    "choices": {"text": ["w5", "w6 w7"], "label": ["A", "B"]},
    "answerKey": "A",
}


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """Return a directory with a study of two variants and its models, and another conversion."""
    home = tmp_path_factory.mktemp("measured")
    source = tiny.write_checkpoint(home / "source")
    words = " ".join(f"w{n % 90 + 2}" for n in range(400))
    (home / "text.txt").write_text(words)
    lines = (json.dumps({"id": str(n), **QUESTION}) for n in range(3))
    (home / "arc.jsonl").write_text("\n".join(lines))
    (home / "study.toml").write_text(STUDY.format(model=source))
    files = {"arc_easy": home / "arc.jsonl", "text": home / "text.txt"}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runner, "run_program", run_here)
        run_study(load_study(home / "study.toml"), home / "out", data=files, keep_models=True)
    convert(source, home / "rtn8", recipe=Recipe(method="rtn", bits=8))
    return home


def evaluate(home, model, *options):
    file = home / f"{model.name}-{options[1]}.json"
    arguments = ["eval", "--model", model, "--json", file, *options]
    if not file.exists():
        assert run([str(argument) for argument in arguments]) == 0
    return file


@pytest.fixture
def kl(home):
    options = ("--task", "kl", "--reference", home / "source", "--data", home / "text.txt")
    return evaluate(home, home / "rtn8", *options, "--context-length", 64)


def find(model, *paths):
    return find_measurements(check_converted(model), paths, Silent())


def refusal(model, *paths):
    with pytest.raises(SplitQuantError) as caught:
        find(model, *paths)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def rows(text):
    """Return the cells of the card's table of measurements, by the first cell of each row."""
    section = text[text.index("## Measured") : text.index("## Run it")]
    lines = [line.strip("|").split("|") for line in section.splitlines() if line.startswith("|")]
    return {cells[0].strip(): [cell.strip() for cell in cells[1:]] for cells in lines[2:]}


def test_results_of_eval_are_shown_with_their_settings(home, kl, capfd):
    capfd.readouterr()
    perplexity = evaluate(
        home, home / "rtn8", "--task", "perplexity", "--data", home / "text.txt",
        "--context-length", 64,
    )  # fmt: skip
    arc = evaluate(
        home, home / "rtn8", "--task", "arc_easy", "--data", home / "arc.jsonl",
        "--reference", home / "source",
    )  # fmt: skip
    text = card(home / "rtn8", results=(kl, perplexity, arc))
    shown = rows(text)
    values = json.loads(kl.read_text())["values"]
    name, setting = shown["KL divergence, nats"][0], shown["KL divergence, nats"][-1]
    assert float(name.split(" ± ")[0]) == pytest.approx(values["kl_mean"], rel=0.01)
    for part in (
        f"{values['positions']:,} positions", "`text.txt`", values["text_sha256"][:12],
        "windows of `64` tokens", "from `source`", "`cpu`", "`mlx ", "`splitquant-mlx ",
    ):  # fmt: skip
        assert part in setting
    values = json.loads(perplexity.read_text())["values"]
    assert shown["perplexity"][0].startswith(f"{values['perplexity']:.2f} ± ")
    accuracy = json.loads(arc.read_text())["values"]
    value, compared, setting = shown["ARC-Easy, %"]
    assert value.startswith(f"{accuracy['accuracy'] * 100:.1f}")
    assert compared.startswith(f"{accuracy['reference']['accuracy'] * 100:.1f}")
    assert "3 questions, in the format of lm-evaluation-harness, 0 few-shot examples" in setting
    assert str(home) not in text, "local paths are private"


def test_the_metadata_contains_the_results(home, kl):
    from huggingface_hub import ModelCard

    values = json.loads(kl.read_text())["values"]
    shown = ModelCard(card(home / "rtn8", results=(kl,))).data
    assert shown.model_name == "name"
    assert {result.metric_type: result.metric_value for result in shown.eval_results} == {
        name: values[name] for name in ("kl_mean", "top1_agreement")
    }


def test_results_of_a_study_belong_to_one_variant(home):
    for name, other in (("plain", "split"), ("split", "plain")):
        model = home / "out" / "models" / name
        results = {m.part: m for m in find(model, home / "out")}
        assert set(results) == {
            "kl", "perplexity", "arc_easy.loglikelihood", "arc_easy.letter"
        }  # fmt: skip
        for part, measurement in results.items():
            (file,) = (home / "out").glob(f"{name}.{part}.json")
            assert measurement.values == json.loads(file.read_text())["values"]
            (other_file,) = (home / "out").glob(f"{other}.{part}.json")
            assert "has another recipe" in refusal(model, other_file)
        shown = rows(card(model, results=[home / "out"]))
        original = json.loads((home / "out" / "original.perplexity.json").read_text())["values"]
        assert shown["perplexity"][1].startswith(f"{original['perplexity']:.2f}")
        assert "(the original)" in shown["perplexity"][1]
        assert card(model) == card(model, results=[home / "out"]), "found from the model"
    assert "has another recipe" in refusal(home / "rtn8", home / "out")
    assert "has another recipe" in refusal(model, home / "out" / "original.perplexity.json")


def test_another_conversion_with_the_same_recipe(home, tmp_path):
    """It is identified by the original, or, without that, by the hash that the study wrote."""
    convert(home / "source", tmp_path / "again", recipe=Recipe(method="rtn"))
    results = shutil.copytree(home / "out", tmp_path / "out")
    assert find(tmp_path / "again", results)
    (results / "plain.convert.json").unlink()
    assert find(tmp_path / "again", results), "by the original's hash"
    file = tmp_path / "again" / "splitquant.json"
    file.write_text(file.read_text().replace(str(home / "source"), "/gone"))
    assert "its original cannot be compared" in refusal(tmp_path / "again", results)
    assert find(tmp_path / "again", home / "out"), "by the conversion's hash"
    other = tiny.write_checkpoint(tmp_path / "other", rms_norm_eps=1e-6)
    convert(other, tmp_path / "from other", recipe=Recipe(method="rtn"))
    assert "has another original" in refusal(tmp_path / "from other", home / "out")


def test_an_evaluation_of_other_content_is_refused(home, kl, tmp_path):
    assert "with other content" in refusal(home / "out" / "models" / "plain", kl)
    content = json.loads(kl.read_text())
    (tmp_path / "old.json").write_text(json.dumps({**content, "model_hash": None}))
    assert "has no model hash" in refusal(home / "rtn8", tmp_path / "old.json")


BROKEN = {
    "no JSON": ("[", "not valid JSON"),
    "a list": ("[]", "expected a JSON object"),
    "something else": ("{}", "neither by eval nor by run"),
    "too deep": ("[" * 100_000, "not valid JSON"),
    "text for a number": ({"values": {"kl_mean": "0.1"}}, "kl_mean"),
    "a task that is not a name": ({"task": ["kl"]}, "task"),
    "a task of lm-eval without numbers": ({"task": "hellaswag"}, "finite numbers"),
}


@pytest.mark.parametrize(("content", "message"), BROKEN.values(), ids=BROKEN)
def test_an_invalid_result_file_is_refused(home, kl, tmp_path, content, message):
    if isinstance(content, dict):
        values = {"acc": "high"} if "task" in content else {}
        content = json.dumps({**json.loads(kl.read_text()), "values": values, **content})
    (tmp_path / "x.json").write_text(content)
    assert message in refusal(home / "rtn8", tmp_path / "x.json")


def test_a_missing_file_and_an_empty_directory_are_refused(home, tmp_path):
    assert "cannot be read" in refusal(home / "rtn8", tmp_path / "missing.json")
    assert "has no result of" in refusal(home / "rtn8", tmp_path)


def test_text_of_results_is_escaped(home, kl, tmp_path):
    evil = "x`|<script>\n](http://evil)"
    content = json.loads(kl.read_text())
    content.update(reference=evil, machine={"chip": evil}, versions={"mlx": evil})
    content["settings"].update(data=evil, context_length=evil)
    content["values"]["text_sha256"] = evil
    (tmp_path / "x.json").write_text(json.dumps(content))
    text = card(home / "rtn8", results=[tmp_path / "x.json"])
    outside = re.sub(r"`[^`\n]*`", "", text)
    assert "script" in text and "script" not in outside and "evil" not in outside
    assert all(len(cells) == 3 for cells in rows(text).values())


def test_a_task_of_lm_eval_is_shown(home, kl, tmp_path):
    content = {**json.loads(kl.read_text()), "task": "hellaswag", "values": {"x acc": 0.4321}}
    content["settings"]["limit"] = 20
    (tmp_path / "x.json").write_text(json.dumps(content))
    value, _, setting = rows(card(home / "rtn8", results=[tmp_path / "x.json"]))["`x acc`"]
    assert value == "0.4321" and "`hellaswag` of lm-evaluation-harness, `20` questions" in setting
