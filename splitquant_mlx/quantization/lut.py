"""Quantize a weight to lookup tables: every row has a codebook of 2^bits values of its own.

The codebooks begin as exact k-means under the diagonal of the Hessian (see `codebook`), which with
the nearest codes is SqueezeLLM (Kim et al., arXiv:2306.07629), dense and sparse. Then codes and
codebooks take turns, as in GANQ (Zhao et al., arXiv:2501.12956), to lower tr(E H E^T) with all of
the Hessian (see `gptq`): the codes by compensation, then by coordinate descent; a row's codebook,
its codes fixed, by least squares: with S (in, 2^bits) the one-hot matrix of its codes,

    (S^T H S) t = S^T H w.

The entries that cost most under the first codebook may be kept out of it: the same number in each
row, so that a row is found without an index of rows. They take part in the alternation as values
that are free, and are stored as differences from what their codes stand for.
"""

from typing import NamedTuple

import mlx.core as mx
import numpy as np

from splitquant_mlx.quantization.affine import pack
from splitquant_mlx.quantization.codebook import nearest, power_codebooks, row_codebooks
from splitquant_mlx.quantization.gptq import damped_hessian, unit_upper

STEP = 32  # channels between two large products
RIDGE = 1e-4  # of the mean diagonal: keeps codebook values that no code, or hardly any, uses


class Lut(NamedTuple):
    """One weight as lookup tables.

    Attributes:
        weight: packed codes, uint32 (out, in * bits / 32).
        codebook: (out, 2^bits), ascending.
        outliers: (out, n), added to what the codes stand for; None without.
        indices: of the outliers' inputs, uint16 (uint32 from 65,536 inputs on), (out, n).
    """

    weight: mx.array
    codebook: mx.array
    outliers: mx.array | None
    indices: mx.array | None


def index_dtype(width: int) -> mx.Dtype:
    """Return the type of the indices of a layer of `width` inputs."""
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
    """Quantize `w` to a codebook for each row.

    Args:
        w: float weight (out, in), `in` a multiple of 32.
        hessian: mean of x x^T over the layer's inputs x, (in, in) float32.
        bits: bits of a code.
        outliers: entries of each row that are kept in the dtype of `w`.
        sweeps: rounds of codes and codebooks in turn; 0 is SqueezeLLM.
        powers: codebooks of powers of two, which stay as they are.

    Returns:
        Codes and codebooks, whose error under the damped Hessian is in no row above that of
        `sweeps` 0.
    """
    h = damped_hessian(hessian)
    columns = np.ascontiguousarray(np.array(w.astype(mx.float32)).T)
    start = power_codebooks if powers else row_codebooks
    importance = np.broadcast_to(np.diagonal(h), columns.T.shape)
    levels = start(columns.T, importance, 2**bits)
    free = np.zeros(columns.shape, bool)
    if outliers:
        costs = importance * (columns.T - nearest(columns.T, levels)) ** 2
        largest = np.argpartition(-costs, outliers - 1, axis=1)[:, :outliers]
        np.put_along_axis(free.T, largest, True, axis=1)
        levels = start(columns.T, np.where(free.T, 0, importance), 2**bits)
    best = Tables(columns, levels.T, w.dtype, free)
    if sweeps:
        tables = Tables(columns, levels.T, w.dtype, free)
        tables.compensate(columns, h)
        for _ in range(sweeps):
            tables.descend(columns, h)
            if not powers:
                tables.refit(columns, h)
        tables.descend(columns, h)
        best.take(tables, tables.row_costs(columns, h) < best.row_costs(columns, h))
    return best.packed(bits, outliers)


class Tables:
    """The codes of a weight (in, out) with a codebook for each output.

    Attributes:
        codes: (in, out), whole numbers.
        levels: (2^bits, out) float32, ascending, of values that `dtype` has.
        free: (in, out), whether an entry has the value that it is in `kept`.
        kept: (in, out) float32.
    """

    def __init__(self, columns: np.ndarray, levels: np.ndarray, dtype: mx.Dtype, free: np.ndarray):
        self.dtype, self.free, self.kept = dtype, free, columns.copy()
        self._set_levels(levels)
        self.codes = np.empty(columns.shape, np.uint8)
        for channel, column in enumerate(columns):
            self.round(channel, column)

    def values(self) -> np.ndarray:
        """Return the weight (in, out) that codes and free values stand for."""
        return np.where(self.free, self.kept, np.take_along_axis(self.levels, self.codes, axis=0))

    def round(self, channel: int, wanted: np.ndarray) -> np.ndarray:
        """Give a channel the codes nearest to `wanted` (out,); returns what they stand for."""
        codes = (wanted > self.middles).sum(axis=0)
        self.codes[channel], self.kept[channel] = codes, wanted
        return np.where(self.free[channel], wanted, self.levels[codes, np.arange(codes.size)])

    def compensate(self, columns: np.ndarray, h: np.ndarray) -> None:
        """Give each channel its codes in turn, compensating the errors of those before it: GPTQ."""
        self._round_all(columns, columns, unit_upper(h).T)

    def descend(self, columns: np.ndarray, h: np.ndarray) -> None:
        """Give each weight its best code, all others fixed, channel after channel."""
        values, diagonal = self.values(), np.diagonal(h)[:, None]
        self._round_all(values + h @ (columns - values) / diagonal, values, h / diagonal)

    def _round_all(self, targets: np.ndarray, reference: np.ndarray, feedback: np.ndarray) -> None:
        """Round each channel after the errors of those before it; see `rounding.round_group`."""
        error = np.empty_like(targets)
        for start in range(0, len(targets), STEP):
            end = start + STEP
            wanted = targets[start:end] + feedback[start:end, :start] @ error[:start]
            for k in range(start, end):
                error[k] = reference[k] - self.round(k, wanted[k - start])
                wanted[k + 1 - start :] += feedback[k + 1 : end, k, None] * error[k]

    def refit(self, columns: np.ndarray, h: np.ndarray) -> None:
        """Give each row its best codebook, all codes fixed."""
        k, out = self.levels.shape
        places = np.where(self.free, k, self.codes) + np.arange(out) * (k + 1)

        def sums(values: np.ndarray) -> np.ndarray:
            found = np.bincount(places.ravel(), values.ravel(), minlength=out * (k + 1))
            return found.reshape(out, k + 1)[:, :k]

        coded = ~self.free  # a free entry is in no column of S
        products = [sums(h @ ((self.codes == c) & coded).astype(np.float32)) for c in range(k)]
        system = np.stack(products, axis=-1)  # (out, k, k)
        ridge = RIDGE * np.trace(system, axis1=1, axis2=2)[:, None] / k
        system += (ridge[..., None] + 1e-30) * np.eye(k)
        goal = sums(h @ (columns - np.where(self.free, self.kept, 0)))
        goal += ridge * self.levels.T
        levels = np.linalg.solve(system, goal[..., None])[..., 0].T
        order = np.argsort(levels, axis=0)
        ranks = np.argsort(order, axis=0).astype(np.uint8)
        self.codes = np.take_along_axis(ranks, self.codes, axis=0)
        self._set_levels(np.take_along_axis(levels, order, axis=0))

    def row_costs(self, columns: np.ndarray, h: np.ndarray) -> np.ndarray:
        """Return each row's share of tr(E H E^T), (out,)."""
        error = columns - self.values()
        return ((h @ error) * error).sum(axis=0, dtype=np.float64)

    def take(self, other: "Tables", rows: np.ndarray) -> None:
        """Take over the rows (out,) of another weight with the same free entries."""
        for name in ("codes", "kept", "levels"):
            getattr(self, name)[:, rows] = getattr(other, name)[:, rows]

    def packed(self, bits: int, outliers: int) -> Lut:
        """Return the weight as it is stored."""
        codes = mx.array(np.ascontiguousarray(self.codes.T).astype(np.uint32))
        codebook = mx.array(np.ascontiguousarray(self.levels.T)).astype(self.dtype)
        values = indices = None
        if outliers:
            rows = self.free.T
            found = np.nonzero(rows)[1].reshape(len(rows), outliers)
            differences = (self.kept - np.take_along_axis(self.levels, self.codes, axis=0)).T
            values = mx.array(differences[rows].reshape(found.shape)).astype(self.dtype)
            indices = mx.array(found).astype(index_dtype(rows.shape[1]))
        return Lut(pack(codes, bits), codebook, values, indices)

    def _set_levels(self, levels: np.ndarray) -> None:
        stored = mx.array(np.ascontiguousarray(levels)).astype(self.dtype)
        self.levels = np.array(stored.astype(mx.float32))
        self.middles = (self.levels[1:] + self.levels[:-1]) / 2
