"""The tables show the values of the JSON files."""

import dataclasses
import json
import math
import subprocess
import sys
from io import StringIO

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from made_up_study import QUESTIONS, VARIANTS, result, results, study, tables, write_study
from rich.console import Console
from scipy.stats import binomtest

from splitquant_mlx.report import build_report, load_report, markdown, terminal
from splitquant_mlx.report.numbers import significant
from splitquant_mlx.report.rows import pareto_front
from splitquant_mlx.study.results import save, save_study

NAMES = [variant[0] for variant in VARIANTS]


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return write_study(tmp_path_factory.mktemp("study"))


@pytest.fixture(scope="module")
def report(directory):
    return load_report(directory)


@pytest.fixture(scope="module")
def files(directory):
    """Return the JSON files' values by (variant, part)."""
    contents = [json.loads(file.read_text()) for file in directory.glob("*.*.json")]
    return {(content["variant"], content["part"]): content["values"] for content in contents}


def shown(cell):
    return float(cell.replace(",", "").removesuffix(" x"))


def test_numbers_of_the_tables_equal_those_of_the_files(report, files):
    cells = tables(markdown(report))
    base = files["original", "speed"]
    for variant in NAMES:
        name = f"{variant} (reference)" if variant == "original" else variant
        convert, speed = files[variant, "convert"], files[variant, "speed"]
        expected = {
            ("Quality", "bits/weight, linear"): convert["linear_bits_per_weight"],
            ("Quality", "bits/weight"): convert["bits_per_weight"],
            ("Quality", "size, MB"): convert["stored_bytes"] / 1e6,
            ("Speed", "decode, tokens/s"): speed["decode_tokens_per_s"],
            ("Speed", "decode, ratio"): speed["decode_tokens_per_s"] / base["decode_tokens_per_s"],
            ("Speed", "prefill, tokens/s"): speed["prefill_tokens_per_s"],
            ("Speed", "prefill, ratio"): (
                speed["prefill_tokens_per_s"] / base["prefill_tokens_per_s"]
            ),
            ("Speed", "load, s"): speed["load_s"],
            ("Speed", "first token, s"): speed["first_token_s"],
            ("Speed", "peak memory, MB"): speed["peak_bytes"] / 1e6,
        }
        if variant != "original":
            kl = files[variant, "kl"]
            expected["Quality", "KL, nats"] = kl["kl_mean"]
            expected["KL divergence", "95 % from"] = kl["kl_low"]
            expected["KL divergence", "95 % to"] = kl["kl_high"]
            expected["KL divergence", "99th percentile"] = kl["kl_p99"]
            expected["Quality", "top-1, %"] = kl["top1_agreement"] * 100
            expected["Conversion", "time, s"] = convert["seconds"]["total"]
            expected["Conversion", "peak memory, MB"] = convert["peak_bytes"] / 1e6
        for (title, heading), value in expected.items():
            assert shown(cells[title][name][heading]) == pytest.approx(value, rel=5e-3), heading


def test_accuracy_and_perplexity_have_standard_errors(report, files):
    cells = tables(markdown(report))
    for variant in NAMES[1:]:
        values = files[variant, "arc_challenge.loglikelihood"]
        cell = cells["ARC"][variant]["ARC-C norm, %"]
        value, error = (float(text) for text in cell.split(" ± "))
        assert value == pytest.approx(100 * sum(values["correct_norm"]) / QUESTIONS, abs=0.051)
        assert error == pytest.approx(100 * values["standard_error_norm"], abs=0.051)
        value, error = cells["Quality"][variant]["perplexity"].split(" ± ")
        values = files[variant, "perplexity"]
        assert shown(value) == pytest.approx(values["perplexity"], rel=5e-3)
        assert shown(error) == pytest.approx(values["standard_error"], abs=0.005)


def test_p_is_that_of_an_exact_binomial_test_against_the_reference(report, files):
    cells = tables(markdown(report))["ARC"]
    first = np.array(files["original", "arc_challenge.letter"]["correct"])
    for variant in NAMES[1:]:
        second = np.array(files[variant, "arc_challenge.letter"]["correct"])
        lost, won = int((first > second).sum()), int((first < second).sum())
        p = binomtest(won, won + lost).pvalue if won + lost else 1.0
        cell = cells[variant]["ARC-C letter, p"]
        assert cell == "< 0.001" if p < 0.001 else shown(cell) == pytest.approx(p, abs=5e-4)


@pytest.mark.parametrize("differing", ["fewer", "other ids", "other shots"])
def test_p_is_missing_if_the_questions_differ(report, differing):
    def change(record):
        if (record.variant, record.part) != ("rtn-4-g64", "arc_challenge.letter"):
            return record
        if differing == "other ids":
            return dataclasses.replace(record, settings={"questions": ["a", "b"]})
        values = {**record.values, "num_shots": 5}
        if differing == "fewer":
            values = {**record.values, "questions": 10, "correct": record.values["correct"][:10]}
        return dataclasses.replace(record, values=values)

    changed = build_report(report.study, map(change, report.results))
    cells = tables(markdown(changed))["ARC"]
    assert cells["rtn-4-g64"]["ARC-C letter, p"] == "-"
    assert cells["rtn-5-g64"]["ARC-C letter, p"] != "-"


def test_rows_are_sorted_by_size_then_by_study_order():
    measurements = [result(name, "kl", {"kl_mean": 1.0}) for name in ("c", "z", "a", "b")]
    sizes = {"b": 30, "big": 20, "small": 10}
    values = {"method": "rtn", "bits_per_weight": 4.5}
    measurements += [
        result(name, "convert", {**values, "stored_bytes": size}) for name, size in sizes.items()
    ]
    rows = build_report(study(order=("z", "absent", "b")), measurements).rows
    assert [row.variant for row in rows] == ["small", "big", "b", "z", "a", "c"]


def test_results_of_an_earlier_version_of_the_study_are_omitted(tmp_path):
    """Recipe, model, text and variants of a study may change between two runs."""
    now, before = "2025-06-01T12:00:00+00:00", "2025-05-01T12:00:00+00:00"

    def measured(variant, part, created=now, bits=4, **settings):
        values = {"method": "rtn", "bits_per_weight": 4.5, "stored_bytes": 10}
        values = {"kl": {"kl_mean": 1}, "perplexity": {"perplexity": 2}}.get(part, values)
        settings = {"model_hash": "m", "recipe": {"bits": bits}, **settings}
        save(result(variant, part, values, settings=settings, created=created), tmp_path)

    for variant in ("a", "b", "gone"):
        measured(variant, "convert")
        measured(variant, "perplexity", text="new")
    measured("a", "kl", before, bits=3)
    measured("b", "perplexity", before, text="old")
    measured("of another model", "convert", before, model_hash="other")
    save_study(study(order=("a", "b", "of another model")), tmp_path)
    report = load_report(tmp_path)
    shown = {row.variant: set(row.values) for row in report.rows}
    assert shown == {"a": {"convert", "perplexity"}, "b": {"convert"}}
    assert "5 measurements" in markdown(report)


def test_arc_columns_with_large_standard_errors_are_omitted(report):
    assert "ARC-C norm, %" in tables(markdown(report))["ARC"]["rtn-4-g64"]

    def change(record):
        if record.part != "arc_challenge.loglikelihood" or record.variant != "rtn-4-g64":
            return record
        return dataclasses.replace(record, values={**record.values, "standard_error_norm": 0.026})

    text = markdown(build_report(report.study, map(change, report.results)))
    headings = tables(text)["ARC"]["rtn-4-g64"].keys()
    assert "ARC-C, %" in headings and "ARC-C norm, %" not in headings
    assert "Measured, not shown (a standard error over 2.5 points): ARC-C norm." in text


point = st.tuples(st.integers(0, 6), st.integers(0, 6))


@given(st.lists(st.none() | point))
def test_pareto_front_equals_brute_force(points):
    def dominated(p):
        return any(
            q is not None and q[0] <= p[0] and q[1] <= p[1] and (q[0] < p[0] or q[1] < p[1])
            for q in points
        )

    assert pareto_front(points) == [p is not None and not dominated(p) for p in points]


def test_stars_mark_the_front(report):
    starred = [name for name, row in tables(markdown(report))["Quality"].items() if row["★"]]
    assert starred == [
        *("rtn-3-g64", "imatrix-3-g64", "gptq-3-g64", "gptq-4-g64", "imatrix-4-g32"),
        *("gptq-5-g64", "rtn-8-g64"),
    ]


def test_split_variants_are_compared_with_their_rtn_counterparts(report, files):
    cells = tables(markdown(report))
    for split, plain in (
        ("splitquant-4-tensor", "rtn-4-tensor"),
        ("splitquant-4-g64", "rtn-4-g64"),
    ):
        row = cells["Split against plain"][f"{split} / {plain}"]
        ratios = {
            "KL, ratio": ("kl", "kl_mean"),
            "size, ratio": ("convert", "stored_bytes"),
            "decode, ratio": ("speed", "decode_tokens_per_s"),
        }
        for heading, (part, name) in ratios.items():
            expected = files[split, part][name] / files[plain, part][name]
            assert shown(row[heading]) == pytest.approx(expected, rel=5e-3)
        assert row["smaller and closer"] == "rtn-8-g64"
        first, second = (files[name, "arc_challenge.loglikelihood"] for name in (split, plain))
        expected = (sum(first["correct"]) - sum(second["correct"])) / QUESTIONS * 100
        gained, p_text = row["ARC-C, points"].rstrip(")").split(" (p ")
        assert float(gained) == pytest.approx(expected, abs=0.051)
        won, lost = (
            sum(a > b for a, b in zip(x["correct"], y["correct"], strict=True))
            for x, y in ((first, second), (second, first))
        )
        p = binomtest(won, won + lost).pvalue
        assert p_text == "< 0.001" if p < 0.001 else float(p_text) == pytest.approx(p, abs=5e-4)


def test_the_counterpart_has_the_same_group_size():
    measurements = [
        result(
            name,
            "convert",
            {
                **{"method": method, "bits_per_weight": 5.0, "stored_bytes": 10, "seconds": {}},
                **{"bits": 4, "granularity": "group", "clusters": clusters},
            },
            settings={"recipe": {"group_size": group_size}},
        )
        for name, method, group_size, clusters in (
            ("rtn-g32", "rtn", 32, None),
            ("rtn-g64", "rtn", 64, None),
            ("split-g64", "splitquant", 64, 3),
            ("split-g128", "splitquant", 128, 3),
        )
    ]
    report = build_report(study(), measurements)
    counterparts = {row.variant: report.rtn_counterpart(row) for row in report.rows if row.is_split}
    assert counterparts["split-g64"].variant == "rtn-g64"
    assert counterparts["split-g128"] is None


def test_missing_parts_are_dashes(report):
    gone = {("rtn-4-g64", "kl"), ("rtn-4-g64", "perplexity"), ("rtn-4-g64", "convert")}
    fewer = [record for record in report.results if (record.variant, record.part) not in gone]
    row = tables(markdown(build_report(report.study, fewer)))["Quality"]["rtn-4-g64"]
    assert {row[name] for name in row if name not in ("variant", "★")} == {"-"}
    assert row["★"] == ""


@pytest.mark.parametrize("part", sorted({record.part for record in results()} - {"weights"}))
def test_a_single_part_makes_a_report(part):
    report = build_report(study(), [record for record in results() if record.part == part])
    assert "rtn-4-g64" in markdown(report)


def test_non_finite_values_are_shown_and_never_on_the_front():
    measurements = [
        result(name, part, values)
        for name, kl in (("a", math.inf), ("b", math.nan), ("c", 0.5))
        for part, values in {
            "kl": {"kl_mean": kl},
            "convert": {
                **{"method": "rtn", "bits_per_weight": 4.5, "linear_bits_per_weight": 4.5},
                **{"stored_bytes": 10**6, "seconds": {}},
            },
        }.items()
    ]
    cells = tables(markdown(build_report(study(paper=None), measurements)))["Quality"]
    assert [cells[name]["KL, nats"] for name in "abc"] == ["inf", "nan", "0.500"]
    assert [cells[name]["★"] for name in "abc"] == ["", "", "★"]


@pytest.mark.parametrize("width", [80, 100, 200])
def test_terminal_shows_the_same_cells_within_its_width(report, width):
    console = Console(width=width, record=True, file=StringIO())
    for table in terminal(report):
        console.print(table)
    text = console.export_text()
    assert max(map(len, text.splitlines())) <= width
    for rows in tables(markdown(report)).values():
        for cell in rows.get("rtn-5-g64", {}).values():
            assert cell in text
    assert "…" not in text


def test_markup_and_control_characters_are_escaped():
    name = "[red]x[/] | `rm` <b>&amp; *y*"
    notes = ("one\x1b[2Jtwo\nthree",)
    report = build_report(study(notes=notes, title="a\x07b"), [result(name, "kl", {"kl_mean": 1})])
    text = markdown(report)
    assert all(c.isprintable() or c == "\n" for c in text)
    assert r"\[red\]x\[/\] \| \`rm\` \<b\>\&amp; \*y\*" in text
    console = Console(width=200, record=True, file=StringIO())
    console.print(terminal(report)[0])
    assert name in console.export_text()


def test_output_does_not_depend_on_the_order_of_the_files(report):
    reordered = build_report(report.study, reversed(report.results))
    assert markdown(reordered) == markdown(report)


@given(st.floats(allow_nan=False, allow_infinity=False), st.integers(1, 6))
def test_significant_rounds_to_the_digits(value, digits):
    text = significant(value, digits).replace(",", "")
    assert float(text) == pytest.approx(float(f"{value:.{digits - 1}e}"), rel=1e-12)


def test_published_figures_have_a_separate_table(report):
    cells = tables(markdown(report))["Published figures (arXiv:2503.07657), not measured here"]
    assert cells["split and INT4 on an Apple M4 CPU"]["published"] == "126 s"
    assert cells["INT4 with the split above plain INT4, ARC"]["published"] == "11.76 points"
    assert "arXiv" not in markdown(build_report(study(paper=None), report.results))


def test_a_report_needs_neither_mlx_nor_a_model(directory):
    code = (
        "import sys; from pathlib import Path\n"
        "sys.modules.update(dict.fromkeys(('mlx', 'mlx.core', 'mlx_lm', 'transformers')))\n"
        "from splitquant_mlx.report import html, load_report, markdown\n"
        "report = load_report(Path(sys.argv[1]))\n"
        "assert markdown(report) and html(report)\n"
    )
    subprocess.run([sys.executable, "-c", code, directory], check=True)
