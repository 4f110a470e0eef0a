"""Quantize a weight to lookup tables: one codebook of 2^bits values per row.

The codebooks are initialized by exact k-means weighted by the diagonal of the Hessian (see
`codebook`); with the nearest codes this is SqueezeLLM (Kim et al., arXiv:2306.07629). Then codes
and codebooks are optimized in turn, as in GANQ (Zhao et al., arXiv:2501.12956), to lower
tr(E H E^T) under the full Hessian (see `gptq`): the codes by compensation, then by coordinate
descent; the codebook of a row, for fixed codes, by least squares: with S (in, 2^bits) the one-hot
matrix of its codes,

    (S^T H S) t = S^T H w.

Outliers, the entries of highest cost under the initial codebook, may be stored separately. Each row
has the same number, so no row index is needed. They take part in the alternation as unquantized
values, and are stored as differences from their dequantized codes.
"""

from typing import NamedTuple

import mlx.core as mx
import numpy as np

from splitquant_mlx.quantization.affine import pack
from splitquant_mlx.quantization.codebook import nearest, power_codebooks, row_codebooks
from splitquant_mlx.quantization.gptq import damped_hessian, unit_upper

STEP = 32  # channels between two large matrix products
RIDGE = 1e-4  # relative to the mean diagonal; regularizes codebook values that few codes use


class Lut(NamedTuple):
    """Weight quantized to lookup tables.

    Attributes:
        weight: packed codes, uint32 (out, in * bits / 32).
        codebook: (out, 2^bits), ascending.
        outliers: (out, n), added to the dequantized codes; None without outliers.
        indices: columns of the outliers, (out, n) uint16, uint32 from 65,536 inputs on.
    """

    weight: mx.array
    codebook: mx.array
    outliers: mx.array | None
    indices: mx.array | None


def index_dtype(width: int) -> mx.Dtype:
    """Return the dtype of outlier indices for a layer of `width` inputs."""
    return mx.uint16 if width < 1 << 16 else mx.uint32


def lut_quantize(
    w: mx.array,
    hessian: np.ndarray,
    *,
    bits: int = 4,
    outliers: int = 0,
    sweeps: int = 3,
    powers: bool = False,
) -> Lut:
    """Quantize `w` to one codebook per row.

    Args:
        w: float weight (out, in), `in` a multiple of 32.
        hessian: mean of x x^T over the layer's inputs x, (in, in) float32.
        bits: bits per code.
        outliers: entries per row stored in the dtype of `w`.
        sweeps: rounds of optimizing codes and codebooks; 0 is SqueezeLLM.
        powers: use codebooks of scaled powers of two, which are not refitted.

    Returns:
        Codes and codebooks. In each row, the error under the damped Hessian is at most that of
        `sweeps` 0.
    """
    h = damped_hessian(hessian)
    columns = np.ascontiguousarray(np.array(w.astype(mx.float32)).T)
    make_codebooks = power_codebooks if powers else row_codebooks
    importance = np.broadcast_to(np.diagonal(h), columns.T.shape)
    levels = make_codebooks(columns.T, importance, 2**bits)
    free = np.zeros(columns.shape, bool)
    if outliers:
        costs = importance * (columns.T - nearest(columns.T, levels)) ** 2
        largest = np.argpartition(-costs, outliers - 1, axis=1)[:, :outliers]
        np.put_along_axis(free.T, largest, True, axis=1)
        levels = make_codebooks(columns.T, np.where(free.T, 0, importance), 2**bits)
    best = Tables(columns, levels.T, w.dtype, free)
    if sweeps:
        tables = Tables(columns, levels.T, w.dtype, free)
        tables.compensate(columns, h)
        for _ in range(sweeps):
            tables.descend(columns, h)
            if not powers:
                tables.refit(columns, h)
        tables.descend(columns, h)
        best.copy_rows(tables, tables.row_costs(columns, h) < best.row_costs(columns, h))
    return best.packed(bits, outliers)


class Tables:
    """Codes and codebooks of a weight (in, out), one codebook per output.

    Attributes:
        codes: (in, out) uint8.
        levels: (2^bits, out) float32, ascending, representable in `dtype`.
        free: (in, out) bool, whether an entry is an outlier, with its value in `unquantized`.
        unquantized: (in, out) float32.
    """

    def __init__(self, columns: np.ndarray, levels: np.ndarray, dtype: mx.Dtype, free: np.ndarray):
        self.dtype, self.free, self.unquantized = dtype, free, columns.copy()
        self._set_levels(levels)
        self.codes = np.empty(columns.shape, np.uint8)
        for channel, column in enumerate(columns):
            self.round(channel, column)

    def values(self) -> np.ndarray:
        """Return the dequantized weight (in, out), outliers included."""
        quantized = np.take_along_axis(self.levels, self.codes, axis=0)
        return np.where(self.free, self.unquantized, quantized)

    def round(self, channel: int, target: np.ndarray) -> np.ndarray:
        """Set a channel to the values nearest to `target` (out,), and return these values."""
        codes = (target > self.middles).sum(axis=0)
        self.codes[channel], self.unquantized[channel] = codes, target
        return np.where(self.free[channel], target, self.levels[codes, np.arange(codes.size)])

    def compensate(self, columns: np.ndarray, h: np.ndarray) -> None:
        """Round the channels in order, compensating the errors of previous channels: GPTQ."""
        self._round_all(columns, columns, unit_upper(h).T)

    def descend(self, columns: np.ndarray, h: np.ndarray) -> None:
        """Set each weight to its optimal code with all others fixed, channel by channel."""
        values, diagonal = self.values(), np.diagonal(h)[:, None]
        self._round_all(values + h @ (columns - values) / diagonal, values, h / diagonal)

    def _round_all(self, targets: np.ndarray, reference: np.ndarray, feedback: np.ndarray) -> None:
        """Round the channels in order with feedback of the errors; see `rounding.round_group`."""
        error = np.empty_like(targets)
        for start in range(0, len(targets), STEP):
            end = start + STEP
            block = targets[start:end] + feedback[start:end, :start] @ error[:start]
            for k in range(start, end):
                error[k] = reference[k] - self.round(k, block[k - start])
                block[k + 1 - start :] += feedback[k + 1 : end, k, None] * error[k]

    def refit(self, columns: np.ndarray, h: np.ndarray) -> None:
        """Optimize the codebook of each row with all codes fixed."""
        k, out = self.levels.shape
        bins = np.where(self.free, k, self.codes) + np.arange(out) * (k + 1)

        def sums(values: np.ndarray) -> np.ndarray:
            """Return S^T values, (out, k)."""
            by_bin = np.bincount(bins.ravel(), values.ravel(), minlength=out * (k + 1))
            return by_bin.reshape(out, k + 1)[:, :k]

        coded = ~self.free  # outliers are in no column of S
        products = [sums(h @ ((self.codes == c) & coded).astype(np.float32)) for c in range(k)]
        system = np.stack(products, axis=-1)  # (out, k, k)
        ridge = RIDGE * np.trace(system, axis1=1, axis2=2)[:, None] / k
        system += (ridge[..., None] + 1e-30) * np.eye(k)
        right_side = sums(h @ (columns - np.where(self.free, self.unquantized, 0)))
        right_side += ridge * self.levels.T
        levels = np.linalg.solve(system, right_side[..., None])[..., 0].T
        order = np.argsort(levels, axis=0)
        ranks = np.argsort(order, axis=0).astype(np.uint8)
        self.codes = np.take_along_axis(ranks, self.codes, axis=0)
        self._set_levels(np.take_along_axis(levels, order, axis=0))

    def row_costs(self, columns: np.ndarray, h: np.ndarray) -> np.ndarray:
        """Return each row's share of tr(E H E^T), (out,)."""
        error = columns - self.values()
        return ((h @ error) * error).sum(axis=0, dtype=np.float64)

    def copy_rows(self, other: "Tables", rows: np.ndarray) -> None:
        """Copy the outputs selected by `rows` (out,) bool from tables with the same outliers."""
        for name in ("codes", "unquantized", "levels"):
            getattr(self, name)[:, rows] = getattr(other, name)[:, rows]

    def packed(self, bits: int, outliers: int) -> Lut:
        """Return the packed weight."""
        codes = mx.array(np.ascontiguousarray(self.codes.T).astype(np.uint32))
        codebook = mx.array(np.ascontiguousarray(self.levels.T)).astype(self.dtype)
        values = indices = None
        if outliers:
            free = self.free.T
            inputs = np.nonzero(free)[1].reshape(len(free), outliers)
            quantized = np.take_along_axis(self.levels, self.codes, axis=0)
            differences = (self.unquantized - quantized).T[free]
            values = mx.array(differences.reshape(inputs.shape)).astype(self.dtype)
            indices = mx.array(inputs).astype(index_dtype(free.shape[1]))
        return Lut(pack(codes, bits), codebook, values, indices)

    def _set_levels(self, levels: np.ndarray) -> None:
        stored = mx.array(np.ascontiguousarray(levels)).astype(self.dtype)
        self.levels = np.array(stored.astype(mx.float32))
        self.middles = (self.levels[1:] + self.levels[:-1]) / 2
