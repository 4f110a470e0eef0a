"""Tell of which architectures mlx-lm computes the same as transformers.

architectures.json holds the figures of tests/support/architectures.py: for each variant of each
architecture that both have, a tiny random checkpoint in both, before and after a conversion.
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
        variant: what is special about the model.
        verdict: "same", "warned" (`convert` says what differs) or "refused".
        difference: of the logits from transformers', relative to the largest; None where refused.
        correlation: of the logits of an 8-bit conversion with transformers'; None where refused.
        remark: why it was warned of or refused.
    """

    architecture: str
    variant: str
    verdict: str
    difference: float | None = None
    correlation: float | None = None
    remark: str = ""


@dataclass(frozen=True, kw_only=True)
class Comparisons:
    """Results of all comparisons, and what they were made with.

    Attributes:
        versions: of the packages.
        results: one for each variant.
    """

    versions: dict[str, str]
    results: tuple[Comparison, ...]


def recorded() -> Comparisons:
    """Return the comparisons that come with this package."""
    return load_json(
        Comparisons, resources.files("splitquant_mlx.inspection").joinpath(FILE).read_bytes()
    )


def rows(found: Comparisons) -> list[tuple[str, ...]]:
    """Return the cells of a table: architecture, variant, verdict, difference, 8 bits, remark."""
    return [
        (
            result.architecture,
            result.variant,
            result.verdict,
            "" if result.difference is None else f"{result.difference:.1e}",
            "" if result.correlation is None else f"{result.correlation:.4f}",
            result.remark,
        )
        for result in found.results
    ]
