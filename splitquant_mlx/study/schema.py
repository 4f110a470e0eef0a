"""Say what each part of a study's results holds, and check JSON content against it."""

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from splitquant_mlx.errors import SplitQuantError

Checks = Mapping[str, Callable[[Any], bool]]


def number(value: Any) -> bool:
    """Tell whether `value` is a number that fits 64 bits, infinity and NaN among them."""
    return isinstance(value, float) or (type(value) is int and abs(value) < 2**63)


def finite(value: Any) -> bool:
    """Tell whether `value` is a finite number."""
    return number(value) and math.isfinite(value)


def text(value: Any) -> bool:
    """Tell whether `value` is a string."""
    return isinstance(value, str)


def line(value: Any) -> bool:
    """Tell whether `value` is one printable line that is not blank."""
    return isinstance(value, str) and value.isprintable() and value.strip() != ""


def table(value: Any) -> bool:
    """Tell whether `value` is a JSON object."""
    return isinstance(value, dict)


def optional(check: Callable[[Any], bool]) -> Callable[[Any], bool]:
    """Return a check that also takes None: JSON's null, or a missing entry."""
    return lambda value: value is None or check(value)


def each(check: Callable[[Any], bool]) -> Callable[[Any], bool]:
    """Return a check of a list, every item of which passes `check`."""
    return lambda value: isinstance(value, list) and all(map(check, value))


def _answer(value: Any) -> bool:
    return type(value) is int and value in (0, 1)


def _times(value: Any) -> bool:
    return table(value) and all(map(line, value)) and all(map(finite, value.values()))


_ARC: Checks = {
    "questions": finite,
    "accuracy": finite,
    "standard_error": optional(number),
    "accuracy_norm": optional(finite),
    "standard_error_norm": optional(number),
    "correct": each(_answer),
    "correct_norm": optional(each(_answer)),
    "num_shots": finite,
}
PARTS: Mapping[str, Checks] = {
    "convert": {
        "method": line,
        "linear_bits_per_weight": optional(finite),
        "bits_per_weight": finite,
        "stored_bytes": finite,
        "source_bytes": optional(finite),
        "seconds": _times,
        "peak_bytes": optional(finite),
        "bits": optional(finite),
        "granularity": optional(line),
        "clusters": optional(finite),
        "model_hash": optional(line),
    },
    "arc_challenge.loglikelihood": _ARC,
    "arc_challenge.letter": _ARC,
    "arc_easy.loglikelihood": _ARC,
    "arc_easy.letter": _ARC,
    "perplexity": {"perplexity": number, "standard_error": optional(number)},
    "kl": {"kl_mean": number, "top1_agreement": optional(finite)},
    "speed": {
        "decode_tokens_per_s": finite,
        "decode_tokens_per_s_min": optional(finite),
        "decode_tokens_per_s_max": optional(finite),
        "prefill_tokens_per_s": optional(finite),
        "load_s": optional(finite),
        "first_token_s": optional(finite),
        "peak_bytes": optional(finite),
    },
    "weights": {
        "layer": line,
        "edges": each(finite),
        "counts": each(finite),
        "cut_points": each(finite),
    },
}


def check_values(part: str, values: Mapping[str, Any], file: Path) -> None:
    """Raise SplitQuantError, naming `file`, unless `values` are what `part` holds."""
    if part not in PARTS:
        raise broken(file, f"unknown part {part!r}, wanted one of {', '.join(PARTS)}")
    check(values, PARTS[part], file, "values.")
    for name in ("correct", "correct_norm"):
        answers = values.get(name)
        if answers is not None and len(answers) != values["questions"]:
            raise broken(
                file, f"values.{name} has {len(answers)} answers, wanted {values['questions']}"
            )
    if part == "weights" and len(values["edges"]) != len(values["counts"]) + 1:
        raise broken(file, "values.edges wants one entry more than values.counts has")


def check(content: Any, checks: Checks, file: Path, where: str = "") -> None:
    """Raise SplitQuantError, naming `file`, at the first entry of `content` that fails."""
    if not table(content):
        raise broken(file, f"{where.rstrip('.') or 'content'}: wanted a JSON object")
    for name, passes in checks.items():
        value = content.get(name)
        if not passes(value):
            got = "nothing" if value is None else repr(value)[:60]
            raise broken(file, f"{where}{name} is missing or of a wrong kind, got {got}")


def broken(file: Path, reason: str) -> SplitQuantError:
    """Return the error that says what is wrong with a results file."""
    return SplitQuantError(f"{file} is not a result that can be used: {reason}")
