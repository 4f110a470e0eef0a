"""Cluster the entries of a weight array into k groups of least squared distance: exact 1-D k-means.

In one dimension the best clusters are intervals, so k-means is the choice of k - 1 cuts in the sorted
values, and dynamic programming over the last cut finds the global optimum (Wang & Song 2011,
Ckmeans.1d.dp). The best last cut moves right as more values are added, hence a row of the recursion takes
O(m log m) costs for m values by divide and conquer (Gronlund et al. 2017, arXiv:1701.07204).

Most cuts can be ruled out before that. Take stretches of neighbouring values and let a cut fall
somewhere inside one: leaving that stretch out altogether can only lower the cost, and what remains
is known exactly. So the same recursion over stretches yields, for each stretch and cut, a lower
bound on every clustering that has that cut there. Where it exceeds the cost of some clustering
already in hand, no optimal cut lies. The other stretches are divided and tested again, and the exact
recursion runs over the few positions left: its result is the global optimum over all entries.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from splitquant_mlx import histogram
from splitquant_mlx.histogram import Runs

SMALL = 1 << 16  # float32 entries; below this, sorting them is faster than the histogram
STRETCHES = 256  # tested in one round
FEW = 1024  # positions the exact recursion takes at once
BRANCH = 4  # fewer levels than 2: numpy's call overhead outweighs the extra costs evaluated
SLACK = 2.0**-60  # bounds the rounding error of a cost, as a fraction of the sum of squares


@dataclass(frozen=True, kw_only=True)
class Clustering:
    """Hold d = min(k, distinct values) clusters of an array, in ascending order.

    Attributes:
        centers: d means.
        cut_points: d - 1 midpoints of neighbouring centers.
        upper_bounds: d - 1 largest entries of all clusters but the last, exact in the array's
            dtype: entry w is in cluster `sum(w > b for b in upper_bounds)`.
        counts: d numbers of entries.
        inertia: sum of squared distances of the entries to their centers.
    """

    centers: tuple[float, ...]
    cut_points: tuple[float, ...]
    upper_bounds: tuple[float, ...]
    counts: tuple[int, ...]
    inertia: float


def cluster(values: np.ndarray, k: int = 3) -> Clustering:
    """Find the clusters of least inertia: the global optimum, whatever the order of the entries.

    Of clusterings that are equally good, the one with the lowest last cut is returned. No entry is
    ever equal to a cut point (moving it to the other side would lower the inertia), so
    `upper_bounds` and `cut_points` split the entries alike.

    Args:
        values: any shape; float16, float32, or uint16 holding the bits of bfloat16, which numpy
            lacks (in mlx: `np.array(w.view(mx.uint16))`).
        k: clusters, 2 to 8.

    Raises:
        ValueError: empty array, unsupported dtype, k out of range, or NaN or infinite entries.
    """
    return _cluster(values, k, small=SMALL)


def cluster_sklearn(values: np.ndarray, k: int = 3, seed: int = 0, n_init: int = 10) -> Clustering:
    """Cluster with scikit-learn's KMeans, as the SplitQuantV2 paper does (arXiv:2503.07657).

    About 300 times slower than `cluster`, and only a local optimum: for tests and timings.

    Args:
        values: as for `cluster`.
        k: clusters, 2 to 8.
        seed: of the k-means++ starts.
        n_init: starts, of which the best is kept.

    Raises:
        ValueError: as for `cluster`.
    """
    from sklearn.cluster import KMeans

    flat = _flat(values, k)
    numbers = _bfloat16(flat) if flat.dtype == np.uint16 else flat.astype(np.float32)
    histogram.require_finite(numbers)
    model = KMeans(min(k, np.unique(numbers).size), n_init=n_init, random_state=seed)
    labels = model.fit(numbers[:, None]).labels_
    parts = [numbers[labels == label].astype(np.float64) for label in np.unique(labels)]
    parts.sort(key=lambda part: part[0])
    centers = [part.mean() for part in parts]
    return Clustering(
        centers=tuple(map(float, centers)),
        cut_points=_midpoints(centers),
        upper_bounds=tuple(float(part.max()) for part in parts[:-1]),
        counts=tuple(part.size for part in parts),
        inertia=float(
            sum(((part - center) ** 2).sum() for part, center in zip(parts, centers, strict=True))
        ),
    )


def _cluster(values: np.ndarray, k: int, small: int) -> Clustering:
    flat = _flat(values, k)
    if flat.dtype == np.float32 and flat.size >= small:
        keys, bins = histogram.runs_of_bins(flat)
        edges, alive = _narrow(bins, k, np.array([0, bins.size]), np.ones((k - 1, 1), bool), 0)
        runs, edges = histogram.expand(flat, keys, bins, edges, alive.any(0))
    else:
        runs = _runs_of_distinct(flat)
        edges, alive = np.array([0, runs.size]), np.ones((k - 1, 1), bool)

    parts = min(k, runs.size)
    edges, alive = _narrow(runs, parts, edges, alive[: parts - 1], FEW)
    return _summary(runs, _best_cuts(runs, _positions(edges, alive), parts))


def _flat(values: np.ndarray, k: int) -> np.ndarray:
    if not 2 <= k <= 8:
        raise ValueError(f"k is {k}: wanted 2 to 8 clusters")
    if values.size == 0:
        raise ValueError(f"array of shape {values.shape} is empty: nothing to cluster")
    if values.dtype not in (np.float16, np.float32, np.uint16):
        raise ValueError(
            f"dtype is {values.dtype}: wanted float16, float32 or uint16 (bits of bfloat16)"
        )
    return np.ascontiguousarray(values).reshape(-1)


def _bfloat16(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def _runs_of_distinct(flat: np.ndarray) -> Runs:
    if flat.dtype == np.float32:
        histogram.require_finite(flat)
        value, count = np.unique(flat + np.float32(0.0), return_counts=True)
    else:
        counts = histogram.count_patterns(flat.view(np.uint16))
        keys = histogram.ASCENDING[counts[histogram.ASCENDING] > 0].astype(np.uint16)
        value, count = (
            _bfloat16(keys) if flat.dtype == np.uint16 else keys.view(flat.dtype),
            counts[keys],
        )
        histogram.require_finite(value)
    return histogram.runs_of_equal(value.astype(np.float64), count)


def _narrow(
    runs: Runs, parts: int, edges: np.ndarray, alive: np.ndarray, few: int
) -> tuple[np.ndarray, np.ndarray]:
    """Divide and test stretches until those that may hold a cut are single runs, or `few` runs.

    `edges` (n + 1,) bound the stretches, `alive` (parts - 1, n) says which may hold which cut.
    """
    measure = _measure(runs)
    while True:
        held = alive.any(0)
        width = np.diff(edges)[held]
        if width.size == 0 or width.max() == 1 or width.sum() <= few:
            return edges, alive
        finer = _divide(measure, edges, held)
        alive = alive[:, np.searchsorted(edges, finer[:-1], side="right") - 1]
        edges = finer
        if edges.size > parts:
            alive = _test(runs, parts, edges, alive)


def _measure(runs: Runs) -> np.ndarray:
    # Equal shares of entries suit a smooth bulk, of squares a few outliers, of runs many scales.
    square = runs.square[0] - runs.square[0][0]
    return (
        runs.count / runs.count[-1]
        + square / max(square[-1], np.finfo(np.float64).tiny)
        + np.linspace(0.0, 1.0, runs.size + 1)
    )


def _divide(measure: np.ndarray, edges: np.ndarray, held: np.ndarray) -> np.ndarray:
    start, stop = edges[:-1][held], edges[1:][held]
    pieces = max(2, STRETCHES // start.size)
    share = np.arange(pieces) / pieces
    low, high = measure[start, None], measure[stop, None]
    inner = np.searchsorted(measure, low + (high - low) * share)
    inner = np.clip(inner, start[:, None], stop[:, None])
    return np.unique(
        np.concatenate(([0, edges[-1]], start, stop, (start + stop) // 2, inner.ravel()))
    )


def _test(runs: Runs, parts: int, edges: np.ndarray, alive: np.ndarray) -> np.ndarray:
    """Keep `alive` (parts - 1, n) where a clustering with that cut in that stretch may be optimal."""
    last = edges.size - 2
    cuts = np.concatenate(([0], _best_cuts(runs, edges[1:-1], parts), [runs.size]))
    upper = math.fsum(runs.cost(cuts[:-1], cuts[1:], SLACK)) * (1.0 + 1e-12)

    def between(left: np.ndarray, right: np.ndarray) -> np.ndarray:
        start = edges[left + 1]
        return runs.cost(start, np.maximum(start, edges[right]), -SLACK)

    def mirrored(left: np.ndarray, right: np.ndarray) -> np.ndarray:
        return between(last - right, last - left)

    zeros = np.zeros(edges.size - 1, np.intp)
    before = _bounds(runs.cost(zeros, edges[:-1], -SLACK), between, alive)
    after = runs.cost(edges[1:], zeros + runs.size, -SLACK)
    after = _bounds(after[::-1], mirrored, alive[::-1, ::-1])[::-1, ::-1]
    return before + after <= upper


def _bounds(
    outer: np.ndarray, between: Callable[[np.ndarray, np.ndarray], np.ndarray], alive: np.ndarray
) -> np.ndarray:
    """Bound the cost left of stretch b with cut c in it, for all c and b: (parts - 1, n) float64.

    `outer` (n,) is the cost of all runs left of a stretch, `between` that of those between two.
    """
    bounds = np.where(alive, 0.0, np.inf)
    bounds[0] += outer
    for cut in range(1, len(bounds)):
        bounds[cut] += _row_minima(bounds[cut - 1], between)[0]
    return bounds


def _positions(edges: np.ndarray, alive: np.ndarray) -> np.ndarray:
    # A cut lies between two runs, so both of their stretches must be alive to hold it.
    held = np.repeat(alive.any(0), np.diff(edges))
    return np.flatnonzero(held[:-1] & held[1:]) + 1


def _best_cuts(runs: Runs, positions: np.ndarray, parts: int) -> np.ndarray:
    """Return the parts - 1 boundaries out of ascending `positions` that cost least."""
    if parts == 1:
        return positions[:0]
    stops = np.append(positions, runs.size)
    starts = np.insert(positions, 0, 0)

    def segment(first: np.ndarray, last: np.ndarray) -> np.ndarray:
        return runs.cost(starts[first], stops[last])

    every = np.arange(stops.size)
    best = segment(np.zeros_like(every), every)
    choices = []
    for _ in range(parts - 2):
        best, choice = _row_minima(np.insert(best[:-1], 0, np.inf), segment)
        choices.append(choice)
    total = np.insert(best[:-1], 0, np.inf) + segment(every, np.full_like(every, every[-1]))
    cuts = [int(np.argmin(total))]
    for choice in reversed(choices):
        cuts.append(int(choice[cuts[-1] - 1]))
    return starts[cuts[::-1]]


def _row_minima(
    before: np.ndarray, cost: Callable[[np.ndarray, np.ndarray], np.ndarray]
) -> tuple[np.ndarray, np.ndarray]:
    """Minimise before[i] + cost(i, j) over i <= j, for every j: the minima and the first argmins.

    The argmin grows with j, so every BRANCH-th row bounds the search of the rows between; all
    rows of one level are evaluated together.
    """
    size = before.size
    best, choice = np.empty(size), np.zeros(size, np.intp)
    best[:1] = before[:1] + cost(choice[:1], choice[:1])
    step = BRANCH ** max(0, math.ceil(math.log(size, BRANCH) - 1e-9))
    while step > 1:
        coarse, step = step, step // BRANCH
        rows = np.arange(0, size, step)
        rows = rows[rows % coarse > 0]
        below = rows - rows % coarse
        above = below + coarse
        first = choice[below]
        last = np.where(above < size, choice[np.minimum(above, size - 1)], size - 1)
        width = np.minimum(last, rows) - first + 1
        offset = np.cumsum(width) - width
        columns = np.arange(width.sum()) + np.repeat(first - offset, width)
        found = before[columns] + cost(columns, np.repeat(rows, width))
        best[rows] = np.minimum.reduceat(found, offset)
        hits = np.flatnonzero(found == np.repeat(best[rows], width))
        choice[rows] = columns[hits[np.searchsorted(hits, offset)]]
    return best, choice


def _summary(runs: Runs, cuts: np.ndarray) -> Clustering:
    edges = np.concatenate(([0], cuts, [runs.size]))
    count, total, _ = runs.moments(edges[:-1], edges[1:])
    centers = total[0] / count
    return Clustering(
        centers=tuple(centers.tolist()),
        cut_points=_midpoints(centers),
        upper_bounds=tuple(runs.value[cuts - 1].tolist()),
        counts=tuple(count.astype(int).tolist()),
        inertia=math.fsum(runs.cost(edges[:-1], edges[1:])),
    )


def _midpoints(centers: np.ndarray | list[float]) -> tuple[float, ...]:
    ordered = np.asarray(centers, np.float64)
    return tuple(((ordered[:-1] + ordered[1:]) / 2).tolist())
