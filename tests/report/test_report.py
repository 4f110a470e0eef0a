"""Tables and findings say what the JSON files say."""

import dataclasses
import json
import math
import re
from io import StringIO

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from made_up_study import QUESTIONS, VARIANTS, result, results, study, tables, write_study
from rich.console import Console
from scipy.stats import binomtest
from sklearn.isotonic import isotonic_regression

from splitquant_mlx.report import build_report, finding, load_report, markdown, terminal
from splitquant_mlx.report.numbers import significant
from splitquant_mlx.report.pareto import pareto_front
from splitquant_mlx.report.scatter import spread
from splitquant_mlx.study.results import Claim, Paper

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


def test_every_number_of_the_tables_is_that_of_the_files(report, files):
    found = tables(markdown(report))
    base = files["original", "speed"]
    for variant in NAMES:
        name = f"{variant} (reference)" if variant == "original" else variant
        convert, speed = files[variant, "convert"], files[variant, "speed"]
        wanted = {
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
            wanted["Quality", "KL, nats"] = kl["kl_mean"]
            wanted["Quality", "top-1, %"] = kl["top1_agreement"] * 100
            wanted["Conversion", "time, s"] = convert["seconds"]["total"]
            wanted["Conversion", "peak memory, MB"] = convert["peak_bytes"] / 1e6
        for (title, heading), value in wanted.items():
            assert shown(found[title][name][heading]) == pytest.approx(value, rel=5e-3), heading


def test_accuracy_and_perplexity_come_with_their_errors(report, files):
    found = tables(markdown(report))
    for variant in NAMES[1:]:
        values = files[variant, "arc_challenge.loglikelihood"]
        cell = found["ARC Challenge"][variant]["ARC-C norm, %"]
        value, error = (float(text) for text in cell.split(" ± "))
        assert value == pytest.approx(100 * sum(values["correct_norm"]) / QUESTIONS, abs=0.051)
        assert error == pytest.approx(100 * values["standard_error_norm"], abs=0.051)
        value, error = found["Quality"][variant]["perplexity"].split(" ± ")
        wanted = files[variant, "perplexity"]
        assert shown(value) == pytest.approx(wanted["perplexity"], rel=5e-3)
        assert shown(error) == pytest.approx(wanted["standard_error"], abs=0.005)


def test_p_is_the_binomial_one_against_the_reference(report, files):
    cells = tables(markdown(report))["ARC Challenge"]
    first = np.array(files["original", "arc_challenge.letter"]["correct"])
    for variant in NAMES[1:]:
        own = np.array(files[variant, "arc_challenge.letter"]["correct"])
        lost, won = int((first > own).sum()), int((first < own).sum())
        p = binomtest(won, won + lost).pvalue if won + lost else 1.0
        cell = cells[variant]["ARC-C letter, p"]
        assert cell == "< 0.001" if p < 0.001 else shown(cell) == pytest.approx(p, abs=5e-4)


@pytest.mark.parametrize("differing", ["fewer", "other ids", "other shots"])
def test_p_is_left_out_where_the_questions_differ(report, differing):
    def change(made):
        if (made.variant, made.part) != ("rtn-4-g64", "arc_challenge.letter"):
            return made
        if differing == "other ids":
            return dataclasses.replace(made, settings={"questions": ["a", "b"]})
        values = {**made.values, "num_shots": 5}
        if differing == "fewer":
            values = {**made.values, "questions": 10, "correct": made.values["correct"][:10]}
        return dataclasses.replace(made, values=values)

    changed = build_report(report.study, map(change, report.results))
    cells = tables(markdown(changed))["ARC Challenge"]
    assert cells["rtn-4-g64"]["ARC-C letter, p"] == "-"
    assert cells["rtn-5-g64"]["ARC-C letter, p"] != "-"


def test_rows_follow_the_study_then_the_alphabet():
    made = [result(name, "kl", {"kl_mean": 1.0}) for name in ("c", "z", "a", "b")]
    rows = build_report(study(order=("z", "absent", "b")), made).rows
    assert [row.variant for row in rows] == ["z", "b", "a", "c"]


point = st.tuples(st.integers(0, 6), st.integers(0, 6))


@given(st.lists(st.none() | point))
def test_pareto_front_is_what_brute_force_finds(points):
    def beaten(p):
        return any(
            q is not None and q[0] <= p[0] and q[1] <= p[1] and (q[0] < p[0] or q[1] < p[1])
            for q in points
        )

    assert pareto_front(points) == [p is not None and not beaten(p) for p in points]


def test_stars_mark_the_front(report):
    starred = [name for name, row in tables(markdown(report))["Quality"].items() if row["★"]]
    assert starred == [
        *("rtn-3-g64", "imatrix-3-g64", "gptq-3-g64", "gptq-4-g64", "imatrix-4-g32"),
        *("gptq-5-g64", "rtn-8-g64"),
    ]


@settings(deadline=None)  # the first example imports the oracle
@given(
    wanted=st.lists(st.floats(-2, 3), min_size=1, max_size=30),
    gap=st.floats(0.001, 0.2),
    low=st.floats(-1, 0),
)
def test_labels_do_not_overlap_and_move_least(wanted, gap, low):
    wanted = sorted(wanted)
    places = np.array(spread(wanted, gap, low, 1.0))
    assert (np.diff(places) >= gap - 1e-9).all()
    assert places[0] >= low - 1e-9
    room = (len(wanted) - 1) * gap <= 1.0 - low
    assert not room or places[-1] <= 1.0 + 1e-9
    steps = np.arange(len(wanted)) * gap
    top = max(1.0 - steps[-1], low)
    oracle = isotonic_regression(np.array(wanted) - steps, y_min=low, y_max=top) + steps
    assert places == pytest.approx(oracle, abs=1e-6)


def test_finding_names_the_best_under_five_bits(report):
    told = finding(report).headline
    assert "At or under 5 bits/weight in the linear layers, imatrix-4-g32 stays closest" in told
    assert "KL 0.0830 nats at 5.00 bits/weight" in told and "(rtn-4-g64) is at 0.398" in told


def test_finding_tells_what_the_split_gives_costs_and_loses_to(report, files):
    gain, against = finding(report).details
    pair = ("splitquant-4-g64", "rtn-4-g64")
    assert gain.startswith("splitquant-4-g64 against rtn-4-g64 ")
    assert "KL 0.0473 instead of 0.398 nats" in gain
    for part, name, what in (
        ("convert", "stored_bytes", "bytes"),
        ("speed", "decode_tokens_per_s", "tokens/s"),
    ):
        split, plain = (files[variant, part][name] for variant in pair)
        assert shown(re.search(rf"([\d.]+) x the {what}", gain)[1]) == pytest.approx(
            split / plain, rel=5e-3
        )
    split, plain = (files[variant, "arc_challenge.letter"]["accuracy"] for variant in pair)
    assert f"ARC-C letter {(split - plain) * 100:+.1f} points (p" in gain
    assert "rtn-8-g64 is both smaller (168 instead of 235 MB) and closer (KL 0.00120" in against
    assert "2 of 2 split variants are beaten" in against


def test_every_split_is_compared_with_its_unsplit_twin(report, files):
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
            wanted = files[split, part][name] / files[plain, part][name]
            assert shown(row[heading]) == pytest.approx(wanted, rel=5e-3)
        assert row["smaller and closer"] == "rtn-8-g64"
        row = cells["Split against plain on ARC"][f"{split} / {plain}"]
        first, second = (files[name, "arc_challenge.loglikelihood"] for name in (split, plain))
        wanted = (sum(first["correct"]) - sum(second["correct"])) / QUESTIONS * 100
        assert float(row["ARC-C, points"]) == pytest.approx(wanted, abs=0.051)
        won, lost = (
            sum(a > b for a, b in zip(x["correct"], y["correct"], strict=True))
            for x, y in ((first, second), (second, first))
        )
        p = binomtest(won, won + lost).pvalue
        assert row["ARC-C, p"] == "< 0.001" if p < 0.001 else float(row["ARC-C, p"]) == p


def test_twin_has_the_same_group_size():
    made = [
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
    report = build_report(study(), made)
    twins = {row.variant: report.twin(row) for row in report.rows if row.is_split}
    assert twins["split-g64"].variant == "rtn-g64"
    assert twins["split-g128"] is None


def test_finding_admits_when_nothing_beats_the_split(report):
    rivals = ("rtn-8-g64", "rtn-6-g64", "gptq-5-g64")
    fewer = [made for made in report.results if made.variant not in rivals]
    details = finding(build_report(report.study, fewer)).details
    assert "No plain variant here is both smaller and closer than splitquant-4-g64." in details


def test_finding_does_not_boast_without_rivals(report):
    fewer = [made for made in report.results if made.variant in ("original", "splitquant-4-g64")]
    assert finding(build_report(report.study, fewer)).details == ()


def test_claims_of_int4_are_compared_with_four_bits(report):
    claims = tuple(Claim(what=f"time of INT{n}", value=n, unit="s") for n in (4, 8))
    paper = Paper(source="a paper", claims=claims)
    cells = tables(markdown(build_report(study(paper=paper), report.results)))
    claimed = cells["What the paper states (a paper)"]
    assert "splitquant-4-tensor: " in claimed["time of INT4"]["measured here"]
    assert claimed["time of INT8"]["measured here"] == "-"
    beside = {name: row["the paper's time, s"] for name, row in cells["Conversion"].items()}
    assert beside["splitquant-4-tensor"] == "4.00" and beside["rtn-4-g64"] == "-"


def test_two_claimed_times_are_not_mixed_up(report):
    claims = tuple(Claim(what=f"time {n}", value=n, unit="s") for n in (1, 2))
    paper = Paper(source="a paper", claims=claims)
    cells = tables(markdown(build_report(study(paper=paper), report.results)))
    assert "the paper's time, s" not in cells["Conversion"]["splitquant-4-g64"]


@pytest.mark.parametrize(
    ("kept", "told"),
    [
        ({"convert", "arc_challenge.letter"}, "answers most of ARC-C letter right"),
        ({"convert"}, "Nothing was measured yet"),
    ],
)
def test_finding_does_without_kl(report, kept, told):
    fewer = [made for made in report.results if made.part in kept]
    assert told in finding(build_report(report.study, fewer)).headline


def test_missing_parts_are_dashes(report):
    gone = {("rtn-4-g64", "kl"), ("rtn-4-g64", "perplexity"), ("rtn-4-g64", "convert")}
    fewer = [made for made in report.results if (made.variant, made.part) not in gone]
    row = tables(markdown(build_report(report.study, fewer)))["Quality"]["rtn-4-g64"]
    assert {row[name] for name in row if name not in ("variant", "★")} == {"-"}
    assert row["★"] == ""


@pytest.mark.parametrize("part", sorted({made.part for made in results()} - {"weights"}))
def test_one_part_alone_makes_a_report(part):
    report = build_report(study(), [made for made in results() if made.part == part])
    assert finding(report).headline
    assert "rtn-4-g64" in markdown(report)


def test_what_is_not_finite_is_shown_and_never_best():
    made = [
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
    cells = tables(markdown(build_report(study(paper=None), made)))["Quality"]
    assert [cells[name]["KL, nats"] for name in "abc"] == ["inf", "nan", "0.500"]
    assert [cells[name]["★"] for name in "abc"] == ["", "", "★"]


def test_the_papers_figures_are_marked_and_stand_beside_ours(report, files):
    cells = tables(markdown(report))
    claims = cells["What the paper states (arXiv:2503.07657)"]
    time = claims["split and INT4 on an Apple M4 CPU"]
    assert time["the paper's figure"] == "126 s"
    ours = files["splitquant-4-g64", "convert"]["seconds"]["total"]
    assert f"splitquant-4-g64: {ours:.3g} s" in time["measured here"]
    points = claims["INT4 with the split above plain INT4, ARC"]
    assert points["the paper's figure"] == "11.76 points"
    assert "splitquant-4-tensor over rtn-4-tensor: ARC-C +" in points["measured here"]
    claimed = {name: row["the paper's time, s"] for name, row in cells["Conversion"].items()}
    assert claimed["splitquant-4-g64"] == "126" and claimed["rtn-4-g64"] == "-"
    assert "arXiv" not in markdown(build_report(study(paper=None), report.results))


@pytest.mark.parametrize("width", [80, 100, 200])
def test_terminal_shows_the_same_cells_in_its_width(report, width):
    console = Console(width=width, record=True, file=StringIO())
    for table in terminal(report):
        console.print(table)
    text = console.export_text()
    assert max(map(len, text.splitlines())) <= width
    for rows in tables(markdown(report)).values():
        for cell in rows.get("rtn-5-g64", {}).values():
            assert cell in text
    assert "…" not in text


def test_markup_and_control_characters_are_text():
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
    turned = build_report(report.study, reversed(report.results))
    assert markdown(turned) == markdown(report)


@given(st.floats(allow_nan=False, allow_infinity=False), st.integers(1, 6))
def test_significant_digits_are_kept(value, digits):
    text = significant(value, digits).replace(",", "")
    assert float(text) == pytest.approx(float(f"{value:.{digits - 1}e}"), rel=1e-12)
