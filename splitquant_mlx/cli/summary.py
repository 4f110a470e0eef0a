"""Show what a conversion will do, and what it did."""

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from splitquant_mlx.cli.console import next_step, pairs, show, size
from splitquant_mlx.formats.manifest import Manifest

if TYPE_CHECKING:
    from splitquant_mlx.conversion.bits import Forecast
    from splitquant_mlx.inspection.estimate import Estimate
    from splitquant_mlx.recipe import Recipe

WORDS = {"split": "split", "quantize": "quantized", "keep": "kept"}
LM_STUDIO = "~/.lmstudio/models/USER/NAME"


def print_summary(manifest: Manifest, path: Path) -> None:
    """Print sizes, bits/weight, seconds, exceptions, where it runs and the next command."""
    from splitquant_mlx.models.loader import tokenizer_problem

    show(pairs(*_rows(manifest)))
    for text in [*manifest.warnings, *notes(manifest.layers)]:
        show(f"  {text}")
    for text in _where_it_runs(manifest):
        show(text)
    if tokenizer_problem(path):
        show(f"Saved in {path}. It has no usable tokenizer: put one there before you run it.")
    else:
        next_step(f"Saved in {path}.", "chat", path)


def print_estimate(found: "Estimate", recipe: "Recipe", target: Path) -> None:
    """Print what a conversion would come to."""
    done = Counter(layer.action for layer in found.layers)
    guess = " (a guess: --max-kl decides)" if recipe.max_kl else ""
    fits = [("Fits", found.explanation)] if found.explanation else []
    show(
        pairs(
            ("Method", recipe.method),
            *fits,
            ("Layers", ", ".join(f"{done[a]} {word}" for a, word in WORDS.items() if done[a])),
            ("Size", f"{size(found.stored_bytes)}, the original {size(found.source_bytes)}{guess}"),
            ("Whole model", f"{found.bits_per_weight:.2f} bits/weight{guess}"),
            ("Memory", _memory(found.memory_bytes)),
            ("Time", _time(found.seconds, runs=recipe.runs_the_model)),
            ("Target", str(target)),
        )
    )
    for text in notes(found.layers):
        show(f"  {text}")
    show("Nothing was converted.")


def print_forecast(found: "Forecast") -> None:
    """Print what "auto" chose: for each kind of layer the bits, the size, the expected loss."""
    from rich.table import Table

    names = {path: path.split(".")[-2:] for path in found.nbytes}
    several = Counter(leaf for *_, leaf in {tuple(name) for name in names.values()})
    kinds: dict[str, list[str]] = {}
    for path, (*parent, leaf) in names.items():
        kinds.setdefault(".".join([*parent, leaf] if several[leaf] > 1 else [leaf]), []).append(
            path
        )
    whole = sum(found.divergence.values())
    table = Table("layers", "bits (how many)", "size", "KL, nats", "share", box=None)
    for kind, paths in kinds.items():
        chosen = Counter(_option(found.recipe.layers[path]) for path in paths)
        loss = sum(found.divergence[path] for path in paths)
        table.add_row(
            kind,
            ", ".join(f"{option} ({count})" for option, count in sorted(chosen.items())),
            size(sum(found.nbytes[path] for path in paths)),
            f"{loss:.2g}",
            f"{loss / whole:.0%}" if whole else "",
        )
    table.add_section()
    total = size(sum(found.nbytes.values()))
    table.add_row("all", f"{found.bits_per_weight:.2f} bits/weight", total, f"{whole:.2g}", "100%")
    table.add_row("whole checkpoint", "", size(found.total_bytes), f"{whole:.2g}", "")
    if larger := found.next_size:
        bits, loss = f"{larger.bits_per_weight:.2f} bits/weight", f"{larger.divergence:.2g}"
        table.add_row("next size up", bits, size(larger.total_bytes), loss, "")
    else:
        table.add_row("next size up", "none: this is the best", "", "", "")
    if found.explanation:
        show(f"Fits: {found.explanation}.")
    show(table)
    if found.mixture:
        show(
            "The KL of a mixture is predicted with each token at the experts that the original "
            "sends it to: where errors change them, small mixtures lost two to three times as much."
        )


def notes(layers: Iterable[Any]) -> list[str]:
    """Name the layers that differ from the recipe, those with the same reason together."""
    by_note: dict[str, Counter[str]] = {}
    for layer in layers:
        if layer.note or layer.action == "keep":
            reason = f"{WORDS[layer.action]}: {layer.note or f'the {layer.kind}, as asked for'}"
            pattern = re.sub(r"\.\d+\.", ".*.", layer.path)
            by_note.setdefault(reason, Counter())[pattern] += 1
    return [
        f"{reason}: "
        + ", ".join(f"{name} ({count})" if count > 1 else name for name, count in found.items())
        for reason, found in by_note.items()
    ]


def _option(settings: Mapping[str, Any]) -> str:
    return f"{settings['bits']} g{settings['group_size']}"


def _rows(manifest: Manifest) -> list[tuple[str, str]]:
    layers = manifest.layers
    actions = Counter(layer.action for layer in layers)
    kept = sum(layer.nbytes for layer in layers if layer.action == "keep")
    share = f", {size(kept)} of it not quantized" if kept else ""
    rows = [
        ("Layers", ", ".join(f"{actions[a]} {word}" for a, word in WORDS.items() if actions[a])),
        _bits(manifest),
        ("Whole model", f"{manifest.bits_per_weight:.2f} bits/weight"),
        ("Size", f"{size(manifest.stored_bytes)}{share}; original {size(manifest.source_bytes)}"),
    ]
    ratios = sorted(layer.snr_db for layer in layers if layer.snr_db is not None)
    if ratios:
        median = ratios[len(ratios) // 2]
        rows.append(
            (
                "Error",
                f"{median:.0f} dB below the weights (median of layers; worst {ratios[0]:.0f})",
            )
        )
    if refined := manifest.refinement:
        loss = f"{refined['before']:.4f} to {refined['after']:.4f} nats per token"
        rows.append(("Refined", f"KL divergence {loss}, on text that was not trained on"))
    seconds = manifest.seconds
    stages = ", ".join(f"{k} {v:.1f}" for k, v in seconds.items() if k != "total" and v >= 0.05)
    parts = f" (threads added up: {stages})" if stages else ""
    rows.append(("Time", f"{seconds['total']:.1f} s{parts}"))
    return rows


def _bits(manifest: Manifest) -> tuple[str, str]:
    """Return the bits/weight of the linear layers, or of all that a size was asked of."""
    if manifest.recipe.get("method") != "auto":
        return "Linear layers", f"{manifest.linear_bits_per_weight:.2f} bits/weight"
    changed = [layer for layer in manifest.layers if layer.action != "keep"]
    weights = sum(math.prod(layer.shape) for layer in changed)
    stored = 8 * sum(layer.nbytes for layer in changed)
    return "Quantized", f"{stored / max(weights, 1):.2f} bits/weight, embeddings among them"


def _where_it_runs(manifest: Manifest) -> list[str]:
    """Say which programs run the model, and what a split costs."""
    if any(layer.action == "split" for layer in manifest.layers):
        ratio = manifest.linear_bits_per_weight / 4.5
        return [
            f"Linear layers take {ratio:.1f} x the bytes of plain 4-bit. Runs here, in mlx-lm with "
            "--trust-remote-code and in mlx-vlm; not in LM Studio.",
            "For LM Studio, or the closest model at a given size: --method auto.",
        ]
    if any(layer.needs_code for layer in manifest.layers):
        return [
            "Runs here, in mlx-lm with --trust-remote-code and in mlx-vlm; not in LM Studio.",
            "For LM Studio: --method auto.",
        ]
    return [
        f"Runs in mlx-lm and, moved or linked to {LM_STUDIO} (--lmstudio does that), in LM Studio."
    ]


def _memory(needed_bytes: float) -> str:
    """Say what is needed of the memory that is there."""
    from splitquant_mlx.runtime.memory import free_bytes, memory_bytes

    there = f"{free_bytes() / 1e9:.1f} of this machine's {memory_bytes() / 1e9:.1f} GB are free"
    return f"about {needed_bytes / 1e9:.1f} GB ({there})"


def _time(seconds: float, *, runs: bool) -> str:
    """Say how long it takes; `runs` where the model itself is run."""
    text = f"{seconds / 3600:.1f} h"
    if seconds < 5400:
        text = f"{seconds / 60:.0f} min" if seconds >= 60 else f"{max(1, seconds):.0f} s"
    part = "one block that was run" if runs else "one layer"
    return f"about {text} (rough: from {part}, on a machine that is not busy)"
