"""Fit scale and bias to one group of channels, for all rows at once.

As in `imatrix`, the squared error is weighted by the importance of each channel. Ranges of several
widths are tried, that of round to nearest among them; the codes of each give a regression, whose
line gives new codes, and so on. Of all scales and biases, rounded as they are stored, the best are
kept. On random weights of normal, Laplace's and Student's distribution this leaves 0.98 to 0.99 of
the error that the fewer ranges of `imatrix` do.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np

SHRINKS = (1.05, 1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.65)
REFITS = 6


def fit_group(
    columns: Any, importance: Any, *, top: int, stored: Callable[[Any], Any]
) -> tuple[Any, Any]:
    """Return the scale, not 0, and bias of each row, (out,) float32, of values that `stored` has.

    Args:
        columns: weights (group_size, out) float32, of numpy or mlx.
        importance: of each channel, not negative, (group_size,) float32.
        top: the largest code.
        stored: rounds values as they are stored.
    """
    group = _Group(columns, importance, top)
    xp = group.xp
    best = None
    for scale, bias in group.ranges():
        found = group.line(scale, group.codes(scale, bias))
        if best is not None:
            better = found.explained > best.explained
            found = _Line(*(xp.where(better, *pair) for pair in zip(found, best, strict=True)))
        best = found
    assert best is not None
    line, kept = best, None
    for _ in range(REFITS):
        scale, bias = stored(line.scale), stored(line.bias)
        codes = group.codes(scale, bias)
        new = group.error(codes, scale, bias), scale, bias
        if kept is not None:
            # a scale that vanishes or overflows in 16 bits has an error of NaN or infinity
            better = new[0] < kept[0]
            new = tuple(xp.where(better, *pair) for pair in zip(new, kept, strict=True))
        kept = new
        line = group.line(scale, codes)
    assert kept is not None
    _, scale, bias = kept
    return xp.where(scale == 0, 1.0, scale).astype(scale.dtype), bias


class _Line(NamedTuple):
    """A regression of the weights on their codes; `explained` is the squares that it does."""

    explained: Any
    scale: Any
    bias: Any


class _Group:
    """Weights of a group with what does not depend on their codes."""

    def __init__(self, columns: Any, importance: Any, top: int):
        self.xp: Any = np if isinstance(columns, np.ndarray) else mx
        mean = importance.mean()
        # channels that were never seen have a little weight, and groups of them an even one
        relative = importance / self.xp.where(mean > 0, mean, 1.0)
        self.h = self.xp.where(mean > 0, relative, 1.0) + 1e-4
        self.columns, self.top = columns, top
        self.total = self.h.sum()
        self.mean = self.h @ columns / self.total

    def ranges(self) -> list[tuple[Any, Any]]:
        """Return scales and biases to begin with; the last are those of round to nearest."""
        xp, top = self.xp, self.top
        low, high = self.columns.min(axis=0), self.columns.max(axis=0)
        width = (high - low) / top
        # its grid has a point at the end that is further from zero, and one at zero
        at_low = -low > high
        edge = xp.where(at_low, -low, high)
        steps = xp.maximum(xp.round(edge / xp.where(width > 0, width, 1.0)), 1.0)
        scale = edge / steps
        middle = (low + high) / 2
        shrunk = [(width * shrink, middle - width * (shrink * top / 2)) for shrink in SHRINKS]
        return [*shrunk, (scale, xp.where(at_low, low, high - top * scale))]

    def codes(self, scale: Any, bias: Any) -> Any:
        """Return the nearest codes (group_size, out)."""
        xp = self.xp
        inverse = 1 / xp.where(scale == 0, 1.0, scale)
        nearest = xp.round((self.columns - bias) * inverse)
        return xp.minimum(xp.maximum(nearest, 0.0), float(self.top))

    def line(self, scale: Any, codes: Any) -> _Line:
        """Return the regression on `codes`; where they are all alike, that with `scale`."""
        xp = self.xp
        mean = self.h @ codes / self.total
        square = self.h @ (codes * codes)
        variance = square - mean * mean * self.total
        covariance = self.h @ (codes * self.columns) - mean * self.mean * self.total
        flat = variance <= 1e-5 * square  # of which float32 leaves no more
        slope = xp.where(flat, scale, covariance / xp.where(flat, 1.0, variance))
        explained = xp.where(flat, -1.0, slope * covariance)
        return _Line(explained, slope, self.mean - slope * mean)

    def error(self, codes: Any, scale: Any, bias: Any) -> Any:
        """Return the weighted squared error of each row, (out,)."""
        difference = self.columns - codes * scale - bias
        return self.h @ (difference * difference)
