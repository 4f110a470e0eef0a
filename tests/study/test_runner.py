"""A study runs to its report, resumes after an interruption, and reports missing data."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress

import pytest
from in_process import run_here

from splitquant_mlx.bench import speed
from splitquant_mlx.bench.programs import Run
from splitquant_mlx.cli import run
from splitquant_mlx.conversion.bits import forecast
from splitquant_mlx.errors import SourceError
from splitquant_mlx.formats.manifest import load_manifest
from splitquant_mlx.progress import Silent
from splitquant_mlx.report import load_report
from splitquant_mlx.runtime.workspace import workspace
from splitquant_mlx.study import data as study_data
from splitquant_mlx.study import runner
from splitquant_mlx.study.results import load_results
from splitquant_mlx.study.runner import run_study
from splitquant_mlx.study.spec import load_study

STUDY = """
title = "Stories"
model = "{model}"
notes = ["A note."]
[measure]
arc = ["arc_easy"]
questions = 6
text_tokens = 512
context_length = 128
prompt_tokens = {prompt_tokens}
generation_tokens = 2
trials = 1
[recipe]
embeddings = "keep"
lm_head = "keep"
group_size = 32
[[variants]]
name = "plain"
method = "rtn"
[[variants]]
name = "split"
[paper]
source = "arXiv:2503.07657"
claims = [{{ what = "time", value = 126, unit = "s" }}]
"""


@pytest.fixture
def study(stories, tmp_path):
    """Return a function that writes the study file."""

    def write(prompt_tokens=0, **changes):
        text = STUDY.format(model=stories, prompt_tokens=prompt_tokens)
        for old, new in changes.items():
            text = text.replace(old, new)
        file = tmp_path / "stories.toml"
        file.write_text(text)
        return file

    return write


@pytest.fixture
def files(questions_file, text_file):
    return {
        "arc_easy": questions_file,
        "text": text_file,
    }


def options(files):
    return [part for name, file in files.items() for part in ("--data", f"{name}={file}")]


def test_a_study_ends_in_a_report_of_what_was_measured(study, files, tmp_path, capsys, monkeypatch):
    """Conversions and speed trials run in this process; tests/bench tests separate processes."""
    monkeypatch.setattr(runner, "run_program", run_here)
    monkeypatch.setattr(speed, "run_program", run_here)
    home = tmp_path / "out"
    arguments = ["run", str(study(4)), "--output-dir", str(home), *options(files)]
    assert run(arguments) == 0
    shown = capsys.readouterr().out
    rows = {row.variant: row for row in load_report(home).rows}
    assert list(rows) == ["plain", "split", "original"]  # by size
    plain, split, original = rows.values()
    assert original.is_reference and original.kl is None
    assert original.get("convert", "bits_per_weight") == 32
    assert 0 < split.kl < plain.kl
    assert plain.stored_bytes < split.stored_bytes
    assert plain.accuracies["ARC-E"].value == sum(plain.accuracies["ARC-E"].correct) / 6
    assert set(plain.accuracies) == {"ARC-E", "ARC-E norm", "ARC-E letter"}
    assert all(row.get("speed", "decode_tokens_per_s") > 0 for row in rows.values())
    assert all(row.get("speed", "peak_bytes") > 1e7 for row in rows.values())
    assert plain.get("convert", "seconds")["total"] > 0 and plain.get("convert", "peak_bytes") > 1e7
    page = (home / "report.html").read_text(encoding="utf-8")
    for part in ("A note.", "126", "data:image/svg+xml"):
        assert part in page, part
    assert f"{split.kl:.3g}"[:4] in shown
    assert not any(line.endswith(" ") for line in shown.splitlines())
    assert run(["report", str(home), "--json", "-"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["study"]["title"] == load_report(home).study.title
    variants = {one["variant"]: one["values"] for one in printed["variants"]}
    assert variants["split"]["kl"]["kl_mean"] == split.kl and set(variants) == set(rows)
    assert not any((home / "models").glob("*")), "the models were to be removed"
    weights = json.loads(next(home.glob("split*.weights.json")).read_text())["values"]
    assert len(weights["cut_points"]) == 2 and sum(weights["counts"]) > 1000


def test_a_part_is_measured_alone_and_the_rest_later(study, files, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(runner, "run_program", run_here)
    home = tmp_path / "out"
    command = ["run", str(study()), "--output-dir", str(home), *options(files)]
    assert run([*command, "--measure", "arc", "--measure", "speed"]) == 0
    parts = {result.part for result in load_results(home)}
    assert parts == {"convert", "weights", "arc_easy.loglikelihood", "arc_easy.letter"}
    assert run(command) == 0
    added = {result.part for result in load_results(home)} - parts
    assert added == {"kl", "perplexity"}
    capsys.readouterr()
    assert run([*command, "--measure", "time"]) == 2
    assert "expected arc, text, speed, got 'time'" in capsys.readouterr().err


def test_an_auto_variant_has_its_forecast(study, files, stories, tmp_path, monkeypatch):
    monkeypatch.setattr(runner, "run_program", run_here)
    short = "calibration = { num_samples = 4, sequence_length = 32 }"
    auto = f'method = "auto"\ntarget_bpw = 5.0\n{short}'
    file = study(**{'method = "rtn"': auto, 'arc = ["arc_easy"]': "arc = []"})
    chosen = load_study(file)
    run_study(chosen, tmp_path / "out", data=files)
    rows = {row.variant: row for row in load_report(tmp_path / "out").rows}
    planned = forecast(str(stories), chosen.variants["plain"])
    stored = rows["plain"].get("convert", "forecast_kl")
    assert stored == pytest.approx(sum(planned.divergence.values())) and stored > 0
    assert rows["split"].get("convert", "forecast_kl") is None


@pytest.mark.slow
def test_existing_results_are_reused(study, files, tmp_path):
    home = tmp_path / "out"
    chosen = load_study(study())
    run_study(chosen, home, data=files)
    first = {file.name: file.stat().st_mtime_ns for file in home.glob("*.*.json")}
    next(home.glob("split*.kl.json")).unlink()
    run_study(chosen, home, data=files)
    second = {file.name: file.stat().st_mtime_ns for file in home.glob("*.*.json")}
    changed = [name for name in second if second[name] != first[name]]
    assert len(changed) == 1 and changed[0].endswith(".kl.json")
    run_study(load_study(study(**{"text_tokens = 512": "text_tokens = 256"})), home, data=files)
    third = {file.name: file.stat().st_mtime_ns for file in home.glob("*.*.json")}
    changed = {name.split(".", 1)[1] for name in third if third[name] != second[name]}
    assert changed == {"perplexity.json", "kl.json"}


@pytest.mark.robustness
def test_a_killed_study_resumes(study, files, tmp_path):
    home = tmp_path / "out"
    command = [sys.executable, "-m", "splitquant_mlx", "run", str(study())]
    command += ["--output-dir", str(home), "--device", "cpu", *options(files)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        deadline = time.monotonic() + 100
        while not list(home.glob("plain*.kl.json")) and time.monotonic() < deadline:
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
        process.communicate()
    before = {file.name: file.stat().st_mtime_ns for file in home.glob("*.*.json")}
    assert any(name.endswith("kl.json") for name in before)
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    after = {file.name: file.stat().st_mtime_ns for file in home.glob("*.*.json")}
    assert before.items() <= after.items() and len(after) > len(before)
    assert (home / "report.html").is_file()
    remaining = {
        path.name for path in home.iterdir() if path.suffix not in (".json", ".html", ".md")
    }
    assert remaining == {"models"} and not list((home / "models").iterdir())


class Notes(Silent):
    def __init__(self):
        self.notes = []

    def note(self, text):
        self.notes.append(text)


SMALL = """
model = "{model}"
[measure]
arc = []
text_tokens = 256
context_length = 128
prompt_tokens = 0
[[variants]]
name = "split"
"""


@pytest.fixture
def small(stories, files, tmp_path):
    """Return the command of a small study, and its directory of results."""
    file, home = tmp_path / "small.toml", tmp_path / "out"
    file.write_text(SMALL.format(model=stories))
    options = ["--data", f"text={files['text']}", "--device", "cpu"]
    return ["run", str(file), "--output-dir", str(home), *options], home


def values_of(home):
    return {
        (result.variant, result.part): {
            name: value
            for name, value in result.values.items()
            if name not in ("seconds", "peak_bytes")
        }
        for result in load_results(home)
    }


def test_a_checkpoint_of_another_program_is_a_row(stories, tmp_path):
    from mlx_lm import convert

    theirs, text = tmp_path / "theirs", tmp_path / "text.txt"
    convert(str(stories), str(theirs), quantize=True, q_group_size=32, q_bits=4)
    text.write_text("Once upon a time there was a girl. " * 40)
    file, home = tmp_path / "rivals.toml", tmp_path / "out"
    content = SMALL.format(model=stories).replace("256", "192").replace("128", "64")
    file.write_text(content + f'path = "{theirs}"\n')
    run_study(load_study(file), home, data={"text": text})
    results = {(result.variant, result.part): result for result in load_results(home)}
    sizes, kl = results["split", "convert"].values, results["split", "kl"].values
    assert sizes["method"] == "foreign"
    assert sizes["weight_file_bytes"] == (theirs / "model.safetensors").stat().st_size
    parameters = results["original", "convert"].values["stored_bytes"] / 4  # float32
    assert sizes["bits_per_weight"] == 8 * sizes["stored_bytes"] / parameters
    assert 0 < kl["kl_low"] < kl["kl_mean"] < kl["kl_high"] < kl["kl_p99"]
    written = {file: file.stat().st_mtime_ns for file in home.glob("*.*.json")}
    notes = Notes()
    run_study(load_study(file), home, data={"text": text}, progress=notes)
    assert {file: file.stat().st_mtime_ns for file in home.glob("*.*.json")} == written
    (note,) = notes.notes
    assert note == f"{len(written)} results of an earlier run reused: nothing is left to measure"
    assert theirs.is_dir() and not list((home / "models").glob("*"))


def test_questions_changed_under_the_same_ids_are_asked_again(stories, questions_file, tmp_path):
    content = SMALL.format(model=stories).replace("[]", '["arc_easy"]\nquestions = 4')
    file, questions, home = tmp_path / "arc.toml", tmp_path / "asked.jsonl", tmp_path / "out"
    file.write_text(content.partition("[[")[0].replace("256", "0"))
    lines = [json.loads(line) for line in questions_file.read_text().splitlines()[:4]]
    answers = []
    for _ in range(2):
        questions.write_text("".join(json.dumps(line) + "\n" for line in lines))
        run_study(load_study(file), home, data={"arc_easy": questions})
        answers.append(values_of(home)["original", "arc_easy.loglikelihood"]["correct"])
        for line in lines:  # change the correct option
            labels = line["choices"]["label"]
            line["answerKey"] = labels[labels.index(line["answerKey"]) - 1]
    assert any(answers[0]) and not any(a and b for a, b in zip(*answers, strict=True))


def test_two_studies_in_one_directory(small, capsys):
    command, home = small
    home.mkdir()
    with workspace(home / ".running", "a study"):
        assert run(command) == 2
    err = capsys.readouterr().err
    assert f"a study in {home} is already running in process {os.getpid()}" in err
    assert err.count("\n") == 1 and not list(home.iterdir())


@pytest.mark.slow
def test_a_study_killed_anywhere_resumes(small, tmp_path):
    command, home = small
    assert run(command) == 0
    expected, names = values_of(home), {path.name for path in home.iterdir()}
    shutil.rmtree(home)
    program = [sys.executable, "-m", "splitquant_mlx", *command]
    rng, points, start = random.Random(0), 0, time.monotonic()
    while not (home / "report.md").exists():
        with subprocess.Popen(program, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
            with suppress(subprocess.TimeoutExpired):
                process.communicate(timeout=rng.uniform(0.5, 1.5) + 0.3 * points)
            process.kill()
            _, err = process.communicate()
        assert process.returncode in (0, -signal.SIGKILL), err
        if any(home.glob("*.*.json")):
            assert values_of(home).items() <= expected.items()
        points += 1
        assert time.monotonic() - start < 300
    assert run(command) == 0
    assert points > 2 and values_of(home) == expected
    assert {path.name for path in home.iterdir()} == names
    assert not any((home / "models").iterdir())


@pytest.mark.slow
@pytest.mark.parametrize("damage", [False, True])
def test_a_model_of_a_killed_study_is_reused_if_complete(small, monkeypatch, damage):
    command, home = small
    assert run([*command, "--keep-models"]) == 0
    expected, model = values_of(home), home / "models" / "split" / "model.safetensors"
    next(home.glob("split*.kl.json")).unlink()
    if damage:
        with model.open("r+b") as file:
            file.seek(-100, os.SEEK_END)
            file.write(bytes(100))
    made = model.stat().st_mtime_ns
    assert run([*command, "--keep-models"]) == 0
    assert (model.stat().st_mtime_ns != made) == damage
    assert values_of(home) == expected


def test_the_number_of_calibration_texts_is_that_of_the_model(small, tmp_path, monkeypatch):
    monkeypatch.setattr(runner, "run_program", run_here)
    command, home = small
    file = tmp_path / "small.toml"
    settings = 'method = "imatrix"\ncalibration = { sequence_length = 8 }\n'
    file.write_text(file.read_text() + settings)
    assert run([*command, "--keep-models"]) == 0
    model = home / "models" / "split"
    number = load_manifest(model).recipe["calibration"]["num_samples"]
    values = values_of(home)
    assert values["split", "convert"]["num_samples"] == number == 128
    assert values["original", "convert"].get("num_samples") is None
    made = (model / "model.safetensors").stat().st_mtime_ns
    next(home.glob("split*.kl.json")).unlink()
    assert run([*command, "--keep-models"]) == 0
    assert (model / "model.safetensors").stat().st_mtime_ns == made and values_of(home) == values


def test_missing_data_sets_are_named(study, tmp_path, monkeypatch):
    def unreachable(*args):
        raise SourceError("the hub cannot be reached")

    def run_here(command):
        assert run(command[3:]) == 0
        return Run(started=0, seconds=1, peak_bytes=1, output="")

    monkeypatch.setattr(runner, "run_program", run_here)
    monkeypatch.setattr(study_data, "fetch_questions", unreachable)
    monkeypatch.setattr(study_data, "fetch_wikitext", unreachable)
    run_study(load_study(study()), tmp_path / "out")
    report = load_report(tmp_path / "out")
    assert [row.kl for row in report.rows] == [None, None, None]
    assert all(row.stored_bytes for row in report.rows)
    assert any("arc_easy was not measured" in note for note in report.study.notes)
    assert any("text was not measured" in note for note in report.study.notes)


def test_a_bad_data_file_stops_the_study(study, tmp_path, capsys):
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"id": "1"}\n')
    arguments = ["run", str(study()), "--output-dir", str(tmp_path / "out")]
    assert run([*arguments, "--data", f"arc_easy={bad}"]) == 2
    assert "bad.jsonl, line 1" in capsys.readouterr().err
    assert run([*arguments, "--data", "arc_hard=x"]) == 2
    assert "--data: expected NAME=FILE" in capsys.readouterr().err


def test_windows_do_not_exceed_the_models_context_length(study, files, tmp_path, capsys):
    """The context length of the model is 512."""
    file = study(**{"context_length = 128": "context_length = 1024"})
    assert run(["run", str(file), "--output-dir", str(tmp_path / "out"), *options(files)]) == 2
    assert "context_length: expected at most 512" in capsys.readouterr().err
