"""Choose and draw the plots that a report's results allow."""

import json
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from splitquant_mlx.report.bars import draw_bars, draw_histogram
from splitquant_mlx.report.numbers import significant
from splitquant_mlx.report.rows import ARC, Report, Row
from splitquant_mlx.report.scatter import Point, draw_scatter
from splitquant_mlx.report.svg import PLAIN, REFERENCE, SPLIT, house_style, svg
from splitquant_mlx.study.results import Result

if TYPE_CHECKING:
    from matplotlib.figure import Figure

STAGES = ("read", "calibrate", "cluster", "quantize", "write")


@dataclass(frozen=True, kw_only=True)
class Chart:
    """Hold a plot: its title, a caption, and the <svg> element."""

    title: str
    caption: str
    svg: str


def charts(report: Report) -> list[Chart]:
    """Return the plots, as SVG without scripts or outside references.

    Raises:
        RecipeError: when matplotlib is missing.
    """
    with house_style():
        found = [_kl(report), *(_accuracy(report, heading) for heading, _, _ in ARC)]
        found += [_stages(report), _speed(report), *_weights(report)]
    return [chart for chart in found if chart is not None]


def _kl(report: Report) -> Chart | None:
    rows = [row for row in report.rows if not row.is_reference and row.kl is not None]
    # a logarithm needs more than 0, which rounding can undercut for a very close model
    points = [_point(row, kl) for row in rows if (kl := row.kl or 0.0) > 0 and _drawable(row, kl)]
    if not points:
        return None
    figure = draw_scatter(points, label="KL divergence, nats", log=True)
    caption = "Lower left is better: fewer bits, closer to the original. Both axes logarithmic."
    caption += _left_out([row for row in rows if row.variant not in {p.name for p in points}])
    return _chart("Distance from the original", caption, figure, "kl", points)


def _accuracy(report: Report, heading: str) -> Chart | None:
    found = [(row, row.accuracies[heading]) for row in report.rows if heading in row.accuracies]
    points, line = [], None
    for row, accuracy in found:
        if row.is_reference:
            line = (row.variant, accuracy.value * 100)
        elif _drawable(row, accuracy.value):
            points.append(_point(row, accuracy.value * 100, (accuracy.standard_error or 0.0) * 100))
    if not points:
        return None
    label = f"{heading}, % right"
    figure = draw_scatter(points, label=label, more_is_better=True, line=line)
    caption = "Upper left is better: fewer bits, more right answers. Bars: one standard error."
    name = heading.lower().replace(" ", "-")
    return _chart(heading, caption, figure, name, points)


def _stages(report: Report) -> Chart | None:
    rows = [row for row in report.rows if row.stage_seconds.keys() - {"total"}]
    if not rows:
        return None
    found = dict.fromkeys((*STAGES, *(name for row in rows for name in row.stage_seconds)))
    names = [n for n in found if n != "total" and any(row.stage_seconds.get(n) for row in rows)]
    series = {name: [row.stage_seconds.get(name, 0.0) for row in rows] for name in names}
    figure = draw_bars(
        [row.variant for row in rows], series, label="seconds, added up over threads"
    )
    caption = "Where a conversion's time goes."
    described = "; ".join(
        f"{row.variant} {significant(sum(row.stage_seconds.get(n, 0.0) for n in names))} s"
        for row in rows
    )
    title = "Seconds of each stage"
    alt = f"Stacked bars of {', '.join(names)}: {described}"
    return Chart(title=title, caption=caption, svg=svg(figure, "stages", alt))


def _speed(report: Report) -> Chart | None:
    timed = [(row, row.decode_tokens_per_s) for row in report.rows]
    found = [(row, speed) for row, speed in timed if speed is not None]
    if not found:
        return None
    rows = [row for row, _ in found]
    names, speeds = [row.variant for row in rows], [speed for _, speed in found]
    ranges = [row.decode_range for row in rows]
    colors = [SPLIT if row.is_split else REFERENCE if row.is_reference else PLAIN for row in rows]
    figure = draw_bars(
        names, {"decode": speeds}, label="decoded tokens/s", colors=[colors], ranges=ranges
    )
    alt = "Bars of tokens/s: " + "; ".join(
        f"{name} {significant(speed)}" for name, speed in zip(names, speeds, strict=True)
    )
    caption = "More is faster; red: split, grey: the original."
    caption += " Thin lines: slowest to fastest trial." if any(ranges) else ""
    return Chart(title="Decoding speed", caption=caption, svg=svg(figure, "speed", alt))


def _weights(report: Report) -> list[Chart]:
    order = [row.variant for row in report.rows]
    found: dict[str, list[Result]] = {}
    for result in report.results:
        if result.part == "weights":
            found.setdefault(json.dumps(result.values, sort_keys=True), []).append(result)
    same = [sorted(group, key=lambda r: order.index(r.variant)) for group in found.values()]
    drawn = []
    for place, group in enumerate(sorted(same, key=lambda g: order.index(g[0].variant))):
        values = group[0].values
        cuts = ", ".join(f"{cut:.4g}" for cut in values["cut_points"])
        names = ", ".join(result.variant for result in group)
        caption = f"{names}: k-means cuts the weights at {cuts}. Logarithmic counts."
        alt = f"Histogram of the weights of {values['layer']}, cut at {cuts}"
        text = svg(draw_histogram(values), f"weights{place}", alt)
        drawn.append(Chart(title=f"Weights of {values['layer']}", caption=caption, svg=text))
    return drawn


def _point(row: Row, y: float, error: float = 0.0) -> Point:
    x = row.bits_per_weight or 0.0
    return Point(name=row.variant, x=x, y=y, error=error, is_split=row.is_split)


def _drawable(row: Row, value: float) -> bool:
    return (row.bits_per_weight or 0.0) > 0 and math.isfinite(value)


def _left_out(rows: list[Row]) -> str:
    if not rows:
        return ""
    names = ", ".join(f"{row.variant} ({significant(row.kl)})" for row in rows)
    return f" Not on the plot: {names}."


def _chart(title: str, caption: str, figure: "Figure", name: str, points: list[Point]) -> Chart:
    described = "; ".join(
        f"{point.name} {significant(point.y)} at {significant(point.x)}" for point in points
    )
    alt = f"{title} against bits/weight: {described}"
    return Chart(title=title, caption=caption, svg=svg(figure, name, alt))
