"""Draw the pictures of the documents.

docs/split.png: what the split does to one weight matrix, and what it gains. docs/equal-bytes.svg:
what whole files keep, by size, from docs/results.

Run from the repository: python docs/picture.py
"""

from pathlib import Path

import mlx.core as mx
import numpy as np
from figures import whole_files, without_ablations
from matplotlib import rc_context
from matplotlib.figure import Figure

from splitquant_mlx import cluster_weight, dequantize, quantize, quantize_parts, split

# marker, colour and line of the plot, by what the names of the variants begin with
FAMILIES = {
    "rtn": ("o", "#8c8c8c", "-"),
    "auto": ("o", "#4c72b0", "-"),
    "gptq": ("s", "#55a868", ""),
    "mlx_lm.convert": ("x", "#c44e52", ""),
    "mlx_lm.gptq": ("P", "#dd8452", ""),
    "mlx_lm.awq": ("^", "#8172b3", ""),
    "mlx_lm.dynamic_quant": ("v", "#937860", ""),
    "hqq": ("D", "#da8bc3", ""),
}
COLORS = ("#4c72b0", "#55a868", "#c44e52")
NAMES = ("lower", "middle", "upper")


def draw_split() -> None:
    """Split a bell-shaped matrix with a few large entries; plot the parts and the errors."""
    rng = np.random.default_rng(0)
    w = rng.standard_normal((256, 64)).astype(np.float32) * 0.02
    w[rng.random(w.shape) < 0.002] *= 4
    w = mx.array(w)
    parts = split(w)
    cuts = cluster_weight(w).cut_points
    whole = dequantize(quantize(w))
    summed = dequantize(quantize_parts(parts)).reshape(256, 3, 64).sum(axis=1)

    figure = Figure(figsize=(10, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    for part, color, name in zip(parts, COLORS, NAMES, strict=True):
        entries = np.array(part)
        entries = entries[entries != 0]
        left.hist(entries, 60, range=(-0.1, 0.1), color=color, label=f"{name} part")
    for cut in cuts:
        left.axvline(cut, color="black", linestyle="--", linewidth=1)
    left.set(yscale="log", ylim=(0.5, 10_000), xticks=(-0.1, -0.05, 0, 0.05, 0.1))
    left.set(xlabel="weight", ylabel="entries", title="k-means cuts one weight matrix")
    left.legend(ncols=3)
    for w_hat, color, name in ((whole, "#8c8c8c", "INT4"), (summed, "#4c72b0", "split, then INT4")):
        error = np.array(w_hat - w).ravel()
        rms = np.sqrt((error**2).mean())
        label = f"{name}: rms error {rms:.1e}"
        right.hist(error, 80, range=(-0.006, 0.006), color=color, alpha=0.7, label=label)
    right.set(ylim=(0, 2300), xticks=(-0.005, 0, 0.005))
    right.set(xlabel="quantized - original weight", ylabel="entries", title="the error left")
    right.legend()
    figure.savefig(Path(__file__).with_name("split.png"), dpi=110)


def draw_equal_bytes() -> None:
    """Plot divergence against bytes of whole files, a panel for each model with several rtn."""
    models = {
        model: rows
        for model, rows in whole_files().items()
        if sum(row["variant"].startswith("rtn") for row in rows) > 1
    }
    with rc_context({"svg.hashsalt": "equal-bytes"}):
        figure = Figure(figsize=(10, 7), layout="constrained")
        for axes, (model, rows) in zip(figure.subplots(2, 2).flat, models.items(), strict=True):
            for family, (marker, color, line) in FAMILIES.items():
                points = [
                    (row["weight_file_bytes"] / 1e6, row["kl_mean"])
                    for row in without_ablations(rows)
                    if row["variant"].startswith(family) and not row["variant"].endswith("refined")
                ]
                axes.plot(
                    *zip(*points, strict=True) if points else ((), ()),
                    marker=marker,
                    color=color,
                    linestyle=line,
                    label=family,
                )
            axes.set(yscale="log", title=model, xlabel="MB on disc", ylabel="KL, nats")
            axes.grid(alpha=0.3)
        handles, labels = axes.get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=4)
        figure.savefig(Path(__file__).with_name("equal-bytes.svg"), metadata={"Date": None})


if __name__ == "__main__":
    draw_split()
    draw_equal_bytes()
