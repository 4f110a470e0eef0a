"""Recorded comparison of mlx-lm with transformers for every architecture that both support.

tests/support/architectures.py writes architectures.json: for each variant of an architecture it
compares the logits of a tiny random checkpoint, before and after a conversion.
"""

from dataclasses import dataclass
from importlib import resources

from splitquant_mlx.settings import load_json

FILE = "architectures.json"


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Result of one comparison.

    Attributes:
        architecture: model_type of config.json.
        variant: setting in which the model differs from the others of the architecture.
        verdict: "same", "warned" (`convert` reports the difference) or "refused".
        difference: largest difference of the logits, relative to the largest; None if refused.
        correlation: of the logits of an 8-bit conversion with transformers'; None if refused.
        remark: reason of a warning or refusal.
    """

    architecture: str
    variant: str
    verdict: str
    difference: float | None = None
    correlation: float | None = None
    remark: str = ""


@dataclass(frozen=True, kw_only=True)
class Comparisons:
    """Results of all comparisons.

    Attributes:
        versions: versions of the packages compared.
        results: one result per variant.
    """

    versions: dict[str, str]
    results: tuple[Comparison, ...]


def recorded() -> Comparisons:
    """Return the comparisons stored in this package."""
    return load_json(
        Comparisons, resources.files("splitquant_mlx.inspection").joinpath(FILE).read_bytes()
    )


def rows(comparisons: Comparisons) -> list[tuple[str, ...]]:
    """Return table rows of architecture, variant, verdict, difference, correlation and remark."""
    return [
        (
            result.architecture,
            result.variant,
            result.verdict,
            "" if result.difference is None else f"{result.difference:.1e}",
            "" if result.correlation is None else f"{result.correlation:.4f}",
            result.remark,
        )
        for result in comparisons.results
    ]
