"""Fit scale and bias of groups of channels, for all rows at once.

The squared error is weighted by the importance of each channel. The search starts from ranges of
several widths, including that of round to nearest, and alternates: nearest codes for a scale and
bias, then a weighted linear regression on these codes. The result is the best of all scales and
biases, rounded to the storage dtype, so it is never worse than round to nearest.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np

SHRINKS = (1.05, 1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.65)
REFITS = 6
MIN_SCALE = 1e-30


def fit_groups(
    columns: Any, importance: Any, *, top: int, stored: Callable[[Any], Any]
) -> tuple[Any, Any]:
    """Return the scale and bias of each row, (..., out) float32, rounded by `stored`.

    A scale that `vanishes` is replaced by 1.

    Args:
        columns: weights (..., group_size, out) float32, a numpy or mlx array.
        importance: of each channel, not negative, (..., group_size) float32.
        top: the highest code.
        stored: rounds values to the storage dtype; see `stored_as`.
    """
    groups = _Groups(columns, importance, top)
    xp, ranges = groups.xp, groups.ranges()
    line = groups.line(ranges[0][0], groups.codes(*ranges[0]))
    for scale, bias in ranges[1:]:
        new = groups.line(scale, groups.codes(scale, bias))
        better = new.explained > line.explained
        line = _Line(*(xp.where(better, *pair) for pair in zip(new, line, strict=True)))
    scale, bias = map(stored, ranges[-1])
    best = groups.error(groups.codes(scale, bias), scale, bias), scale, bias
    for _ in range(REFITS):
        scale, bias = stored(line.scale), stored(line.bias)
        codes = groups.codes(scale, bias)
        new = groups.error(codes, scale, bias), scale, bias
        # False if the scale vanishes or overflows in 16 bits: the error is NaN or infinite
        better = new[0] < best[0]
        best = tuple(xp.where(better, *pair) for pair in zip(new, best, strict=True))
        line = groups.line(scale, codes)
    _, scale, bias = best
    return xp.where(vanishes(scale), 1.0, scale).astype(scale.dtype), bias


def relative_importance(importance: Any) -> Any:
    """Divide by the mean of the last axis; unused channels get 1e-4, groups of them 1 each."""
    xp: Any = np if isinstance(importance, np.ndarray) else mx
    mean = importance.mean(-1, keepdims=True)
    return xp.where(mean > 0, importance / xp.where(mean > 0, mean, 1.0), 1.0) + 1e-4


def stored_as(dtype: mx.Dtype) -> Callable[[Any], Any]:
    """Return a function that rounds float32 arrays, of numpy or mlx, to values of `dtype`."""

    def stored(values: Any) -> Any:
        xp: Any = np if isinstance(values, np.ndarray) else mx
        return xp.array(mx.array(values).astype(dtype).astype(mx.float32))

    return stored


def nearest_codes(w: Any, scale: Any, bias: Any, top: int) -> Any:
    """Return the nearest codes of weights as float32, for numpy or mlx arrays that broadcast."""
    xp: Any = np if isinstance(w, np.ndarray) else mx
    inverse = 1 / xp.where(vanishes(scale), 1.0, scale)
    nearest = xp.round((w - bias) * inverse)
    return xp.minimum(xp.maximum(nearest, 0.0), float(top))


def vanishes(scale: Any) -> Any:
    """Return where a scale is 0, or too small for a reciprocal well within float32."""
    return abs(scale) < MIN_SCALE


class _Line(NamedTuple):
    """Regression of weights on their codes; `explained` is the explained sum of squares."""

    explained: Any
    scale: Any
    bias: Any


class _Groups:
    """Weights of groups, and statistics that do not depend on the codes."""

    def __init__(self, columns: Any, importance: Any, top: int):
        self.xp: Any = np if isinstance(columns, np.ndarray) else mx
        self.h = relative_importance(importance)[..., None, :]
        self.columns, self.top = columns, top
        self.total = self.h.sum(-1)
        self.mean = self.weighted(columns) / self.total

    def weighted(self, values: Any) -> Any:
        """Return the sum over channels of values (..., group_size, out) by importance."""
        return (self.h @ values)[..., 0, :]

    def ranges(self) -> list[tuple[Any, Any]]:
        """Return initial scales and biases; the last pair is that of round to nearest."""
        xp, top = self.xp, self.top
        low, high = self.columns.min(axis=-2), self.columns.max(axis=-2)
        width = (high - low) / top
        # round to nearest: code 0 is the extreme of larger magnitude, and zero is on the grid
        at_low = -low > high
        edge = xp.where(at_low, -low, high)
        steps = xp.maximum(xp.round(edge / xp.where(width > 0, width, 1.0)), 1.0)
        scale = edge / steps
        middle = (low + high) / 2
        shrunk = [(width * shrink, middle - width * (shrink * top / 2)) for shrink in SHRINKS]
        return [*shrunk, (xp.where(at_low, scale, -scale), xp.where(at_low, low, high))]

    def codes(self, scale: Any, bias: Any) -> Any:
        """Return the nearest codes (..., group_size, out)."""
        return nearest_codes(self.columns, scale[..., None, :], bias[..., None, :], self.top)

    def line(self, scale: Any, codes: Any) -> _Line:
        """Return the regression on `codes`, with slope `scale` where all codes are equal."""
        xp = self.xp
        mean = self.weighted(codes) / self.total
        square = self.weighted(codes * codes)
        variance = square - mean * mean * self.total
        covariance = self.weighted(codes * self.columns) - mean * self.mean * self.total
        flat = variance <= 1e-5 * square  # rounding error of float32
        slope = xp.where(flat, scale, covariance / xp.where(flat, 1.0, variance))
        explained = xp.where(flat, -1.0, slope * covariance)
        return _Line(explained, slope, self.mean - slope * mean)

    def error(self, codes: Any, scale: Any, bias: Any) -> Any:
        """Return the weighted squared error of each row, (..., out)."""
        difference = self.columns - codes * scale[..., None, :] - bias[..., None, :]
        return self.weighted(difference * difference)
