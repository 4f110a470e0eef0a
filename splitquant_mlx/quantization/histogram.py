"""Summarise a weight array by runs of neighbouring values, with sums of about 32 digits.

The 16 high bits of a float are its sign, exponent and leading digits, so a histogram over them
sorts an array without comparisons. For float16 and bfloat16 they are the whole number. For float32
each bin is a run of values `corner + step * low`, with `low` the 16 low bits, and the integer sums
of `low` and its square give the exact moments of the bin.

The squared distance of a run to its mean is a small difference of large sums. Each sum is therefore
a pair of float64, the second being the rounding error of the first (Dekker 1971; Ogita, Rump &
Oishi 2005, "Accurate sum and dot product"). Prefix sums start at zero and go outward, so no small
weight is added to a large one: an outlier of 1e38 does not reduce the precision of the others.
"""

import math
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

Pair = tuple[np.ndarray, np.ndarray]
"""A sum as the unevaluated sum of two float64, high and low."""

KEYS = 1 << 16
ASCENDING = np.concatenate((np.arange(KEYS - 1, KEYS // 2 - 1, -1), np.arange(KEYS // 2)))
"""Sign-and-magnitude bit patterns by ascending value."""

CHUNK = 1 << 18  # entries; limits temporaries, and keeps sums of squared low bits below 2^53


@dataclass(frozen=True, kw_only=True)
class Runs:
    """The m runs of neighbouring values in ascending order, with prefix sums over the entries.

    Attributes:
        low: (m,) float64, lower bound of the run's entries, upper bound of the previous run's.
        high: (m,) float64, upper bound; equal to `low` if all entries are known to be equal.
        count: (m + 1,) float64, number of entries before each boundary.
        total: (m + 1,) pair, sum of the entries between zero and each boundary.
        square: (m + 1,) pair, sum of their squares.
    """

    low: np.ndarray
    high: np.ndarray
    count: np.ndarray
    total: Pair
    square: Pair

    @classmethod
    def build(
        cls, low: np.ndarray, high: np.ndarray, count: np.ndarray, total: Pair, square: Pair
    ) -> "Runs":
        """Build from the (m,) count, sum and sum of squares of each run."""
        pivot = int(np.searchsorted(low, 0.0))
        return cls(
            low=low,
            high=high,
            count=np.concatenate(([0.0], np.cumsum(count))),
            total=_prefix(total, pivot),
            square=_prefix(square, pivot),
        )

    @property
    def size(self) -> int:
        """Return the number of runs."""
        return self.low.size

    def moments(self, start: np.ndarray, stop: np.ndarray) -> tuple[np.ndarray, Pair, Pair]:
        """Return count, sum and sum of squares of the runs start..stop-1, elementwise."""
        return (
            self.count[stop] - self.count[start],
            _difference(self.total, start, stop),
            _difference(self.square, start, stop),
        )

    def statistics(
        self, start: np.ndarray, stop: np.ndarray, slack: float = 0.0
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return count, mean and inertia of the runs start..stop-1; zeros if start == stop.

        Args:
            start: (n,) boundaries.
            stop: (n,) boundaries, not below `start`.
            slack: fraction of the sum of squares to add to the inertia, for an upper bound on it
                (for a lower bound, if negative).
        """
        count, total, square = self.moments(start, stop)
        divisor = np.maximum(count, 1.0)
        left, left_low = _two_product(count, square[0])
        right, right_low = _two_product(total[0], total[0])
        rest = (left_low + count * square[1]) - (right_low + 2.0 * total[0] * total[1])
        inertia = ((left - right) + rest) / divisor + slack * square[0]
        # The rounding error of one huge value would exceed the inertia of all others.
        first = np.minimum(start, self.size - 1)
        inertia[(stop - start == 1) & (self.low[first] == self.high[first])] = 0.0
        return count, total[0] / divisor, np.maximum(inertia, 0.0, out=inertia)

    def inertia(self, cuts: np.ndarray, slack: float = 0.0) -> float:
        """Return the total inertia of the clusters between ascending boundaries `cuts`."""
        edges = np.concatenate(([0], cuts, [self.size]))
        return math.fsum(self.statistics(edges[:-1], edges[1:], slack)[2])


def count_patterns(bits: np.ndarray) -> np.ndarray:
    """Return the count of each uint16 bit pattern, (65536,) int64; -0.0 counts as +0.0."""
    threads = min(os.cpu_count() or 1, -(-bits.size // CHUNK))
    with ThreadPoolExecutor(threads) as pool:
        counts = sum(pool.map(_count, np.array_split(bits, threads)), np.zeros(KEYS, np.int64))
    counts[0] += counts[KEYS // 2]
    counts[KEYS // 2] = 0
    return counts


def _count(keys: np.ndarray) -> np.ndarray:
    """Return the counts of keys below 65536, (65536,) int64.

    Computed as a product with a sparse column that has a one, not summed, for each key:
    unlike numpy.bincount, this needs no wider indices and releases the GIL.
    """
    from scipy.sparse import csc_array

    size = min(keys.size, CHUNK)
    ones, rows = np.ones(size, np.int32), np.zeros(size, np.int32)
    ends = np.array([0, size], np.int32)  # as 64-bit integers, they would widen `rows`
    column = csc_array((ones, rows, ends), shape=(KEYS, 1))
    one, counts = np.ones(1, np.int32), np.zeros(KEYS, np.int64)
    for start in range(0, keys.size, size):
        chunk = keys[start : start + size]
        column.indices[: chunk.size] = chunk
        column.data[chunk.size :] = 0
        counts += column @ one
    return counts


def runs_of_equal(value: np.ndarray, count: np.ndarray) -> Runs:
    """Build one run per distinct value.

    Args:
        value: (m,) ascending float64, finite and exact in float32.
        count: (m,) occurrences of each.
    """
    count = count.astype(np.float64)
    return Runs.build(
        value,
        value,
        count,
        _two_product(count, value),
        _two_product(count, value * value),
    )


def runs_of_bins(values: np.ndarray) -> tuple[np.ndarray, Runs]:
    """Summarise a flat float32 array by the high half of its bit patterns.

    Returns:
        The (m,) high halves present, by ascending value, and one run for each.
    """
    counts, sums, squares = (np.zeros(KEYS, np.int64) for _ in range(3))
    for start in range(0, values.size, CHUNK):
        bits = _positive_zero(values[start : start + CHUNK]).view(np.uint32)
        key, low = (bits >> 16).astype(np.intp), (bits & 0xFFFF).astype(np.float64)
        counts += np.bincount(key, minlength=KEYS)
        sums += np.bincount(key, low, minlength=KEYS).astype(np.int64)
        squares += np.bincount(key, low * low, minlength=KEYS).astype(np.int64)

    keys = ASCENDING[counts[ASCENDING] > 0]
    pattern = keys.astype(np.uint32) << 16
    corner = pattern.view(np.float32).astype(np.float64)
    require_finite(corner)
    step = (pattern | 1).view(np.float32) - corner
    count, low, low_square = counts[keys].astype(np.float64), sums[keys], squares[keys]
    total = _two_sum(count * corner, step * low)
    square = (count * corner**2, np.zeros(keys.size))
    for term in (
        2.0 * corner * step * low,
        step**2 * (low_square >> 32 << 32),
        step**2 * (low_square & 0xFFFFFFFF),
    ):
        high, rest = _two_sum(square[0], term)
        square = (high, square[1] + rest)
    far = corner + step * 0xFFFF
    known = (count == 1) | (low_square == 0)
    bottom = np.where(known, corner + step * low / count, np.minimum(corner, far))
    top = np.where(known, bottom, np.maximum(corner, far))
    return keys, Runs.build(bottom, top, count, total, square)


def expand(
    values: np.ndarray, keys: np.ndarray, bins: Runs, edges: np.ndarray, alive: np.ndarray
) -> tuple[Runs, np.ndarray]:
    """Replace each stretch that is alive by runs of its distinct values, each other by one run.

    Args:
        values: flat float32 array that `keys` and `bins` summarise.
        keys: (m,) high halves, from `runs_of_bins`.
        bins: the m runs.
        edges: (n + 1,) boundaries of the stretches, from 0 to m.
        alive: (cuts, n) bool, with at least one stretch per cut.

    Returns:
        The new runs, and the boundaries of the same stretches in them.
    """
    any_alive = np.any(alive, axis=0)
    stretch_of_key = np.full(KEYS, -1)
    width = np.diff(edges)
    stretch_of_key[keys] = np.repeat(np.where(any_alive, np.arange(width.size), -1), width)
    is_alive = stretch_of_key >= 0
    # comparisons leave few entries to look up, each of which takes ten times as long
    spans = [edges[:-1][row][0] for row in alive], [edges[1:][row][-1] - 1 for row in alive]
    limits = list(zip(bins.low[spans[0]], bins.high[spans[1]], strict=True))
    selected = []
    for start in range(0, values.size, CHUNK):
        chunk = values[start : start + CHUNK]
        near = np.zeros(chunk.size, bool)
        for low, high in limits:
            near |= (chunk >= np.float32(low)) & (chunk <= np.float32(high))
        chunk = _positive_zero(chunk[near])
        selected.append(chunk[is_alive[chunk.view(np.uint32) >> 16]])
    fine, fine_count = np.unique(np.concatenate(selected), return_counts=True)

    rest = np.flatnonzero(~any_alive)
    stretch = np.concatenate((rest, stretch_of_key[fine.view(np.uint32) >> 16]))
    order = np.argsort(stretch, kind="stable")
    each = np.arange(fine.size)
    inside = runs_of_equal(fine.astype(np.float64), fine_count)
    count, total, square = bins.moments(edges[rest], edges[rest + 1])
    fine_count, fine_total, fine_square = inside.moments(each, each + 1)

    def merge(outer: np.ndarray, inner: np.ndarray) -> np.ndarray:
        return np.concatenate((outer, inner))[order]

    runs = Runs.build(
        merge(bins.low[edges[rest]], inside.low),
        merge(bins.high[edges[rest + 1] - 1], inside.high),
        merge(count, fine_count),
        (merge(total[0], fine_total[0]), merge(total[1], fine_total[1])),
        (merge(square[0], fine_square[0]), merge(square[1], fine_square[1])),
    )
    return runs, np.searchsorted(stretch[order], np.arange(edges.size))


def require_finite(values: np.ndarray) -> None:
    """Raise ValueError unless every value is finite."""
    if not np.isfinite(values).all():
        raise ValueError("expected finite weights to cluster, got NaN or infinite values")


def _positive_zero(values: np.ndarray) -> np.ndarray:
    with np.errstate(invalid="ignore"):  # signalling NaN; `require_finite` reports it
        return values + np.float32(0.0)


def _prefix(terms: Pair, pivot: int) -> Pair:
    left = _outward(terms[0][:pivot][::-1], terms[1][:pivot][::-1])
    right = _outward(terms[0][pivot:], terms[1][pivot:])
    high, low = (np.concatenate((-a[:0:-1], b)) for a, b in zip(left, right, strict=True))
    return high, low


def _outward(high: np.ndarray, low: np.ndarray) -> Pair:
    sums = np.concatenate(([0.0], np.cumsum(high)))
    lost = _two_sum(sums[:-1], high)[1]
    return sums, np.concatenate(([0.0], np.cumsum(lost + low)))


def _difference(prefix: Pair, start: np.ndarray, stop: np.ndarray) -> Pair:
    high, lost = _two_sum(prefix[0][stop], -prefix[0][start])
    return _two_sum(high, lost + (prefix[1][stop] - prefix[1][start]))


def _two_sum(a: np.ndarray, b: np.ndarray) -> Pair:
    total = a + b
    shifted = total - a
    return total, (a - (total - shifted)) + (b - shifted)


def _two_product(a: np.ndarray, b: np.ndarray) -> Pair:
    product = a * b
    a_high, b_high = _leading_bits(a), _leading_bits(b)
    a_low, b_low = a - a_high, b - b_high
    rest = (a_high * b_high - product) + a_high * b_low + a_low * b_high
    return product, rest + a_low * b_low


def _leading_bits(a: np.ndarray) -> np.ndarray:
    return (a.view(np.int64) & -(1 << 27)).view(np.float64)
