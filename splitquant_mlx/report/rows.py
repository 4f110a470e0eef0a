"""Rows of a report: the results of each variant of a study, smallest model first."""

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from splitquant_mlx.study.results import (
    Result,
    StudyRecord,
    encode,
    load_results,
    load_study_record,
)

# heading -> (part, suffix of the names of its values)
ARC = {
    "ARC-C": ("arc_challenge.loglikelihood", ""),
    "ARC-C norm": ("arc_challenge.loglikelihood", "_norm"),
    "ARC-C letter": ("arc_challenge.letter", ""),
    "ARC-E": ("arc_easy.loglikelihood", ""),
    "ARC-E norm": ("arc_easy.loglikelihood", "_norm"),
    "ARC-E letter": ("arc_easy.letter", ""),
}
MAX_STANDARD_ERROR = 0.025  # larger errors hide the differences between methods


@dataclass(frozen=True, kw_only=True)
class Accuracy:
    """Share of correct answers.

    Attributes:
        value: correct answers / questions, 0 to 1.
        standard_error: of the value, 0 to 1; NaN or None if unknown.
        correct: 1 or 0 per question, in the order of the data set.
        question_set: number of few-shot examples, and the ids of the questions or None.
    """

    value: float
    standard_error: float | None
    correct: tuple[int, ...]
    question_set: tuple[Any, ...]


@dataclass(frozen=True, kw_only=True)
class Row:
    """Results of one variant.

    Attributes:
        variant: name of the variant.
        is_reference: whether it is the unquantized model.
        values: values of each measured part; see `study.schema.PARTS`.
        recipe: settings of its conversion; empty for a model that was not converted.
        accuracies: accuracies by the headings in `ARC`.
        on_front: whether it is on the Pareto front of size and KL divergence.
    """

    variant: str
    is_reference: bool
    values: Mapping[str, Mapping[str, Any]]
    recipe: Mapping[str, Any]
    accuracies: Mapping[str, Accuracy]
    on_front: bool = False

    def get(self, part: str, name: str) -> Any:
        """Return a value; None if it was not measured."""
        return self.values.get(part, {}).get(name)

    @property
    def method(self) -> str:
        """Return the name of the method; "-" if unknown."""
        return self.get("convert", "method") or "-"

    @property
    def series(self) -> str:
        """Return the label for a plot's legend: method, granularity and refinement."""
        granularity = self.get("convert", "granularity") or "group"
        refined = ", refined" if self.recipe.get("refine") else ""
        return self.method + ("" if granularity == "group" else f", {granularity}") + refined

    @property
    def stored_bytes(self) -> int | None:
        """Return the size of the tensors in bytes."""
        return self.get("convert", "stored_bytes")

    @property
    def kl(self) -> float | None:
        """Return the mean KL divergence from the reference, nats per token."""
        return self.get("kl", "kl_mean")

    @property
    def is_split(self) -> bool:
        """Return whether the variant's layers are split."""
        return self.get("convert", "clusters") is not None

    @property
    def size_and_kl(self) -> tuple[float, float] | None:
        """Return (stored_bytes, kl), both lower is better; None unless quantized and finite."""
        if self.is_reference or self.stored_bytes is None or self.kl is None:
            return None
        return (self.stored_bytes, self.kl) if math.isfinite(self.kl) else None


@dataclass(frozen=True, kw_only=True)
class Report:
    """A study, its results, and one row per variant, smallest first."""

    study: StudyRecord
    results: tuple[Result, ...]
    rows: tuple[Row, ...]

    @property
    def reference(self) -> Row | None:
        """Return the unquantized variant's row."""
        return next((row for row in self.rows if row.is_reference), None)

    @property
    def speed_baseline(self) -> Row | None:
        """Return the baseline of speed ratios: the reference, or else the first rtn variant."""
        timed = [row for row in self.rows if row.get("speed", "decode_tokens_per_s")]
        timed.sort(key=lambda row: not row.is_reference)
        return next((row for row in timed if row.is_reference or row.method == "rtn"), None)

    @property
    def arc_headings(self) -> dict[str, bool]:
        """Return the measured headings of `ARC`, with whether errors are small enough to show."""
        headings = {}
        for heading in ARC:
            errors = [
                row.accuracies[heading].standard_error
                for row in self.rows
                if heading in row.accuracies
            ]
            if errors:
                headings[heading] = all(e is not None and e <= MAX_STANDARD_ERROR for e in errors)
        return headings

    def rtn_counterpart(self, row: Row) -> Row | None:
        """Return the rtn variant with the same bits, granularity and group size."""

        def grid(row: Row) -> tuple[Any, ...]:
            convert = (row.get("convert", name) for name in ("bits", "granularity"))
            return (*convert, row.recipe.get("group_size"))

        plain = (other for other in self.rows if other.method == "rtn")
        return next((other for other in plain if grid(other) == grid(row)), None)

    def dominating_plain_variant(self, row: Row) -> Row | None:
        """Return the unsplit variant of lowest KL that dominates `row` in size and KL."""
        dominating = [
            other
            for other in self.rows
            if not other.is_split and dominates(other.size_and_kl, row.size_and_kl)
        ]
        return min(dominating, key=lambda other: other.kl or 0.0, default=None)


def load_report(directory: Path) -> Report:
    """Read a directory of results. Raises SplitQuantError when a file in it is unusable.

    Results of earlier versions of the study are omitted.
    """
    study, results = load_study_record(directory), load_results(directory)
    current = _current_results(study, results)
    if stale := len(results) - len(current):
        note = f"Omitted: {stale} measurements of variants or settings no longer in the study."
        study = dataclasses.replace(study, notes=(*study.notes, note))
    return build_report(study, current)


def _current_results(study: StudyRecord, results: Sequence[Result]) -> list[Result]:
    """Return the results of the study's variants with the settings of the last run."""
    converted = {r.variant: r.settings for r in results if r.part == "convert"}
    model_keys = ("model_hash", "recipe", "foreign")
    current = [
        result
        for result in results
        if result.variant in study.order
        and all(
            result.settings.get(key) == converted.get(result.variant, result.settings).get(key)
            for key in model_keys
        )
    ]

    def part_settings(result: Result) -> dict[str, Any]:
        return {k: v for k, v in result.settings.items() if k not in model_keys[1:]}

    last = {r.part: part_settings(r) for r in sorted(current, key=lambda r: r.created)}
    return [result for result in current if part_settings(result) == last[result.part]]


def build_report(study: StudyRecord, results: Iterable[Result]) -> Report:
    """Return a report with rows sorted by size; unknown sizes last, in the study's order."""
    results = tuple(results)
    parts: dict[str, dict[str, Result]] = {}
    for result in results:
        parts.setdefault(result.variant, {})[result.part] = result
    order = {name: index for index, name in enumerate(study.order)}
    rows = [_row(name, by_part, name == study.reference_variant) for name, by_part in parts.items()]
    rows.sort(
        key=lambda row: (
            math.inf if row.stored_bytes is None else row.stored_bytes,
            order.get(row.variant, len(order)),
            row.variant,
        )
    )
    points = [row.size_and_kl for row in rows]
    rows = [
        dataclasses.replace(row, on_front=on_front)
        for row, on_front in zip(rows, pareto_front(points), strict=True)
    ]
    return Report(study=study, results=results, rows=tuple(rows))


def values(report: Report) -> dict[str, Any]:
    """Return a report as JSON values: the study and the measured parts of each variant."""
    variants = [
        {
            "variant": row.variant,
            "recipe": row.recipe,
            "values": row.values,
            "on_front": row.on_front,
        }
        for row in report.rows
    ]
    return encode({"study": dataclasses.asdict(report.study), "variants": variants})


def pareto_front(points: Sequence[tuple[float, float] | None]) -> list[bool]:
    """Return whether each point, lower is better in both, is Pareto-optimal; False for None."""
    return [
        point is not None and not any(dominates(other, point) for other in points)
        for point in points
    ]


def dominates(first: tuple[float, float] | None, second: tuple[float, float] | None) -> bool:
    """Return whether `first` is no higher than `second` in both values and lower in one."""
    if first is None or second is None:
        return False
    return first != second and first[0] <= second[0] and first[1] <= second[1]


def p_value(first: Accuracy | None, second: Accuracy | None) -> float | None:
    """Return the p-value of McNemar's exact two-sided test; None unless the questions are equal."""
    from splitquant_mlx.evaluation.paired import compare

    if first is None or second is None or not first.correct:
        return None
    if len(first.correct) != len(second.correct) or first.question_set != second.question_set:
        return None
    return compare(first.correct, second.correct).p_value


def _row(name: str, parts: Mapping[str, Result], is_reference: bool) -> Row:
    recipe = parts["convert"].settings.get("recipe") if "convert" in parts else None
    accuracies = {
        heading: _accuracy(parts[part], suffix)
        for heading, (part, suffix) in ARC.items()
        if part in parts and parts[part].values.get(f"correct{suffix}") is not None
    }
    return Row(
        variant=name,
        is_reference=is_reference,
        values={part: result.values for part, result in parts.items()},
        recipe=recipe if isinstance(recipe, dict) else {},
        accuracies=accuracies,
    )


def _accuracy(result: Result, suffix: str) -> Accuracy:
    values = result.values
    return Accuracy(
        value=values[f"accuracy{suffix}"],
        standard_error=values.get(f"standard_error{suffix}"),
        correct=tuple(values[f"correct{suffix}"]),
        question_set=(values["num_shots"], result.settings.get("questions")),
    )
