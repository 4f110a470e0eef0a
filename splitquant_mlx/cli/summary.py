"""Show what a conversion did."""

import shlex
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from splitquant_mlx.cli.console import size
from splitquant_mlx.formats.manifest import LayerRecord, Manifest

if TYPE_CHECKING:
    from splitquant_mlx.conversion.bits import Forecast

MOST_NOTES = 8


def print_summary(manifest: Manifest, path: Path) -> None:
    """Print sizes, bits/weight, seconds, exceptions and the next command."""
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False)
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    for name, value in _rows(manifest):
        table.add_row(name, value)
    console.print(table)
    for text in _notes(manifest.layers):
        console.print(f"  {text}", markup=False)
    next_command = f"splitquant-mlx chat --model {shlex.quote(str(path))}"
    console.print(f"Saved in {path}. Next: {next_command}", markup=False, soft_wrap=True)


def print_forecast(found: "Forecast") -> None:
    """Print what "auto" chose: for each kind of layer the bits, the size, the expected loss."""
    from rich.console import Console
    from rich.table import Table

    kinds: dict[str, list[str]] = {}
    for path in found.nbytes:
        kinds.setdefault(path.rpartition(".")[2], []).append(path)
    whole = sum(found.divergence.values())
    table = Table("layers", "bits (how many)", "size", "KL, nats", "share")
    for kind, paths in kinds.items():
        chosen = Counter(_option(found.recipe.layers[path]) for path in paths)
        loss = sum(found.divergence[path] for path in paths)
        table.add_row(
            kind,
            ", ".join(f"{option} ({count})" for option, count in sorted(chosen.items())),
            size(sum(found.nbytes[path] for path in paths)),
            f"{loss:.4f}",
            f"{loss / whole:.0%}" if whole else "",
        )
    table.add_section()
    total = size(sum(found.nbytes.values()))
    table.add_row("all", f"{found.bits_per_weight:.2f} bits/weight", total, f"{whole:.4f}", "100%")
    Console(highlight=False).print(table)


def _option(settings: Mapping[str, object]) -> str:
    return f"{settings['bits']} g{settings['group_size']}"


def _rows(manifest: Manifest) -> list[tuple[str, str]]:
    layers = manifest.layers
    actions = Counter(layer.action for layer in layers)
    done = ", ".join(f"{actions[a]} {word}" for a, word in _WORDS.items() if actions[a])
    seconds = manifest.seconds
    stages = ", ".join(f"{k} {v:.1f}" for k, v in seconds.items() if k != "total")
    kept = sum(layer.nbytes for layer in layers if layer.action == "keep")
    rows = [
        ("Layers", done),
        ("Linear layers", f"{manifest.linear_bits_per_weight:.2f} bits/weight where converted"),
        (
            "Whole model",
            f"{manifest.bits_per_weight:.2f} bits/weight, {size(kept)} of weights kept unquantized",
        ),
        ("Size", f"{size(manifest.stored_bytes)}, the original has {size(manifest.source_bytes)}"),
        ("Time", f"{seconds['total']:.1f} s ({stages} in all threads)"),
    ]
    if refined := manifest.refinement:
        loss = f"{refined['before']:.4f} nats to {refined['after']:.4f} on held-out own text"
        rows.insert(3, ("Refined", f"from {loss}"))
    ratios = sorted(layer.snr_db for layer in layers if layer.snr_db is not None)
    if ratios:
        median = ratios[len(ratios) // 2]
        rows.insert(3, ("Signal to noise", f"median {median:.1f} dB, lowest {ratios[0]:.1f} dB"))
    return rows


_WORDS = {"split": "split", "quantize": "quantized", "keep": "kept"}


def _notes(layers: tuple[LayerRecord, ...]) -> list[str]:
    """Name the layers that differ from the recipe, those with the same reason together."""
    by_note: dict[str, list[LayerRecord]] = {}
    for layer in layers:
        if layer.note:
            by_note.setdefault(f"{_WORDS[layer.action]}: {layer.note}", []).append(layer)
    lines = []
    for note, group in by_note.items():
        names = ", ".join(layer.path for layer in group[:MOST_NOTES])
        more = f" and {len(group) - MOST_NOTES} more" if len(group) > MOST_NOTES else ""
        lines.append(f"{note}: {names}{more}")
    return lines
