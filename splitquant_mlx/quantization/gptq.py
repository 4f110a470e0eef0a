"""GPTQ: compensate each column's rounding error in the columns not yet quantized.

With X the inputs that a layer sees, an error E = W - W_hat (out, in) costs

    |X E^T|^2 = tr(E H E^T),   H = X^T X / n   (the Hessian, halved).

`compensated_grid` goes through the channels in order and moves every weight, before it is rounded,
to where it best compensates the errors already made: GPTQ (Frantar et al., arXiv:2210.17323), in
the form that QuIP (Chee et al., arXiv:2307.13304, section 3) shows to be the same, which needs no
inverse: with H = U D U^T, U unit upper triangular, channel k is rounded to the grid point nearest
to w_k + sum_{j<k} e_j U_jk.

`descend` then improves codes and scales in turn. Coordinate descent over the codes (QuantEase,
Behdin et al., arXiv:2309.01885) gives each weight its best code with all others fixed. A refit
gives each group the scale and bias, rounded as they are stored, that are best for its codes with
all others fixed. Neither raises the cost.

H is measured on a few thousand tokens, and what it says of pairs of channels holds less well for
other texts than what it says of single ones. `damped_hessian` therefore scales the entries off the
diagonal down; with none of them left, the cost is that of `fit.py`.

Arrays here are numpy's and transposed, (in, out), so that a channel is contiguous.
"""

from typing import Protocol

import mlx.core as mx
import numpy as np

from splitquant_mlx.quantization.affine import Quantized, pack
from splitquant_mlx.quantization.imatrix import fit_scales

# twelve layers of SmolLM2-135M, calibrated on 18,000 tokens of its own: the divergence predicted on
# WikiText-2 is 13 % higher with 0.1 and 15 % with 0.6 (geometric means)
OFF_DIAGONAL_SHRINKAGE = 0.3
DAMPING = 1e-3  # of the mean of the diagonal
SWEEPS = 3
STEP = 32  # channels between two large products


def gptq_quantize(
    w: mx.array, hessian: np.ndarray, *, bits: int = 4, group_size: int = 64, sweeps: int = SWEEPS
) -> Quantized:
    """Quantize `w` by GPTQ, then `sweeps` rounds of coordinate descent and refits.

    Args:
        w: float weight (out, in), `in` a multiple of `group_size`.
        hessian: mean of x x^T over the layer's inputs x, (in, in) float32.
        bits: bits of a code.
        group_size: inputs that share scale and bias.
        sweeps: rounds of `descend`.

    Returns:
        Codes, scales and biases, the latter in the dtype of `w`.
    """
    h = damped_hessian(hessian)
    columns = np.ascontiguousarray(np.array(w.astype(mx.float32)).T)
    grid = compensated_grid(columns, h, w.dtype, bits, group_size)
    for _ in range(sweeps):
        descend(grid, columns, h)
        grid.refit(columns, h)
    if sweeps:
        descend(grid, columns, h)
    return grid.packed()


def damped_hessian(hessian: np.ndarray) -> np.ndarray:
    """Return `hessian` over its mean diagonal, shrunk off the diagonal, damped on it."""
    diagonal = np.diagonal(hessian)
    unit = float(diagonal.mean()) or 1.0
    h = (hessian * ((1 - OFF_DIAGONAL_SHRINKAGE) / unit)).astype(np.float32, copy=False)
    np.fill_diagonal(h, diagonal / unit + DAMPING)
    return h


class Codes(Protocol):
    """What stands for a weight (in, out), for `compensate` and `descend`; see `Grid`."""

    group_size: int

    def values(self) -> np.ndarray:
        """Return the weight (in, out) that the codes stand for."""
        ...

    def fit(self, group: int, columns: np.ndarray, importance: np.ndarray) -> None:
        """Prepare for the channels of a group, which are to be rounded next."""
        ...

    def round(self, channel: int, wanted: np.ndarray) -> np.ndarray:
        """Give a channel the codes nearest to `wanted` (out,); returns what they stand for."""
        ...


class Grid:
    """The codes of a weight, with the scales and biases that they are read by.

    Attributes:
        codes: (in, out), whole numbers in float32.
        scales: (groups, out) float32, of values that `dtype` has.
        biases: like scales.
    """

    def __init__(self, shape: tuple[int, int], dtype: mx.Dtype, bits: int, group_size: int):
        channels, out = shape
        self.dtype = dtype
        self.bits = bits
        self.top = np.float32(2**bits - 1)
        self.group_size = group_size
        self.codes = np.empty(shape, np.float32)
        self.scales = np.empty((channels // group_size, out), np.float32)
        self.biases = np.empty_like(self.scales)

    def values(self) -> np.ndarray:
        """Return the weight (in, out) that the codes stand for."""
        grouped = self.codes.reshape(len(self.scales), self.group_size, -1)
        return (grouped * self.scales[:, None] + self.biases[:, None]).reshape(self.codes.shape)

    def packed(self) -> Quantized:
        """Return the weight in mlx's layout."""
        return Quantized(
            pack(mx.array(np.ascontiguousarray(self.codes.T)), self.bits),
            mx.array(np.ascontiguousarray(self.scales.T)).astype(self.dtype),
            mx.array(np.ascontiguousarray(self.biases.T)).astype(self.dtype),
        )

    def fit(self, group: int, columns: np.ndarray, importance: np.ndarray) -> None:
        """Set scale and bias of one group from its columns (group_size, out)."""
        w = mx.array(np.ascontiguousarray(columns.T)).astype(self.dtype)
        fitted = fit_scales(w, mx.array(importance), bits=self.bits, group_size=self.group_size)
        for own, found in zip((self.scales, self.biases), fitted, strict=True):
            own[group] = np.array(found.astype(mx.float32))[:, 0]

    def round(self, channel: int, wanted: np.ndarray) -> np.ndarray:
        """Give a channel the codes nearest to `wanted` (out,); returns what they stand for."""
        group = channel // self.group_size
        scale, bias = self.scales[group], self.biases[group]
        codes = np.rint((wanted - bias) / scale)
        np.clip(codes, 0, self.top, out=codes)
        self.codes[channel] = codes
        return codes * scale + bias

    def refit(self, columns: np.ndarray, h: np.ndarray) -> None:
        """Give each group its best scale and bias, all codes and other groups fixed."""
        error = columns - self.values()
        for group in range(len(self.scales)):
            own = slice(group * self.group_size, (group + 1) * self.group_size)
            codes, part = self.codes[own], h[own, own]
            gradient = h[own] @ error
            by_codes = part @ codes
            qq, q1, one = (codes * by_codes).sum(0), by_codes.sum(0), part.sum()
            gq, g1 = (codes * gradient).sum(0), gradient.sum(0)
            determinant = qq * one - q1 * q1
            flat = determinant <= 1e-5 * qq * one
            determinant[flat] = np.inf  # stays as it is
            scale, bias = self.scales[group], self.biases[group]
            new_scale = self._stored(scale + (one * gq - q1 * g1) / determinant)
            new_bias = self._stored(bias + (qq * g1 - q1 * gq) / determinant)
            ds, db = new_scale - scale, new_bias - bias
            gain = 2 * (ds * gq + db * g1) - (ds * ds * qq + 2 * ds * db * q1 + db * db * one)
            keep = ~(gain > 0) | (new_scale == 0)
            ds[keep] = db[keep] = 0
            self.scales[group] += ds
            self.biases[group] += db
            error[own] -= codes * ds + db

    def _stored(self, values: np.ndarray) -> np.ndarray:
        return np.array(mx.array(values).astype(self.dtype).astype(mx.float32))


def compensated_grid(
    columns: np.ndarray, h: np.ndarray, dtype: mx.Dtype, bits: int, group_size: int
) -> Grid:
    """Round `columns` (in, out) channel by channel, compensating the errors of those before.

    A group's scales are fitted to its compensated weights, under the diagonal of h, right before
    its first channel is rounded.
    """
    grid = Grid(columns.shape, dtype, bits, group_size)  # type: ignore[arg-type]
    compensate(grid, columns, h)
    return grid


def compensate(grid: Codes, columns: np.ndarray, h: np.ndarray) -> None:
    """Give each channel its codes in turn, compensating the errors of those before it."""
    feedback = _unit_upper(h)
    importance = np.diagonal(h)
    error = np.empty_like(columns)
    for start in range(0, len(columns), grid.group_size):
        end = start + grid.group_size
        wanted = columns[start:end] + feedback[:start, start:end].T @ error[:start]
        grid.fit(start // grid.group_size, wanted, importance[start:end])
        for k in range(start, end):
            error[k] = columns[k] - grid.round(k, wanted[k - start])
            if k + 1 < end:
                wanted[k + 1 - start :] += feedback[k, k + 1 : end, None] * error[k]


def descend(grid: Codes, columns: np.ndarray, h: np.ndarray) -> None:
    """Give each weight its best code, all others fixed, channel after channel."""
    values = grid.values()
    error = columns - values
    for start in range(0, len(columns), STEP):
        end = min(start + STEP, len(columns))
        gradient = h[start:end] @ error
        for k in range(start, end):
            step = gradient[k - start] / h[k, k]
            moved = grid.round(k, values[k] + step) - values[k]
            error[k] -= moved
            if k + 1 < end:
                gradient[k + 1 - start :] -= h[k + 1 : end, k, None] * moved


def _unit_upper(h: np.ndarray) -> np.ndarray:
    """Return U, unit upper triangular, of h = U D U^T."""
    # the lower factor of h with its channels reversed, reversed again
    factor = np.linalg.cholesky(h[::-1, ::-1])[::-1, ::-1]
    return factor / np.diagonal(factor)


def cost(columns: np.ndarray, grid: Codes, h: np.ndarray) -> float:
    """Return tr(E^T h E) of the error E (in, out) of a grid."""
    error = columns - grid.values()
    return float(np.sum((h @ error) * error, dtype=np.float64))
