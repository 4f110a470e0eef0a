"""Plots of a report: quality against size, decoding speed and a weight histogram."""

import math
import warnings
from base64 import b64encode
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from io import BytesIO
from itertools import cycle
from typing import TYPE_CHECKING, Any

from splitquant_mlx.report.rows import Report, Row

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MARKERS = "osD^vP*X<>"
STYLE: Any = {
    "figure.figsize": (5.4, 3.8),  # inches; about a phone's width, so that text is not scaled down
    "figure.constrained_layout.use": True,
    "svg.fonttype": "none",
    "svg.hashsalt": "splitquant-mlx",
    "text.parse_math": False,
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
}


@dataclass(frozen=True, kw_only=True)
class Plot:
    """A plot as data URIs of SVG images, for light and for dark pages."""

    title: str
    caption: str
    light: str
    dark: str


def plots(report: Report) -> list[Plot]:
    """Return the plots for which there are results, KL divergence first."""
    plots = []
    if drawn := [row for row in report.rows if _kl(row)]:
        missing = [row.variant for row in report.rows if row.kl is not None and not _kl(row)]
        caption = "Lower left is better. Bars: 95 % interval."
        caption += f" Not finite or not above 0, not drawn: {', '.join(missing)}." * bool(missing)
        title = "KL divergence from the original"
        plots.append(_plot(title, caption, partial(_draw_kl, rows=drawn)))
    for heading, is_shown in report.arc_headings.items():
        rows = [row for row in report.rows if heading in row.accuracies and row.stored_bytes]
        if is_shown and rows:
            caption = "Upper left is better. Bars: one standard error."
            draw = partial(_draw_accuracy, heading=heading, rows=rows)
            plots.append(_plot(heading, caption, draw))
    if timed := [row for row in report.rows if row.get("speed", "decode_tokens_per_s")]:
        caption = "Longer is faster. Thin lines: slowest to fastest trial."
        plots.append(_plot("Decoding speed", caption, partial(_draw_speed, rows=timed)))
    weights = next((row.values["weights"] for row in report.rows if "weights" in row.values), None)
    if weights is not None:
        caption = "Dashed: k-means boundaries between the parts of the layer."
        title = f"Weights of {weights['layer']}"
        plots.append(_plot(title, caption, partial(_draw_weights, values=weights)))
    return plots


def _plot(title: str, caption: str, draw: "Callable[[Axes], None]") -> Plot:
    return Plot(
        title=title,
        caption=caption,
        light=_svg(draw, "default"),
        dark=_svg(draw, "dark_background"),
    )


def _svg(draw: "Callable[[Axes], None]", style: str) -> str:
    """Return a figure as a data URI."""
    from matplotlib import style as styles
    from matplotlib.figure import Figure

    stream = BytesIO()
    with styles.context([style, STYLE]), warnings.catch_warnings():
        # the SVG stores text, which the viewer renders in its own fonts
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        figure = Figure()
        draw(figure.add_subplot())
        metadata = {"Date": None, "Creator": None}
        figure.savefig(stream, format="svg", transparent=True, metadata=metadata)
    return f"data:image/svg+xml;base64,{b64encode(stream.getvalue()).decode()}"


def _kl(row: Row) -> float | None:
    """Return the KL divergence; None unless it fits a logarithmic axis and the size is known."""
    kl = row.kl
    return kl if row.stored_bytes and kl is not None and math.isfinite(kl) and kl > 0 else None


def _draw_kl(axes: "Axes", rows: list[Row]) -> None:
    def point(row: Row) -> tuple[float, float, float]:
        kl, low, high = row.kl or 0.0, row.get("kl", "kl_low"), row.get("kl", "kl_high")
        return (kl, 0.0, 0.0) if low is None else (kl, kl - low, high - kl)

    axes.set(xscale="log", yscale="log", ylabel="KL divergence, nats per token")
    _draw_points(axes, rows, point)


def _draw_accuracy(axes: "Axes", heading: str, rows: list[Row]) -> None:
    def point(row: Row) -> tuple[float, float, float]:
        accuracy = row.accuracies[heading]
        error = 100 * (accuracy.standard_error or 0.0)
        return 100 * accuracy.value, error, error

    axes.set(xscale="log", ylabel=f"{heading}, % correct")
    _draw_points(axes, rows, point)


def _draw_points(
    axes: "Axes", rows: list[Row], point: Callable[[Row], tuple[float, float, float]]
) -> None:
    """Draw (y, error below, error above) of each row over its size, with one marker per series."""
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    names = dict.fromkeys(row.series for row in rows)
    for name, marker in zip(names, cycle(MARKERS), strict=False):
        series = [row for row in rows if row.series == name]
        sizes = [(row.stored_bytes or 0) / 1e6 for row in series]
        y, *errors = zip(*map(point, series), strict=True)
        axes.errorbar(sizes, y, yerr=errors, label=name, marker=marker, linestyle="", elinewidth=1)
    axes.set_xlabel("size, MB")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 1.2, 1.5, 2, 3, 5, 7)))
    for axis in (axes.xaxis, axes.yaxis):
        if axis.get_scale() == "log":
            axis.set_major_formatter(StrMethodFormatter("{x:g}"))
            axis.set_minor_formatter(NullFormatter())
    axes.legend(frameon=False)


def _draw_speed(axes: "Axes", rows: list[Row]) -> None:
    places = range(len(rows))
    speeds = [row.get("speed", "decode_tokens_per_s") for row in rows]
    axes.barh(places, speeds, color="tab:blue")
    for place, row in enumerate(rows):
        low, high = (row.get("speed", f"decode_tokens_per_s_{end}") for end in ("min", "max"))
        if low is not None and high is not None:
            axes.plot((low, high), (place, place), color="tab:orange")
    axes.set_yticks(places, [row.variant[:30] for row in rows], fontsize=7)
    axes.set(xlabel="decoded tokens/s", ylim=(len(rows) - 0.5, -0.5), xlim=(0, None))
    axes.grid(axis="y", visible=False)


def _draw_weights(axes: "Axes", values: Any) -> None:
    axes.stairs(values["counts"], values["edges"], fill=True, baseline=0.5)
    for cut_point in values["cut_points"]:
        axes.axvline(cut_point, color="tab:orange", linestyle="--")
    axes.set(yscale="log", ylim=(0.5, None), xlabel="weight", ylabel="entries")
