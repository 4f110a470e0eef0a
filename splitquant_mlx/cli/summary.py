"""Print the estimate, the chosen bits and the result of a conversion."""

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from splitquant_mlx.cli.console import next_step, pairs, show, size
from splitquant_mlx.cli.lm_studio import HOME
from splitquant_mlx.formats.manifest import ACTIONS, Manifest, count_actions

if TYPE_CHECKING:
    from splitquant_mlx.conversion.bits import Forecast
    from splitquant_mlx.inspection.estimate import Estimate
    from splitquant_mlx.recipe import Recipe


def print_summary(manifest: Manifest, path: Path) -> None:
    """Print the result of a conversion, the programs that run it and the next command."""
    from splitquant_mlx.models.loader import tokenizer_problem

    show(pairs(*_rows(manifest)))
    for text in [*manifest.warnings, *notes(manifest.layers)]:
        show(f"  {text}")
    for text in _where_it_runs(manifest):
        show(text)
    if tokenizer_problem(path):
        show(f"Saved in {path}. It has no usable tokenizer: add one before you run it.")
    else:
        next_step(f"Saved in {path}.", "chat", path)


def print_estimate(estimate: "Estimate", recipe: "Recipe", target: Path) -> None:
    """Print the estimate of a conversion."""
    guess = " (a guess: depends on --max-kl)" if recipe.max_kl else ""
    fits = [("Fits", estimate.explanation)] if estimate.explanation else []
    original = size(estimate.source_bytes)
    show(
        pairs(
            ("Method", recipe.method),
            *fits,
            ("Layers", count_actions(estimate.layers)),
            ("Size", f"{size(estimate.stored_bytes)}, original {original}{guess}"),
            ("Whole model", f"{estimate.bits_per_weight:.2f} bits/weight{guess}"),
            ("Memory", _memory(estimate.memory_bytes)),
            ("Time", _time(estimate.seconds, runs=recipe.runs_the_model)),
            ("Target", str(target)),
        )
    )
    for text in notes(estimate.layers):
        show(f"  {text}")
    show("Dry run: nothing was converted.")


def print_forecast(forecast: "Forecast") -> None:
    """Print the choice of method "auto": bits, size and predicted KL per kind of layer."""
    from rich.table import Table

    names = {path: path.split(".")[-2:] for path in forecast.nbytes}
    parents = Counter(leaf for *_, leaf in {tuple(name) for name in names.values()})
    kinds: dict[str, list[str]] = {}
    for path, (*parent, leaf) in names.items():
        kind = ".".join([*parent, leaf] if parents[leaf] > 1 else [leaf])
        kinds.setdefault(kind, []).append(path)
    whole = sum(forecast.divergence.values())
    table = Table("layers", "bits (layers)", "size", "KL, nats", "share", box=None)
    for kind, paths in kinds.items():
        chosen = Counter(_option(forecast.recipe.layers[path]) for path in paths)
        loss = sum(forecast.divergence[path] for path in paths)
        table.add_row(
            kind,
            ", ".join(f"{option} ({count})" for option, count in sorted(chosen.items())),
            size(sum(forecast.nbytes[path] for path in paths)),
            f"{loss:.2g}",
            f"{loss / whole:.0%}" if whole else "",
        )
    table.add_section()
    bits, total = f"{forecast.bits_per_weight:.2f} bits/weight", sum(forecast.nbytes.values())
    table.add_row("all", bits, size(total), f"{whole:.2g}", "100%")
    table.add_row("whole checkpoint", "", size(forecast.total_bytes), f"{whole:.2g}", "")
    if larger := forecast.next_size:
        bits, loss = f"{larger.bits_per_weight:.2f} bits/weight", f"{larger.divergence:.2g}"
        table.add_row("next size up", bits, size(larger.total_bytes), loss, "")
    else:
        table.add_row("next size up", "none: this is the best", "", "", "")
    if forecast.explanation:
        show(f"Fits: {forecast.explanation}.")
    show(table)
    if forecast.mixture:
        show(
            "The KL of a mixture of experts is predicted with the routing of the original: where "
            "errors change the routing, small mixtures had two to three times the predicted KL."
        )


def notes(layers: Iterable[Any]) -> list[str]:
    """Return one line per reason why layers differ from the recipe, with the layers."""
    by_reason: dict[str, Counter[str]] = {}
    for layer in layers:
        if layer.note or layer.action == "keep":
            reason = f"{ACTIONS[layer.action]}: {layer.note or f'the {layer.kind}, as requested'}"
            pattern = re.sub(r"\.\d+\.", ".*.", layer.path)
            by_reason.setdefault(reason, Counter())[pattern] += 1
    return [
        f"{reason}: "
        + ", ".join(f"{name} ({count})" if count > 1 else name for name, count in names.items())
        for reason, names in by_reason.items()
    ]


def _option(settings: Mapping[str, Any]) -> str:
    return f"{settings['bits']} g{settings['group_size']}"


def _rows(manifest: Manifest) -> list[tuple[str, str]]:
    layers = manifest.layers
    kept = sum(layer.nbytes for layer in layers if layer.action == "keep")
    share = f", {size(kept)} of it not quantized" if kept else ""
    rows = [
        ("Layers", count_actions(layers)),
        _bits(manifest),
        ("Whole model", f"{manifest.bits_per_weight:.2f} bits/weight"),
        ("Size", f"{size(manifest.stored_bytes)}{share}; original {size(manifest.source_bytes)}"),
    ]
    ratios = sorted(layer.snr_db for layer in layers if layer.snr_db is not None)
    if ratios:
        median = ratios[len(ratios) // 2]
        rows.append(
            ("Signal to noise", f"{median:.0f} dB (median of layers; worst {ratios[0]:.0f})")
        )
    if refined := manifest.refinement:
        loss = f"{refined['before']:.4f} to {refined['after']:.4f} nats per token"
        rows.append(("Refined", f"KL divergence {loss}, on held-out text"))
    seconds = manifest.seconds
    stages = ", ".join(f"{k} {v:.1f}" for k, v in seconds.items() if k != "total" and v >= 0.05)
    parts = f" (sum of threads: {stages})" if stages else ""
    rows.append(("Time", f"{seconds['total']:.1f} s{parts}"))
    return rows


def _bits(manifest: Manifest) -> tuple[str, str]:
    """Return the bits/weight of the linear layers, or of all quantized layers for "auto"."""
    if manifest.recipe.get("method") != "auto":
        return "Linear layers", f"{manifest.linear_bits_per_weight:.2f} bits/weight"
    quantized = [layer for layer in manifest.layers if layer.action != "keep"]
    weights = sum(math.prod(layer.shape) for layer in quantized)
    stored = 8 * sum(layer.nbytes for layer in quantized)
    return "Quantized", f"{stored / max(weights, 1):.2f} bits/weight, including embeddings"


def _where_it_runs(manifest: Manifest) -> list[str]:
    """Return lines on the programs that run the model, and on the size of a split."""
    if any(layer.action == "split" for layer in manifest.layers):
        ratio = manifest.linear_bits_per_weight / 4.5
        return [
            f"Linear layers take {ratio:.1f} x the bytes of plain 4-bit. Runs here, in mlx-lm with "
            "--trust-remote-code and in mlx-vlm; not in LM Studio.",
            "For LM Studio, or the most accurate model of a given size: --method auto.",
        ]
    if any(layer.needs_code for layer in manifest.layers):
        return [
            "Runs here, in mlx-lm with --trust-remote-code and in mlx-vlm; not in LM Studio.",
            "For LM Studio: --method auto.",
        ]
    return [
        f"Runs in mlx-lm and, moved or linked to {HOME}/USER/NAME (by --lmstudio), in LM Studio."
    ]


def _memory(needed_bytes: float) -> str:
    """Return the needed and the free memory."""
    from splitquant_mlx.runtime.memory import free_bytes, memory_bytes

    free = f"{free_bytes() / 1e9:.1f} of this machine's {memory_bytes() / 1e9:.1f} GB are free"
    return f"about {needed_bytes / 1e9:.1f} GB ({free})"


def _time(seconds: float, *, runs: bool) -> str:
    """Return the estimated time and what was timed; `runs`: whether the model was run."""
    text = f"{seconds / 3600:.1f} h"
    if seconds < 5400:
        text = f"{seconds / 60:.0f} min" if seconds >= 60 else f"{max(1, seconds):.0f} s"
    part = "one block" if runs else "one layer"
    return f"about {text} (rough: extrapolated from {part}, for an idle machine)"
