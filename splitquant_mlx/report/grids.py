"""Lay a report out as grids of text: what every rendering shows, cell for cell."""

from collections.abc import Callable
from dataclasses import dataclass

from splitquant_mlx.report.finding import paper_seconds
from splitquant_mlx.report.numbers import (
    MISSING,
    decimals,
    megabytes,
    percent,
    perplexity,
    plus_minus,
    probability,
    ratio,
    significant,
    times,
)
from splitquant_mlx.report.rows import ARC, Report, Row, p_value, points

STAR = "★"
Column = tuple[str, Callable[[Row], str]]


@dataclass(frozen=True, kw_only=True)
class Grid:
    """Hold a table: its first column names the rows, `note` explains the others.

    `of_the_paper` says that figures in it are a publication's, not measured here.
    """

    title: str
    headers: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    note: str
    of_the_paper: bool = False


def grids(report: Report) -> list[Grid]:
    """Return the tables that the results allow. Columns without any figure are left out."""
    name = report.reference.variant if report.reference else report.study.reference_variant
    found = [
        _grid(
            report,
            "Quality",
            _quality(),
            "bits/weight: stored bits over the original number of weights, of the linear layers "
            f"and of the whole model. KL and top-1: distance from {name} and share of tokens on "
            f"which both agree. ±: standard error. {STAR}: no other variant is as small and as "
            "close, and better in one of the two.",
        )
    ]
    for start, title in (("ARC-C", "ARC Challenge"), ("ARC-E", "ARC Easy")):
        note = (
            "Right answers ± standard error; norm: likelihood over the answer's length; letter: "
            "the answer's letter is asked for. p: McNemar's exact two-sided test against "
            f"{name} on the same questions."
        )
        found.append(_grid(report, title, _arc(report, start), note))
    found += _pairs(report)
    found.append(_grid(report, "Conversion", _conversion(report), _conversion_note(report)))
    found.append(_grid(report, "Speed", _speed(report), _speed_note(report)))
    return [grid for grid in found if len(grid.headers) > 1]


def _grid(report: Report, title: str, columns: list[Column], note: str) -> Grid:
    names = [_name(row) for row in report.rows]
    cells = {header: [cell(row) for row in report.rows] for header, cell in columns}
    return _of_columns(title, "variant", names, cells, note)


def _of_columns(
    title: str, first: str, names: list[str], columns: dict[str, list[str]], note: str
) -> Grid:
    kept = {header: cells for header, cells in columns.items() if set(cells) - {MISSING, ""}}
    rows = tuple(zip(names, *kept.values(), strict=True))
    return Grid(title=title, headers=(first, *kept), rows=rows, note=note)


def _name(row: Row) -> str:
    return f"{row.variant} (reference)" if row.is_reference else row.variant


def _quality() -> list[Column]:
    return [
        ("bits/weight, linear", lambda row: decimals(row.linear_bits_per_weight, 2)),
        ("bits/weight", lambda row: decimals(row.bits_per_weight, 2)),
        ("size, MB", lambda row: megabytes(row.stored_bytes)),
        ("KL, nats", lambda row: significant(row.kl)),
        ("top-1, %", lambda row: percent(row.top1_agreement)),
        (
            "perplexity",
            lambda row: plus_minus(perplexity(row.perplexity), perplexity(row.perplexity_error)),
        ),
        (STAR, lambda row: STAR if row.on_front else ""),
    ]


def _arc(report: Report, start: str) -> list[Column]:
    columns: list[Column] = []
    for heading in (heading for heading, _, _ in ARC if heading.startswith(start)):
        columns.append((f"{heading}, %", lambda row, heading=heading: _share(row, heading)))
        columns.append((f"{heading}, p", lambda row, heading=heading: _p(report, row, heading)))
    return columns


def _share(row: Row, heading: str) -> str:
    found = row.accuracies.get(heading)
    return plus_minus(percent(found.value), percent(found.standard_error)) if found else MISSING


def _p(report: Report, row: Row, heading: str) -> str:
    if row.is_reference or report.reference is None:
        return MISSING
    return probability(
        p_value(row.accuracies.get(heading), report.reference.accuracies.get(heading))
    )


def _pairs(report: Report) -> list[Grid]:
    """Return what the split changes, for each split variant that has an unsplit twin."""
    pairs = [(row, twin) for row in report.rows if row.is_split and (twin := report.twin(row))]
    names = [f"{row.variant} / {twin.variant}" for row, twin in pairs]

    def relative(name: str) -> list[str]:
        return [times(ratio(getattr(row, name), getattr(twin, name))) for row, twin in pairs]

    better = [report.better_plain(row) for row, _ in pairs]
    changes = {
        "KL, ratio": relative("kl"),
        "size, ratio": relative("stored_bytes"),
        "decode, ratio": relative("decode_tokens_per_s"),
        "smaller and closer": [row.variant if row else MISSING for row in better],
    }
    gains: dict[str, list[str]] = {}
    for heading, _, ending in ARC:
        found = [(a.accuracies.get(heading), b.accuracies.get(heading)) for a, b in pairs]
        if not ending:
            gains[f"{heading}, points"] = [points(a, b) if a and b else MISSING for a, b in found]
            gains[f"{heading}, p"] = [probability(p_value(a, b)) for a, b in found]
    note = (
        "What the split changes: its figure over that of plain rounding with as many bits a code. "
        "Smaller and closer: the closest plain variant that is as small and as close, and better "
        "in one of the two."
    )
    return [
        _of_columns("Split against plain", "split / plain", names, changes, note),
        _of_columns(
            "Split against plain on ARC",
            "split / plain",
            names,
            gains,
            "Percentage points gained by the split. p: McNemar's exact two-sided test of the pair.",
        ),
    ]


def _conversion(report: Report) -> list[Column]:
    return [
        ("time, s", lambda row: significant(row.convert_seconds)),
        ("the paper's time, s", lambda row: significant(paper_seconds(report, row))),
        ("peak memory, MB", lambda row: megabytes(row.convert_peak_bytes)),
    ]


def _conversion_note(report: Report) -> str:
    paper = report.study.paper
    if paper is None or all(paper_seconds(report, row) is None for row in report.rows):
        return ""
    return f"The paper's time is stated by {paper.source}, for its own model and machine."


def _speed(report: Report) -> list[Column]:
    base = report.yardstick

    def relative(row: Row, name: str) -> str:
        return times(ratio(getattr(row, name), base and getattr(base, name)))

    return [
        ("decode, tokens/s", lambda row: significant(row.decode_tokens_per_s)),
        ("decode, ratio", lambda row: relative(row, "decode_tokens_per_s")),
        ("prefill, tokens/s", lambda row: significant(row.prefill_tokens_per_s)),
        ("prefill, ratio", lambda row: relative(row, "prefill_tokens_per_s")),
        ("load, s", lambda row: significant(row.load_s)),
        ("first token, s", lambda row: significant(row.first_token_s)),
        ("peak memory, MB", lambda row: megabytes(row.run_peak_bytes)),
    ]


def _speed_note(report: Report) -> str:
    base = report.yardstick
    return f"ratio: tokens/s over those of {base.variant}, more is faster." if base else ""
