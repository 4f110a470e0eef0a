"""Draw quality against size, a label beside every point."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from splitquant_mlx.report.pareto import pareto_front
from splitquant_mlx.report.svg import INK, PLAIN, SPLIT, WIDTH_IN, shortened

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

TICKS = (*range(1, 17), 20, 24, 28, 32, 48, 64)
LINE_IN = 0.165  # height of a line of labels


@dataclass(frozen=True, kw_only=True)
class Point:
    """Hold one variant's place: `x` bits/weight, `y` its quality, `error` its standard error."""

    name: str
    x: float
    y: float
    error: float = 0.0
    is_split: bool = False


def draw_scatter(
    points: Sequence[Point],
    *,
    label: str,
    more_is_better: bool = False,
    log: bool = False,
    line: tuple[str, float] | None = None,
) -> "Figure":
    """Return a figure of `points`, the Pareto front as a line, `line` as (name, height)."""
    from matplotlib.figure import Figure

    height = max(3.3, LINE_IN * len(points) + 1.2)
    figure = Figure(figsize=(WIDTH_IN, height))
    longest = max(len(shortened(point.name)) for point in points)
    right = 1 - min(0.05 + 0.0122 * longest, 0.39)
    axes = figure.add_axes((0.125, 0.5 / height, right - 0.125, 1 - 1.1 / height))
    sign = -1 if more_is_better else 1
    front = pareto_front([(point.x, sign * point.y) for point in points])
    best = sorted((p.x, p.y) for p, on_front in zip(points, front, strict=True) if on_front)
    axes.step(*zip(*best, strict=True), where="post", color=INK, alpha=0.55, linewidth=1)
    for point, on_front in zip(points, front, strict=True):
        _mark(axes, point, on_front)
    if line is not None:
        axes.axhline(line[1], color=INK, linestyle="--", linewidth=0.8)
    axes.set(xscale="log", yscale="log" if log else "linear")
    axes.set_title(label, loc="left", fontsize=9)  # beside the ticks, long ones would push it out
    axes.set_xlabel("bits/weight, whole model")
    axes.margins(0.08)
    _ticks(axes)
    _labels(axes, points, front, height)
    _legend(figure, points, line)
    return figure


def spread(wanted: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Return places at least `gap` apart and in order, with the least sum of squared moves.

    Less i * gap, the i-th place need only be no lower than the one before: isotonic regression,
    which pools neighbours that are out of order into blocks at their mean. `wanted` ascends. Where
    all fit between `low` and `high` they stay there, otherwise they start at `low`.
    """
    blocks: list[tuple[float, int]] = []  # sum and number of pooled values
    for i, value in enumerate(wanted):
        total, count = value - i * gap, 1
        while blocks and blocks[-1][0] / blocks[-1][1] >= total / count:
            other, number = blocks.pop()
            total, count = total + other, count + number
        blocks.append((total, count))
    free = [total / count for total, count in blocks for _ in range(count)]
    top = max(high - (len(free) - 1) * gap, low)
    return [min(max(place, low), top) + i * gap for i, place in enumerate(free)]


def _mark(axes: "Axes", point: Point, on_front: bool) -> None:
    color = SPLIT if point.is_split else PLAIN
    axes.errorbar(
        point.x,
        point.y,
        yerr=point.error or None,
        fmt="s" if point.is_split else "o",
        color=color,
        markersize=6,
        markerfacecolor=color if on_front else "none",
        elinewidth=0.9,
        zorder=3,
    )


def _ticks(axes: "Axes") -> None:
    from matplotlib.ticker import FuncFormatter, NullFormatter, NullLocator

    axes.set_xlim(_widened(axes.get_xlim(), 2.0))  # so that one of TICKS is in sight
    low, high = (math.log(limit) for limit in axes.get_xlim())
    shown: list[int] = []
    for tick in TICKS:
        place = (math.log(tick) - low) / (high - low)
        last = (math.log(shown[-1]) - low) / (high - low) if shown else -1.0
        if 0 <= place <= 1 and place - last > 0.07:
            shown.append(tick)
    axes.set_xticks(shown, [f"{tick}" for tick in shown])
    axes.xaxis.set_minor_locator(NullLocator())
    if axes.get_yscale() == "log":
        axes.set_ylim(_widened(axes.get_ylim(), 30.0))  # so that a power of ten is in sight
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())


def _widened(limits: tuple[float, float], ratio: float) -> tuple[float, float]:
    """Return limits with the same middle on a logarithm, high / low at least `ratio`."""
    low, high = limits
    room = max(1.0, (ratio * low / high) ** 0.5)
    return low / room, high * room


def _labels(
    axes: "Axes", points: Sequence[Point], front: Sequence[bool], figure_height: float
) -> None:
    pixels = axes.transData.transform([(point.x, point.y) for point in points])
    heights = axes.transAxes.inverted().transform(pixels)[:, 1]
    order = sorted(range(len(points)), key=lambda i: (heights[i], points[i].name))
    gap = LINE_IN / (axes.get_position().height * figure_height)
    places = spread([heights[i] for i in order], gap, 0.0, 1.0)
    for i, place in zip(order, places, strict=True):
        axes.annotate(
            shortened(points[i].name),
            (points[i].x, points[i].y),
            xytext=(1.05, place),
            textcoords="axes fraction",
            va="center",
            fontsize=8,
            fontweight="bold" if front[i] else "normal",
            annotation_clip=False,
            arrowprops={
                "arrowstyle": "-",
                "color": INK,
                "alpha": 0.3,
                "linewidth": 0.6,
                "relpos": (0, 0.5),
                "shrinkA": 1,
                "shrinkB": 4,
            },
        )


def _legend(figure: "Figure", points: Sequence[Point], line: tuple[str, float] | None) -> None:
    from matplotlib.lines import Line2D

    kinds = [("plain", "o", PLAIN), ("split", "s", SPLIT)]
    drawn = {"split" if point.is_split else "plain" for point in points}
    keys = [
        Line2D([], [], marker=marker, color=color, linestyle="", label=name)
        for name, marker, color in kinds
        if name in drawn
    ]
    keys.append(Line2D([], [], color=INK, alpha=0.55, label="Pareto front (filled, bold)"))
    if line is not None:
        keys.append(Line2D([], [], color=INK, linestyle="--", label=shortened(line[0])))
    figure.legend(
        handles=keys, loc="upper left", ncols=len(keys), columnspacing=1.2, handletextpad=0.5
    )
