"""The table of architectures as a page of the documentation, docs/architectures.md."""

from pathlib import Path

from splitquant_mlx.inspection.architectures import Comparisons, rows


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
