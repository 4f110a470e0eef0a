"""Make figures that fit any page: SVG text in the page's font, in its ink, light or dark."""

import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from html import escape
from io import StringIO
from typing import TYPE_CHECKING, Any

from splitquant_mlx.errors import RecipeError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PLAIN, SPLIT, REFERENCE = "#4c72b0", "#c44e52", "#8c8c8c"
SERIES = (PLAIN, "#55a868", "#dd8452", SPLIT, "#8172b3", "#937860")
WIDTH_IN = 5.4  # near a phone's width at 72 points an inch, so that text keeps its size there
INK = "#010203"  # stands for the page's own text colour until the SVG is written
LONGEST_LABEL = 26
STYLE: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "splitquant-mlx",
    "text.parse_math": False,
    "font.size": 9,
    "text.color": INK,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.grid": True,
    "grid.color": INK,
    "grid.alpha": 0.14,
    "grid.linewidth": 0.6,
    "xtick.color": INK,
    "ytick.color": INK,
    "legend.frameon": False,
}


@contextmanager
def house_style() -> Iterator[None]:
    """Set the style of every figure drawn and written in the block.

    Raises:
        RecipeError: when matplotlib is missing.
    """
    try:
        import matplotlib as mpl
    except ImportError as exc:
        raise RecipeError("plots need matplotlib: pip install matplotlib") from exc
    with mpl.rc_context(STYLE), warnings.catch_warnings():
        # the page's own fonts draw the text, whatever matplotlib's fonts lack
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        yield


def svg(figure: "Figure", name: str, description: str) -> str:
    """Return the figure as an <svg> element; ids start with `name`, so pages can hold several."""
    stream = StringIO()
    figure.savefig(
        stream,
        format="svg",
        transparent=True,
        metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")),
    )
    text = stream.getvalue()
    text = text[text.index("<svg") :].strip()
    text = re.sub(r"<!--.*?-->|<metadata>.*?</metadata>|<style.*?</style>", "", text, flags=re.S)
    # tags alone: labels are the study's own words, whatever they look like
    text = re.sub(r"<[^>]*>", lambda tag: _restyled(tag.group(), name), text)
    box = re.search(r'viewBox="[^"]*"', text)
    assert box
    opening = (
        f'<svg {box.group()} role="img" aria-label="{escape(description)}" '
        'stroke-linejoin="round" xmlns="http://www.w3.org/2000/svg" '
        'xmlns:xlink="http://www.w3.org/1999/xlink">'
    )
    return opening + text[text.index(">") + 1 :]


def _restyled(tag: str, name: str) -> str:
    tag = re.sub(r'\bid="', f'id="{name}-', tag)
    tag = re.sub(r'(url\(|href=")#', rf"\g<1>#{name}-", tag)
    tag = re.sub(r"'DejaVu Sans'[^;\"]*", "sans-serif", tag)
    return tag.replace(INK, "currentColor")


def shortened(name: str) -> str:
    """Return a label that fits beside a plot: the middle of a long name goes."""
    if len(name) <= LONGEST_LABEL:
        return name
    return f"{name[: LONGEST_LABEL - 12]}…{name[-11:]}"
