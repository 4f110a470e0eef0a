"""Plots of a layer's histogram with its cut points, as text and as PNG."""

from pathlib import Path

from splitquant_mlx.inspection.layers import Histogram
from splitquant_mlx.runtime.disk import as_target_error

EIGHTHS = " ▁▂▃▄▅▆▇█"
WIDTH, HEIGHT = 78, 10  # characters


def text_histogram(histogram: Histogram) -> str:
    """Return the histogram as lines of block characters, with marks below at the cut points.

    The height is logarithmic in the count, so that rare large weights are visible.
    """
    import numpy as np

    low, high = histogram.edges[0], histogram.edges[-1]
    centers = (histogram.edges[:-1] + histogram.edges[1:]) / 2
    columns, _ = np.histogram(centers, WIDTH, (low, high), weights=histogram.counts)
    levels = np.log1p(columns) / np.log1p(columns.max()) * HEIGHT * 8
    lines = []
    for row in reversed(range(HEIGHT)):
        filled = np.clip(np.ceil(levels - row * 8), 0, 8).astype(int)
        lines.append("".join(EIGHTHS[n] for n in filled))
    marks = [" "] * WIDTH
    for cut_point in histogram.cut_points:
        marks[min(int((cut_point - low) / max(high - low, 1e-300) * WIDTH), WIDTH - 1)] = "^"
    scale = f"{low:.4g}".ljust(WIDTH - 10) + f"{high:.4g}".rjust(10)
    legend = "(height: log of count)"
    if cut_points := ", ".join(f"{cut_point:.4g}" for cut_point in histogram.cut_points):
        lines.append("".join(marks))
        legend = f"cut points: {cut_points} {legend}"
    return "\n".join([*lines, scale, legend])


def save_histogram(histogram: Histogram, file: Path) -> None:
    """Write the histogram as a PNG. Raises TargetError when it cannot be written."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.add_subplot()
    axes.stairs(histogram.counts, histogram.edges, fill=True, color="#4c72b0")
    for cut_point in histogram.cut_points:
        label = f"cut point {cut_point:.4g}"
        axes.axvline(cut_point, color="#c44e52", linestyle="--", label=label)
    axes.set(yscale="log", xlabel="weight", ylabel="entries", title=histogram.path)
    if histogram.cut_points:
        axes.legend()
    with as_target_error(file):
        figure.savefig(file, format="png", dpi=150)
