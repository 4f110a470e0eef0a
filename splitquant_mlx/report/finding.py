"""Say in sentences what the results show, for the split and against it."""

import re
from dataclasses import dataclass

from splitquant_mlx.report.numbers import (
    MISSING,
    decimals,
    megabytes,
    percent,
    probability,
    ratio,
    significant,
    times,
)
from splitquant_mlx.report.rows import ARC, Report, Row, p_value, points
from splitquant_mlx.study.results import Claim

FEW_BITS = 5.0
USUAL_BITS = 4  # what the method was published for
SECONDS = ("s", "seconds")
POINTS = ("points", "percentage points")


@dataclass(frozen=True, kw_only=True)
class Finding:
    """Hold the finding: one sentence, then what the split gives and what speaks against it."""

    headline: str
    details: tuple[str, ...]


def finding(report: Report) -> Finding:
    """Return what the results show, in sentences made of their figures."""
    split = [row for row in report.rows if row.is_split]
    close = [(row.size_and_distance[1], row) for row in split if row.size_and_distance]
    paired = [(kl, row) for kl, row in close if report.twin(row)] or close
    usual = [(kl, row) for kl, row in paired if row.bits == USUAL_BITS] or paired
    best = min(usual, key=lambda pair: pair[0])[1] if usual else next(iter(split), None)
    details = (_gain(report, best), _against(report, best, split)) if best else ()
    return Finding(headline=_headline(report), details=tuple(filter(None, details)))


def claims(report: Report) -> tuple[tuple[str, str, str], ...]:
    """Return (what, the paper's figure, ours): ours are conversion times and gains on ARC."""
    if report.study.paper is None:
        return ()
    return tuple(
        (claim.what, f"{claim.value:,g} {claim.unit}", _ours(report, claim))
        for claim in report.study.paper.claims
    )


def paper_seconds(report: Report, row: Row) -> float | None:
    """Return the conversion time that the paper claims for what `row` is, s; None unless one."""
    found = report.study.paper.claims if report.study.paper else ()
    times_s = [claim.value for claim in found if claim.unit in SECONDS and _is_about(claim, row)]
    return times_s[0] if len(times_s) == 1 else None


def _is_about(claim: Claim, row: Row) -> bool:
    """Tell whether a claim is about a split variant: of the bits it names (INT4), or of any."""
    named = re.search(r"INT(\d)", claim.what)
    return row.is_split and (named is None or row.bits == int(named[1]))


def _headline(report: Report) -> str:
    measured = [(row.size_and_distance[1], row) for row in report.rows if row.size_and_distance]
    few = [
        (kl, row) for kl, row in measured if (row.linear_bits_per_weight or 99.0) <= FEW_BITS
    ]  # fmt: skip
    if not measured:
        return _headline_without_kl(report)
    kl, best = min(few or measured, key=lambda pair: pair[0])
    where = (
        f"At or under {FEW_BITS:g} bits/weight in the linear layers" if few else "Of all variants"
    )
    text = f"{where}, {best.variant} stays closest to the original: KL {significant(kl)} nats"
    if best.linear_bits_per_weight is not None:
        text += f" at {decimals(best.linear_bits_per_weight, 2)} bits/weight"
    plain = [(other, row) for other, row in few if row.method == "rtn"]
    if best.method == "rtn" or not plain:
        return f"{text}."
    other, row = min(plain, key=lambda pair: pair[0])
    return f"{text}, where plain rounding ({row.variant}) is at {significant(other)}."


def _headline_without_kl(report: Report) -> str:
    for heading, _, _ in ARC:
        found = [
            (row.accuracies[heading].value, row)
            for row in report.rows
            if heading in row.accuracies and not row.is_reference
        ]
        if found:
            share, best = max(found, key=lambda pair: pair[0])
            return f"{best.variant} answers most of {heading} right: {percent(share)} %."
    return "Nothing was measured yet that tells the variants apart."


def _gain(report: Report, row: Row) -> str:
    twin = report.twin(row)
    if twin is None:
        return ""
    gains = []
    if row.kl is not None and twin.kl is not None:
        gains.append(f"KL {significant(row.kl)} instead of {significant(twin.kl)} nats")
    gains += _points(row, twin)
    if not gains:
        return ""
    costs = []
    if (size := ratio(row.stored_bytes, twin.stored_bytes)) is not None:
        costs.append(f"{times(size)} the bytes")
    if (speed := ratio(row.decode_tokens_per_s, twin.decode_tokens_per_s)) is not None:
        costs.append(f"{times(speed)} the tokens/s")
    price = f", at {' and '.join(costs)}" if costs else ""
    versus = f"{row.variant} against {twin.variant} (as many bits a code, not split)"
    return f"{versus}: {', '.join(gains)}{price}."


def _points(row: Row, twin: Row) -> list[str]:
    found = []
    for heading, _, ending in ARC:
        if ending:
            continue  # normalized scores are in the table; a sentence has room for one of the two
        first, second = row.accuracies.get(heading), twin.accuracies.get(heading)
        if first and second:
            p = p_value(first, second)
            said = "" if p is None else f" (p {probability(p)})"
            found.append(f"{heading} {points(first, second)} points{said}")
    return found


def _against(report: Report, row: Row, split: list[Row]) -> str:
    plain = [other for other in report.rows if other.is_plain and other.size_and_distance]
    if row.size_and_distance is None or not plain:
        return ""
    better = report.better_plain(row)
    if better is None:
        return f"No plain variant here is both smaller and closer than {row.variant}."
    beaten = sum(report.better_plain(other) is not None for other in split)
    return (
        f"Against the split: {better.variant} is both smaller ({megabytes(better.stored_bytes)} "
        f"instead of {megabytes(row.stored_bytes)} MB) and closer (KL {significant(better.kl)} "
        f"instead of {significant(row.kl)} nats) than {row.variant}. {beaten} of {len(split)} "
        "split variants are beaten by a plain one in this way."
    )


def _ours(report: Report, claim: Claim) -> str:
    found = []
    for row in report.rows:
        twin = report.twin(row)
        if not _is_about(claim, row):
            continue
        if claim.unit in SECONDS and row.convert_seconds is not None:
            found.append(f"{row.variant}: {significant(row.convert_seconds)} s")
        elif claim.unit in POINTS and twin and (gains := _points(row, twin)):
            found.append(f"{row.variant} over {twin.variant}: {', '.join(gains)}")
    return "; ".join(found) or MISSING
