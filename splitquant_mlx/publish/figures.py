"""Measurements as a table for the model card and as evaluation results for the hub."""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import PurePath
from typing import TYPE_CHECKING, Any

from splitquant_mlx.data.questions import ARC, FOLDERS
from splitquant_mlx.errors import one_line
from splitquant_mlx.publish.measurements import Measurement
from splitquant_mlx.report.numbers import MISSING, percent, perplexity, plus_minus, significant
from splitquant_mlx.study.schema import PARTS

if TYPE_CHECKING:
    from huggingface_hub import EvalResult

PROTOCOLS = {
    "loglikelihood": "in the format of lm-evaluation-harness",
    "letter": "lettered options, chat template",
}
METRICS = {
    "kl": ("kl_mean", "top1_agreement"),
    "perplexity": ("perplexity",),
    **dict.fromkeys(FOLDERS, ("accuracy", "accuracy_norm")),
}
# (type, name) of the data set on the hub
DATA = {task: (ARC, name) for task, name in FOLDERS.items()}
TEXT, WIKITEXT = ("text", "text"), ("wikitext", "WikiText-2")
PACKAGES = ("splitquant-mlx", "mlx", "mlx-lm")
Values = Mapping[str, Any]
MAX_CHARACTERS = 160  # of a code span


def figures_table(measurements: Iterable[Measurement]) -> str:
    """Return the table of all measurements as Markdown."""
    rows = [
        (metric, value, compared, f"{setting}; {_environment(measurement)}")
        for measurement in measurements
        for metric, value, compared, setting in _rows(measurement)
    ]
    return table(("", "this model", "compared with", "how it was measured"), rows)


def eval_results(measurements: Iterable[Measurement]) -> "list[EvalResult]":
    """Return the finite values as evaluation results of huggingface_hub."""
    from huggingface_hub import EvalResult

    results = []
    for measurement in measurements:
        task, _, protocol = measurement.part.partition(".")
        data = DATA.get(task) or TEXT
        if task in ("kl", "perplexity") and measurement.settings.get("data", "") is None:
            data = WIKITEXT  # the default text of eval
        for metric in METRICS.get(task, ()):
            value = _number(measurement.values, metric)
            if value is not None and math.isfinite(value):
                results.append(
                    EvalResult(
                        task_type="text-generation",
                        dataset_type=data[0],
                        dataset_name=data[1],
                        metric_type=metric,
                        metric_name=f"{metric} ({protocol})" if protocol else metric,
                        metric_value=value,
                    )
                )
    return results


def _rows(measurement: Measurement) -> Iterator[tuple[str, str, str, str]]:
    """Yield (metric, value, value of the reference, setting)."""
    values, other = measurement.values, measurement.reference_values
    settings, reference = measurement.settings, _reference_name(measurement)
    if measurement.part == "kl":
        setting = f"{_count(values, 'positions')} positions of {_text(settings)}, from {reference}"
        error = significant(_number(values, "standard_error"), 2)
        kl = plus_minus(significant(_number(values, "kl_mean")), error)
        yield "KL divergence, nats", kl, "", setting
        yield "top-1 agreement, %", percent(_number(values, "top1_agreement")), "", setting
    elif measurement.part == "perplexity":
        setting = f"{_count(values, 'tokens')} tokens of {_text(settings)}"
        yield "perplexity", _perplexity(values), _compared(_perplexity(other), reference), setting
    elif measurement.part in PARTS:
        task, protocol = measurement.part.split(".")
        setting = f"{_count(values, 'questions')} questions, {PROTOCOLS[protocol]}, "
        setting += f"{_count(values, 'num_shots')} few-shot examples"
        for key, suffix in (("accuracy", ""), ("accuracy_norm", ", by length")):
            if _number(values, key) is not None:
                metric = f"{FOLDERS[task]}{', letters' if protocol == 'letter' else suffix}, %"
                compared = _compared(_accuracy(other, key), reference)
                yield metric, _accuracy(values, key), compared, setting
    else:
        limit = settings.get("limit")
        setting = f"{code(measurement.part)} of lm-evaluation-harness, "
        setting += f"{code(limit)} questions" if limit else "all questions"
        for name, value in values.items():
            yield code(name), significant(value, 4), "", setting


def _perplexity(values: Values) -> str:
    error = perplexity(_number(values, "standard_error"))
    return plus_minus(perplexity(_number(values, "perplexity")), error)


def _accuracy(values: Values, key: str) -> str:
    error = percent(_number(values, key.replace("accuracy", "standard_error")))
    return plus_minus(percent(_number(values, key)), error)


def _number(values: Values, key: str) -> float | None:
    """Return a number; None if it is missing or NaN."""
    value = values.get(key)
    return value if isinstance(value, int | float) and value == value else None


def _count(values: Values, key: str) -> str:
    return f"{value:,.0f}" if (value := _number(values, key)) is not None else "?"


def _compared(value: str, reference: str) -> str:
    return "" if value == MISSING else f"{value} ({reference})"


def _reference_name(measurement: Measurement) -> str:
    """Return the name of the reference; of a local path only the last part, for privacy."""
    reference = measurement.reference
    if measurement.is_study:
        return "the original"
    if not reference:
        return ""
    local = PurePath(reference).is_absolute() or reference.startswith(("~", "."))
    return code(PurePath(reference).name if local else reference)


def _text(settings: Values) -> str:
    """Return the name of the text and the windows it was scored in."""
    data, digest = settings.get("data"), settings.get("text")
    default = "WikiText-2" if "data" in settings else "text"  # of eval, or of a study
    name = code(PurePath(str(data)).name) if data else default
    windows = settings.get("windows")
    length = (
        windows[-1] if isinstance(windows, list) and windows else settings.get("context_length")
    )
    stride = settings.get("stride")
    windows = f"windows of {code(length)} tokens" + (f", stride {code(stride)}" if stride else "")
    return f"{name} (SHA-256 {code(str(digest)[:12])}) in {windows}"


def _environment(measurement: Measurement) -> str:
    versions = measurement.versions
    packages = [code(f"{name} {versions[name]}") for name in PACKAGES if name in versions]
    machine = code(f"{measurement.machine.get('chip')}, {measurement.machine.get('system')}")
    return ", ".join([f"{code(measurement.device)} of {machine}", *packages])


def code(text: object) -> str:
    """Return `text` as a one-line code span, with the characters that end a span or cell replaced.

    Markdown and HTML in a code span have no effect.
    """
    line = one_line(text).replace("`", "'").replace("|", "\N{BROKEN BAR}")
    line = line if len(line) <= MAX_CHARACTERS else f"{line[: MAX_CHARACTERS - 4]} ..."
    return f"`{line or '?'}`"


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a Markdown table; the cells are Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
