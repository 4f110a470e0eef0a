"""Draw docs/split.png: what the split does to one weight matrix, and what it gains.

Run from the repository: python docs/picture.py
"""

from pathlib import Path

import mlx.core as mx
import numpy as np
from matplotlib.figure import Figure

from splitquant_mlx import cluster_weight, dequantize, quantize, quantize_parts, split

COLORS = ("#4c72b0", "#55a868", "#c44e52")
NAMES = ("lower", "middle", "upper")


def main() -> None:
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


if __name__ == "__main__":
    main()
