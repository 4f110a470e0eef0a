"""Tell of which architectures mlx-lm computes the same as transformers.

architectures.json holds the figures of tests/support/architectures.py: for each variant of each
architecture that both have, a tiny random checkpoint in both, before and after a conversion.
"""

from dataclasses import dataclass
from importlib import resources
from pathlib import Path

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


def write_page(found: Comparisons, file: Path) -> None:
    """Write the table as a page of the documentation."""
    versions = ", ".join(f"{name} {number}" for name, number in sorted(found.versions.items()))
    lines = [
        "# Architectures",
        "",
        "Which architectures mlx-lm computes as transformers does. Each row is a tiny random "
        "checkpoint written by transformers: the largest difference of the logits, relative to "
        "the largest logit (at most 1e-4 is the same), and the correlation of the logits after a "
        "conversion to 8 bits, which stock mlx-lm computes alike. `convert` warns where the "
        "verdict is *warned*, and refuses where it is *refused*.",
        "",
        "Warned of are differences of mlx-lm's own models, which every mlx checkpoint has "
        "(attention windows, longrope's short factors, YaRN that is not rounded, formulas of "
        "GELU), and parts that see or hear, which are left out. Any other setting that a class "
        "does not follow is refused.",
        "",
        f"Measured with {versions} by `just architectures` with seed 0.",
        "",
        "| architecture | variant | verdict | difference | 8 bits | remark |",
        "|---|---|---|---|---|---|",
        *(
            "| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |"
            for row in rows(found)
        ),
    ]
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")
