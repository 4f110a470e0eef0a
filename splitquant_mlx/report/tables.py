"""Tables of a report as text cells, shared by terminal, Markdown and HTML."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

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
from splitquant_mlx.report.rows import MAX_STANDARD_ERROR, Report, Row, p_value

STAR = "★"
Column = tuple[str, Callable[[Any], str]]  # (heading, function of a row that returns the cell)


@dataclass(frozen=True, kw_only=True)
class Table:
    """A table: the first column names the rows, `note` explains the other columns."""

    title: str
    headers: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    note: str = ""
    is_published: bool = False  # figures of a publication


def tables(report: Report) -> list[Table]:
    """Return the tables for which there are results, without empty columns."""
    builders = (_quality, _divergence, _arc, _split_against_plain, _conversion, _speed)
    tables = [table for build in builders if len((table := build(report)).headers) > 1]
    if paper := report.study.paper:
        rows = tuple((claim.what, f"{claim.value:,g} {claim.unit}") for claim in paper.claims)
        title = f"Published figures ({paper.source}), not measured here"
        headers = ("claim", "published")
        tables.append(Table(title=title, headers=headers, rows=rows, is_published=True))
    return tables


def _table(title: str, first: Column, items: Iterable[Any], columns: list[Column], note: str = ""):
    items = list(items)
    cells = {heading: [cell(item) for item in items] for heading, cell in (first, *columns)}
    shown = {
        heading: column
        for heading, column in cells.items()
        if heading == first[0] or set(column) - {MISSING, ""}
    }
    return Table(
        title=title, headers=tuple(shown), rows=tuple(zip(*shown.values(), strict=True)), note=note
    )


def _name(row: Row) -> str:
    return f"{row.variant} (reference)" if row.is_reference else row.variant


VARIANT: Column = ("variant", _name)


def _value(part: str, name: str, format_: Callable[[Any], str]) -> Callable[[Row], str]:
    return lambda row: format_(row.get(part, name))


def _perplexity(row: Row) -> str:
    value, error = (row.get("perplexity", n) for n in ("perplexity", "standard_error"))
    return plus_minus(perplexity(value), perplexity(error))


def _quality(report: Report) -> Table:
    columns: list[Column] = [
        ("size, MB", _value("convert", "stored_bytes", megabytes)),
        ("files, MB", _value("convert", "weight_file_bytes", megabytes)),
        ("bits/weight", _value("convert", "bits_per_weight", partial(decimals, digits=2))),
        (
            "bits/weight, linear",
            _value("convert", "linear_bits_per_weight", partial(decimals, digits=2)),
        ),
        ("KL, nats", _value("kl", "kl_mean", significant)),
        ("top-1, %", _value("kl", "top1_agreement", percent)),
        ("perplexity", _perplexity),
        (STAR, lambda row: STAR if row.on_front else ""),
    ]
    note = (
        "Size: tensors; files: weight files. Bits/weight: stored bits / parameters of the "
        "original. KL: mean divergence from the reference per token; top-1: tokens with the same "
        f"most likely token. ±: standard error. {STAR}: on the Pareto front of size and KL."
    )
    return _table("Quality", VARIANT, report.rows, columns, note)


def _divergence(report: Report) -> Table:
    names = {
        "mean": "kl_mean",
        "95 % from": "kl_low",
        "95 % to": "kl_high",
        "median": "kl_median",
        "99th percentile": "kl_p99",
    }
    columns = [(heading, _value("kl", name, significant)) for heading, name in names.items()]
    note = "Nats per token. 95 %: confidence interval of the mean, bootstrapped over text windows."
    return _table("KL divergence", VARIANT, report.rows, columns, note)


def _arc(report: Report) -> Table:
    columns: list[Column] = []
    for heading, is_shown in report.arc_headings.items():
        if is_shown:
            columns.append((f"{heading}, %", partial(_share, heading)))
            columns.append((f"{heading}, p", partial(_p, report.reference, heading)))
    note = (
        "Correct answers ± standard error; norm: log-likelihood per character; letter: the model "
        "answers with a letter. p: McNemar's exact two-sided test against the reference."
    )
    return _table("ARC", VARIANT, report.rows, columns, note)


def omitted_note(report: Report) -> str:
    """Return a note on the ARC columns omitted for their large standard errors; "" if none are."""
    names = ", ".join(heading for heading, is_shown in report.arc_headings.items() if not is_shown)
    limit = f"over {MAX_STANDARD_ERROR * 100:g} points"
    return f"Measured, not shown (a standard error {limit}): {names}." if names else ""


def _share(heading: str, row: Row) -> str:
    if (accuracy := row.accuracies.get(heading)) is None:
        return MISSING
    return plus_minus(percent(accuracy.value), percent(accuracy.standard_error))


def _p(reference: Row | None, heading: str, row: Row) -> str:
    if reference is None or row.is_reference:
        return MISSING
    return probability(p_value(row.accuracies.get(heading), reference.accuracies.get(heading)))


def _split_against_plain(report: Report) -> Table:
    """Return the values of each split variant relative to its rtn counterpart."""
    pairs = [(row, p) for row in report.rows if row.is_split and (p := report.rtn_counterpart(row))]

    def relative(part: str, name: str) -> Callable[[tuple[Row, Row]], str]:
        return lambda pair: times(ratio(pair[0].get(part, name), pair[1].get(part, name)))

    def dominating(pair: tuple[Row, Row]) -> str:
        row = report.dominating_plain_variant(pair[0])
        return row.variant if row else MISSING

    columns: list[Column] = [
        ("KL, ratio", relative("kl", "kl_mean")),
        ("size, ratio", relative("convert", "stored_bytes")),
        ("decode, ratio", relative("speed", "decode_tokens_per_s")),
        ("smaller and closer", dominating),
    ]
    for heading, is_shown in report.arc_headings.items():
        if is_shown:
            columns.append((f"{heading}, points", partial(_points, heading)))
    note = (
        "Ratio: split variant / rtn variant with the same bits per code. Smaller and closer: the "
        "unsplit variant of lowest KL that is better in size and KL. Points: percentage points "
        "gained (p: McNemar's exact test of the pair)."
    )
    first = ("split / plain", lambda pair: f"{pair[0].variant} / {pair[1].variant}")
    return _table("Split against plain", first, pairs, columns, note)


def _points(heading: str, pair: tuple[Row, Row]) -> str:
    split, plain = (row.accuracies.get(heading) for row in pair)
    if split is None or plain is None:
        return MISSING
    gained = f"{(split.value - plain.value) * 100:+.1f}"
    p = p_value(split, plain)
    return gained if p is None else f"{gained} (p {probability(p)})"


def _conversion(report: Report) -> Table:
    columns: list[Column] = [
        ("time, s", lambda row: significant((row.get("convert", "seconds") or {}).get("total"))),
        ("peak memory, MB", _value("convert", "peak_bytes", megabytes)),
    ]
    return _table("Conversion", VARIANT, report.rows, columns)


def _speed(report: Report) -> Table:
    base = report.speed_baseline

    def relative(name: str) -> Callable[[Row], str]:
        return lambda row: times(ratio(row.get("speed", name), base and base.get("speed", name)))

    columns: list[Column] = [
        ("decode, tokens/s", _value("speed", "decode_tokens_per_s", significant)),
        ("decode, ratio", relative("decode_tokens_per_s")),
        ("prefill, tokens/s", _value("speed", "prefill_tokens_per_s", significant)),
        ("prefill, ratio", relative("prefill_tokens_per_s")),
        ("load, s", _value("speed", "load_s", significant)),
        ("first token, s", _value("speed", "first_token_s", significant)),
        ("peak memory, MB", _value("speed", "peak_bytes", megabytes)),
    ]
    note = f"Ratio: to the tokens/s of {base.variant}; higher is faster." if base else ""
    return _table("Speed", VARIANT, report.rows, columns, note)
