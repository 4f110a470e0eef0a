"""Measurements as the rows of a card's table, and as the evaluation results that the hub shows."""

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

ASKED = {
    "loglikelihood": "as lm-evaluation-harness asks it",
    "letter": "options lettered, through the chat template",
}
METRICS = {
    "kl": ("kl_mean", "top1_agreement"),
    "perplexity": ("perplexity",),
    **dict.fromkeys(FOLDERS, ("accuracy", "accuracy_norm")),
}
# the hub's type and name of a data set
DATA = {task: (ARC, name) for task, name in FOLDERS.items()}
TEXT, WIKITEXT = ("text", "text"), ("wikitext", "WikiText-2")
PACKAGES = ("splitquant-mlx", "mlx", "mlx-lm")
Values = Mapping[str, Any]
MOST_CHARACTERS = 160  # of another's text


def figures_table(measurements: Iterable[Measurement]) -> str:
    """Return the table of everything that was measured, as Markdown."""
    rows = [
        (what, value, compared, f"{setting}; {_environment(measured)}")
        for measured in measurements
        for what, value, compared, setting in _rows(measured)
    ]
    return table(("", "this model", "compared with", "how it was measured"), rows)


def eval_results(measurements: Iterable[Measurement]) -> "list[EvalResult]":
    """Return the finite figures as the hub's evaluation results; see huggingface_hub."""
    from huggingface_hub import EvalResult

    found = []
    for measured in measurements:
        task, _, protocol = measured.part.partition(".")
        data = DATA.get(task) or TEXT
        if task in ("kl", "perplexity") and measured.settings.get("data", "") is None:
            data = WIKITEXT  # eval's own text
        for metric in METRICS.get(task, ()):
            value = _of(measured.values, metric)
            if value is not None and math.isfinite(value):
                found.append(
                    EvalResult(
                        task_type="text-generation",
                        dataset_type=data[0],
                        dataset_name=data[1],
                        metric_type=metric,
                        metric_name=f"{metric} ({protocol})" if protocol else metric,
                        metric_value=value,
                    )
                )
    return found


def _rows(measured: Measurement) -> Iterator[tuple[str, str, str, str]]:
    values, other, settings = measured.values, measured.reference_values, measured.settings
    named = _named(measured.reference)
    if measured.part == "kl":
        setting = f"{_count(values, 'positions')} positions of {_text(settings)}, from {named}"
        kl = plus_minus(significant(_of(values, "kl_mean")), _error(values, "standard_error"))
        yield "KL divergence, nats", kl, "", setting
        yield "top-1 agreement, %", percent(_of(values, "top1_agreement")), "", setting
    elif measured.part == "perplexity":
        setting = f"{_count(values, 'tokens')} tokens of {_text(settings)}"
        yield "perplexity", _perplexity(values), _compared(_perplexity(other), named), setting
    elif measured.part in PARTS:
        task, protocol = measured.part.split(".")
        setting = f"{_count(values, 'questions')} questions, {ASKED[protocol]}, "
        setting += f"{_count(values, 'num_shots')} solved examples before each"
        for key, ending in (("accuracy", ""), ("accuracy_norm", ", by length")):
            if _of(values, key) is not None:
                found = [_accuracy(each, key) for each in (values, other)]
                what = f"{FOLDERS[task]}{', letters' if protocol == 'letter' else ending}, %"
                yield what, found[0], _compared(found[1], named), setting
    else:
        limit = settings.get("limit")
        setting = f"{code(measured.part)} of lm-evaluation-harness, "
        setting += f"{code(limit)} questions" if limit else "all questions"
        for name, value in values.items():
            yield code(name), significant(value, 4), "", setting


def _perplexity(values: Values) -> str:
    error = perplexity(_of(values, "standard_error"))
    return plus_minus(perplexity(_of(values, "perplexity")), error)


def _accuracy(values: Values, key: str) -> str:
    error = percent(_of(values, key.replace("accuracy", "standard_error")))
    return plus_minus(percent(_of(values, key)), error)


def _error(values: Values, key: str) -> str:
    return significant(_of(values, key), 2)


def _of(values: Values, key: str) -> float | None:
    """Return a number; None where there is none, or NaN."""
    value = values.get(key)
    return value if isinstance(value, int | float) and value == value else None


def _count(values: Values, key: str) -> str:
    return f"{value:,.0f}" if (value := _of(values, key)) is not None else "?"


def _compared(value: str, named: str) -> str:
    return "" if value == MISSING else f"{value} ({named})"


def _named(reference: str) -> str:
    """Return the name of the reference; of a path the last part, the rest is private."""
    if reference in ("", "the original"):
        return reference
    local = PurePath(reference).is_absolute() or reference.startswith(("~", "."))
    return code(PurePath(reference).name if local else reference)


def _text(settings: Values) -> str:
    """Return the name of the text and the windows it was read in."""
    data, hashed = settings.get("data"), settings.get("text")
    unnamed = "WikiText-2" if "data" in settings else "text"  # eval's own, or a study's
    name = code(PurePath(str(data)).name) if data else unnamed
    windows = settings.get("windows")
    length = (
        windows[-1] if isinstance(windows, list) and windows else settings.get("context_length")
    )
    stride = settings.get("stride")
    read = f"windows of {code(length)} tokens" + (f", stride {code(stride)}" if stride else "")
    return f"{name} (SHA-256 {code(str(hashed)[:12])}) in {read}"


def _environment(measured: Measurement) -> str:
    versions = measured.versions
    packages = [code(f"{name} {versions[name]}") for name in PACKAGES if name in versions]
    machine = code(f"{measured.machine.get('chip')}, {measured.machine.get('system')}")
    return ", ".join([f"{code(measured.device)} of {machine}", *packages])


def code(text: object) -> str:
    """Return `text` as a code span on one line, without what could end the span or a cell.

    In a code span nothing is a link, a heading or HTML.
    """
    line = one_line(text).replace("`", "'").replace("|", "\N{BROKEN BAR}")
    line = line if len(line) <= MOST_CHARACTERS else f"{line[: MOST_CHARACTERS - 4]} ..."
    return f"`{line or '?'}`"


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a table whose cells are Markdown already."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
