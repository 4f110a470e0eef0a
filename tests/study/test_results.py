"""Result files: written atomically, read back unchanged, and named in errors when invalid."""

import errno
import json
import math
import os
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st
from made_up_study import result, results, study, write_study

from splitquant_mlx.errors import SplitQuantError, TargetError
from splitquant_mlx.study.results import (
    Result,
    load_results,
    load_study_record,
    result_file,
    save,
    save_study,
)

KL = {"kl_mean": 0.25, "top1_agreement": 0.8, "positions": 10}
names = st.text(st.characters(categories=["L", "N", "P", "S"]), min_size=1)


def test_results_round_trip(tmp_path):
    write_study(tmp_path)
    loaded = {(made.variant, made.part): made for made in load_results(tmp_path)}
    expected = {(made.variant, made.part): made for made in results()}
    assert loaded == expected
    assert load_study_record(tmp_path) == study()


def test_the_file_is_the_documented_json(tmp_path):
    file = save(result("rtn-4", "kl", KL, settings={"tokens": 10}), tmp_path)
    assert file == tmp_path / "rtn-4.kl.json"
    content = json.loads(file.read_text())
    assert content["schema"] == 1 and content["values"] == KL
    assert content["settings"] == {"tokens": 10}
    assert content.keys() == {
        *("schema", "study", "variant", "part", "settings", "values", "seconds", "created"),
        *("machine", "versions"),
    }


def test_time_machine_and_versions_are_filled_in():
    made = Result(study="s", variant="v", part="kl", settings={}, values=KL, seconds=1)
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00", made.created)
    assert made.machine["memory_bytes"] > 0 and "mlx" in made.versions


@pytest.mark.parametrize("number", [math.inf, -math.inf, math.nan])
def test_non_finite_numbers_round_trip(tmp_path, number):
    file = save(result("v", "kl", {"kl_mean": number}), tmp_path)
    json.loads(file.read_text(), parse_constant=lambda name: pytest.fail(f"not JSON: {name}"))
    loaded = load_results(tmp_path)[0].values["kl_mean"]
    assert loaded == number or (math.isnan(number) and math.isnan(loaded))


@given(first=names, second=names)
def test_no_two_variants_share_a_file(tmp_path_factory, first, second):
    directory = tmp_path_factory.getbasetemp()
    a, b = (result_file(directory, name, "kl") for name in (first, second))
    assert (a.name.lower() == b.name.lower()) == (first == second)
    assert a.parent == directory and re.fullmatch(r"[a-z0-9-]+\.kl\.json", a.name)
    assert len(a.name) < 100


def test_a_full_disk_leaves_the_old_file(tmp_path, monkeypatch):
    file = save(result("v", "kl", KL), tmp_path)
    before = file.read_bytes()

    def fail(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(TargetError, match=r"v\.kl\.json: No space left"):
        save(result("v", "kl", {**KL, "kl_mean": 9.0}), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["v.kl.json"]
    assert file.read_bytes() == before


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"part": "vibes"}, "part: expected one of convert, "),
        ({"variant": "a\x1b[31m"}, "variant: expected one printable line"),
        ({"values": {}}, "values.kl_mean: expected a value, got none"),
        ({"values": {"kl_mean": "0.1"}}, "values.kl_mean: expected a number, got '0.1'"),
        (
            {"values": {"kl_mean": 3.0, "kl_low": 1.0, "kl_high": 2.0}},
            "expected kl_mean from kl_low 1.0 to kl_high 2.0, got 3.0",
        ),
        ({"settings": {"set": {1}}}, "cannot be written as JSON"),
    ],
)
def test_save_rejects_invalid_results(tmp_path, changes, message):
    with pytest.raises(SplitQuantError, match=re.escape(message)):
        save(result(**{"variant": "v", "part": "kl", "values": KL, **changes}), tmp_path)
    assert not list(tmp_path.iterdir())


def test_answers_must_match_the_number_of_questions(tmp_path):
    values = {"questions": 3, "num_shots": 0, "accuracy": 0.5, "correct": [1, 0]}
    with pytest.raises(SplitQuantError, match="expected 3 answers, got 2"):
        save(result("v", "arc_easy.letter", values), tmp_path)


def test_histogram_has_one_edge_more_than_counts(tmp_path):
    values = {"layer": "x", "edges": [0, 1], "counts": [1, 2], "cut_points": []}
    with pytest.raises(SplitQuantError, match="expected 3 edges, one more than counts, got 2"):
        save(result("v", "weights", values), tmp_path)


def edited(**changes):
    return lambda content: json.dumps({**content, **changes}).encode()


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: b"",
        lambda content: json.dumps(content).encode()[:-20],
        lambda content: b"\xff\xfe\x00",
        lambda content: b"[1, 2]",
        lambda content: b"[" * 100_000,
        edited(schema=2),
        edited(part="vibes"),
        edited(part=["kl"]),
        edited(variant=""),
        edited(variant="a\nb"),
        edited(values=[]),
        edited(values={"kl_mean": None}),
        edited(values={"kl_mean": True}),
        edited(values={"kl_mean": 10**400}),
        edited(seconds="1"),
        edited(machine=None),
        edited(study="another"),
    ],
)
def test_broken_file_is_named(tmp_path, damage):
    save(result("a-first", "kl", KL), tmp_path)
    file = save(result("v", "kl", KL), tmp_path)
    file.write_bytes(damage(json.loads(file.read_text())))
    with pytest.raises(SplitQuantError, match=re.escape(str(file))) as caught:
        load_results(tmp_path)
    assert str(caught.value).count("\n") == 0


def test_two_files_of_one_measurement_are_rejected(tmp_path):
    file = save(result("v", "kl", KL), tmp_path)
    (tmp_path / "copy.json").write_bytes(file.read_bytes())
    with pytest.raises(SplitQuantError, match=r"v\.kl\.json .* copy\.json contains the same"):
        load_results(tmp_path)


def test_directory_without_results(tmp_path):
    with pytest.raises(SplitQuantError, match="contains no results"):
        load_results(tmp_path)
    with pytest.raises(SplitQuantError, match="is not a directory"):
        load_results(tmp_path / "nowhere")
    with pytest.raises(SplitQuantError, match=r"study\.json cannot be read"):
        load_study_record(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"title": 3}, "title: expected a string, got 3"),
        ({"notes": [1]}, "notes.0: expected a string, got 1"),
        ({"order": "abc"}, "order: expected a"),
        ({"paper": {"source": "x"}}, "paper.claims: expected a value, got none"),
        (
            {"paper": {"source": "x", "claims": [{"what": "y"}]}},
            "paper.claims.0.value: expected",
        ),
    ],
)
def test_broken_study_is_named(tmp_path, changes, message):
    file = save_study(study(), tmp_path)
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))
    with pytest.raises(SplitQuantError, match=rf"study\.json.*{re.escape(message)}"):
        load_study_record(tmp_path)
