"""Gather a study's results into one row for each variant. Everything here is pure but the load."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from splitquant_mlx.report.pareto import dominates, pareto_front
from splitquant_mlx.study.results import Result, StudyRecord, load_results, load_study_record

# heading, part, ending of the entries' names
ARC = (
    ("ARC-C", "arc_challenge.loglikelihood", ""),
    ("ARC-C norm", "arc_challenge.loglikelihood", "_norm"),
    ("ARC-C letter", "arc_challenge.letter", ""),
    ("ARC-E", "arc_easy.loglikelihood", ""),
    ("ARC-E norm", "arc_easy.loglikelihood", "_norm"),
    ("ARC-E letter", "arc_easy.letter", ""),
)


@dataclass(frozen=True, kw_only=True)
class Accuracy:
    """Hold a share of right answers, with each answer.

    Attributes:
        value: right answers over questions, 0 to 1.
        standard_error: of the value, 0 to 1.
        correct: 1 or 0 for each question, in the data set's order.
        asked: how the questions were asked: solved examples before each, and the questions' ids
            where the settings list them.
    """

    value: float
    standard_error: float | None
    correct: tuple[int, ...]
    asked: tuple[Any, ...]


@dataclass(frozen=True, kw_only=True)
class Row:
    """Hold what was measured of one variant; None where it was not.

    Attributes:
        variant: its name.
        is_reference: whether it is the unquantized model.
        on_front: whether no other quantized variant is as small and as close, and better in one.
        method, bits, granularity, group_size, clusters: from the recipe.
        linear_bits_per_weight, bits_per_weight: of the linear layers, and of the whole model.
        stored_bytes: size of the model's tensors.
        kl: mean KL divergence from the reference, nats.
        top1_agreement: share of tokens where both rank the same token first, 0 to 1.
        perplexity, perplexity_error: and its standard error.
        accuracies: by the headings in `ARC`.
        stage_seconds: of the conversion; "total" is wall time, s.
        convert_peak_bytes: most memory of the conversion.
        prefill_tokens_per_s, decode_tokens_per_s, load_s, first_token_s: speed.
        decode_range: slowest and fastest trial, tokens/s.
        run_peak_bytes: most memory while running.
    """

    variant: str
    is_reference: bool
    on_front: bool
    method: str | None
    bits: int | None
    granularity: str | None
    group_size: int | None
    clusters: int | None
    linear_bits_per_weight: float | None
    bits_per_weight: float | None
    stored_bytes: int | None
    kl: float | None
    top1_agreement: float | None
    perplexity: float | None
    perplexity_error: float | None
    accuracies: Mapping[str, Accuracy]
    stage_seconds: Mapping[str, float]
    convert_peak_bytes: int | None
    prefill_tokens_per_s: float | None
    decode_tokens_per_s: float | None
    decode_range: tuple[float, float] | None
    load_s: float | None
    first_token_s: float | None
    run_peak_bytes: int | None

    @property
    def is_split(self) -> bool:
        """Tell whether the variant's layers are split."""
        return self.clusters is not None

    @property
    def is_plain(self) -> bool:
        """Tell whether the variant is quantized and not split."""
        return not self.is_reference and not self.is_split

    @property
    def convert_seconds(self) -> float | None:
        """Return the conversion's wall time, s."""
        return self.stage_seconds.get("total")

    @property
    def size_and_distance(self) -> tuple[float, float] | None:
        """Return (stored_bytes, kl), less of both is better; None unless it is quantized."""
        if self.is_reference or self.stored_bytes is None or self.kl is None:
            return None
        return (self.stored_bytes, self.kl) if math.isfinite(self.kl) else None


@dataclass(frozen=True, kw_only=True)
class Report:
    """Hold a study, its results, and a row for each variant in the order of the tables."""

    study: StudyRecord
    results: tuple[Result, ...]
    rows: tuple[Row, ...]

    @property
    def reference(self) -> Row | None:
        """Return the unquantized variant's row."""
        return next((row for row in self.rows if row.is_reference), None)

    @property
    def yardstick(self) -> Row | None:
        """Return the row that speeds are compared with: the reference, or else the first rtn."""
        timed = [row for row in self.rows if row.decode_tokens_per_s]
        first = [row for row in timed if row.is_reference]
        return next(iter(first + [row for row in timed if row.method == "rtn"]), None)

    def twin(self, row: Row) -> Row | None:
        """Return the rtn variant with a split variant's bits, granularity and group size."""
        wanted = (row.bits, row.granularity, row.group_size)
        for other in self.rows:
            found = (other.bits, other.granularity, other.group_size)
            if other.is_plain and other.method == "rtn" and found == wanted:
                return other
        return None

    def better_plain(self, row: Row) -> Row | None:
        """Return the closest plain variant that is as small and as close as `row`, or better."""
        own, found = row.size_and_distance, []
        for other in self.rows:
            point = other.size_and_distance
            if other.is_plain and own and point and dominates(point, own):
                found.append((point[1], other))
        return min(found, key=lambda pair: pair[0])[1] if found else None


def load_report(directory: Path) -> Report:
    """Read a directory of results. Raises SplitQuantError when a file in it is unusable."""
    return build_report(load_study_record(directory), load_results(directory))


def build_report(study: StudyRecord, results: Iterable[Result]) -> Report:
    """Return one row for each variant: those of `study.order` first, the others by name."""
    results = tuple(results)
    parts: dict[str, dict[str, Result]] = {}
    for result in results:
        parts.setdefault(result.variant, {})[result.part] = result
    names = [name for name in dict.fromkeys(study.order) if name in parts]
    names += sorted(parts.keys() - set(names))
    rows = [_row(name, parts[name], name == study.reference_variant) for name in names]
    front = pareto_front([row.size_and_distance for row in rows])
    rows = [replace(row, on_front=best) for row, best in zip(rows, front, strict=True)]
    return Report(study=study, results=results, rows=tuple(rows))


def p_value(first: Accuracy | None, second: Accuracy | None) -> float | None:
    """Return McNemar's exact two-sided p; None unless both were asked the same."""
    from splitquant_mlx.evaluation.paired import compare

    if first is None or second is None:
        return None
    alike = (len(first.correct), first.asked) == (len(second.correct), second.asked)
    return compare(first.correct, second.correct).p_value if alike and first.correct else None


def points(first: Accuracy, second: Accuracy) -> str:
    """Return by how many percentage points the first is more often right."""
    return f"{(first.value - second.value) * 100:+.1f}"


def _row(name: str, parts: Mapping[str, Result], is_reference: bool) -> Row:
    def values(part: str) -> Mapping[str, Any]:
        return parts[part].values if part in parts else {}

    convert, kl, perplexity, speed = map(values, ("convert", "kl", "perplexity", "speed"))
    recipe = parts["convert"].settings.get("recipe") if "convert" in parts else None
    slowest, fastest = (speed.get(f"decode_tokens_per_s_{end}") for end in ("min", "max"))
    found = {heading: _accuracy(parts.get(part), ending) for heading, part, ending in ARC}
    return Row(
        variant=name,
        is_reference=is_reference,
        on_front=False,
        method=convert.get("method"),
        bits=convert.get("bits"),
        granularity=convert.get("granularity"),
        group_size=recipe.get("group_size") if isinstance(recipe, dict) else None,
        clusters=convert.get("clusters"),
        linear_bits_per_weight=convert.get("linear_bits_per_weight"),
        bits_per_weight=convert.get("bits_per_weight"),
        stored_bytes=convert.get("stored_bytes"),
        kl=kl.get("kl_mean"),
        top1_agreement=kl.get("top1_agreement"),
        perplexity=perplexity.get("perplexity"),
        perplexity_error=perplexity.get("standard_error"),
        accuracies={heading: value for heading, value in found.items() if value},
        stage_seconds=convert.get("seconds", {}),
        convert_peak_bytes=convert.get("peak_bytes"),
        prefill_tokens_per_s=speed.get("prefill_tokens_per_s"),
        decode_tokens_per_s=speed.get("decode_tokens_per_s"),
        decode_range=None if slowest is None or fastest is None else (slowest, fastest),
        load_s=speed.get("load_s"),
        first_token_s=speed.get("first_token_s"),
        run_peak_bytes=speed.get("peak_bytes"),
    )


def _accuracy(result: Result | None, ending: str) -> Accuracy | None:
    values = result.values if result else {}
    correct = values.get(f"correct{ending}")
    if result is None or correct is None or values.get(f"accuracy{ending}") is None:
        return None
    return Accuracy(
        value=values[f"accuracy{ending}"],
        standard_error=values.get(f"standard_error{ending}"),
        correct=tuple(correct),
        asked=(values["num_shots"], result.settings.get("questions")),
    )
