"""Draw one horizontal bar for each variant, and the histogram of one weight matrix."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from splitquant_mlx.report.svg import INK, SERIES, WIDTH_IN, shortened

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def draw_bars(
    names: Sequence[str],
    series: Mapping[str, Sequence[float]],
    *,
    label: str,
    colors: Sequence[str | Sequence[str]] = SERIES,
    ranges: Sequence[tuple[float, float] | None] | None = None,
) -> "Figure":
    """Return stacked bars, the first name on top.

    `colors` has one entry for each series, a colour or one for each bar; `ranges` are drawn as
    lines from low to high.
    """
    from matplotlib.figure import Figure

    stacked = len(series) > 1
    height = 0.22 * len(names) + (1.1 if stacked else 0.8)
    figure = Figure(figsize=(WIDTH_IN, height), layout="constrained")
    axes = figure.add_subplot()
    places = list(range(len(names)))
    left = [0.0] * len(names)
    for (name, values), color in zip(series.items(), colors, strict=False):
        axes.barh(places, values, left=left, height=0.68, color=color, label=name)
        left = [a + b for a, b in zip(left, values, strict=True)]
    for place, found in zip(places, ranges or (), strict=False):
        if found is not None:
            axes.plot(found, (place, place), color=INK, linewidth=1.2)
    axes.set_yticks(places, [shortened(name) for name in names], fontsize=8)
    axes.grid(axis="y", visible=False)
    axes.set(xlabel=label, ylim=(len(names) - 0.5, -0.5))
    axes.set_xlim(left=0)
    if stacked:
        figure.legend(loc="outside upper center", ncols=min(len(series), 6), columnspacing=1.2)
    return figure


def draw_histogram(values: Mapping[str, Any]) -> "Figure":
    """Return the histogram of a "weights" result, a colour for each part between the cuts."""
    import numpy as np
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter

    figure = Figure(figsize=(WIDTH_IN, 3.0), layout="constrained")
    axes = figure.add_subplot()
    edges, counts = np.asarray(values["edges"]), np.asarray(values["counts"])
    cuts = np.sort(np.asarray(values["cut_points"], dtype=float))
    parts = np.searchsorted(cuts, (edges[:-1] + edges[1:]) / 2)
    for part in range(len(cuts) + 1):
        own = np.where(parts == part, counts, 0)
        axes.stairs(own, edges, fill=True, color=SERIES[part % len(SERIES)], baseline=0.5)
    for cut in cuts:
        axes.axvline(cut, color=INK, linestyle="--", linewidth=1)
    axes.set(yscale="log", ylim=(0.5, None), xlabel="weight", ylabel="entries")
    # the default writes powers of ten as formulas, which the style turns off
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    return figure
