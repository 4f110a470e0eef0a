"""Cluster the entries of a weight array into k groups of least inertia: exact 1-D k-means.

In one dimension the optimal clusters are intervals, so k-means is the choice of k - 1 cuts in the
sorted values, and dynamic programming over the last cut finds the global optimum (Wang & Song
2011, Ckmeans.1d.dp). The optimal last cut moves right as values are added, so divide and conquer
fills a row for m values in O(m log m) (Gronlund et al. 2017, arXiv:1701.07204).

Nearly all cuts can be excluded beforehand by a lower bound. Let each cut be somewhere inside a
stretch of neighbouring values. The entries of that stretch left of the cut belong to the cluster on
the left; moving them all down to the stretch's minimum brings them closer to that cluster and to
each other, so the inertia cannot rise. Likewise those right of the cut, moved up to the maximum.
The inertia is now concave in the number of entries on the left, so it is least for all or none of
them. Dynamic programming over stretches and these two choices thus gives, for every cut and
stretch, a lower bound on all clusterings with that cut there. Stretches where it exceeds the
inertia of a known clustering contain no optimal cut. The others are divided and tested again, until
few boundaries are left for the exact recursion: its result is the global optimum over all entries.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from splitquant_mlx.errors import RecipeError
from splitquant_mlx.quantization import histogram
from splitquant_mlx.quantization.histogram import Runs
from splitquant_mlx.quantization.host import as_float32

SMALL = 1 << 16  # float32 entries; below this, sorting is faster than the histogram
STRETCHES = 32  # per cut and round
CROWD = 512  # stretches per cut at which the rounds end, as the tests exclude too little
FEW = 512  # boundaries between runs at which the exact recursion needs no further tests
BRANCH = 4  # fewer levels than 2: numpy's call overhead outweighs the extra costs evaluated
SLACK = 2.0**-60  # bound on the rounding error of an inertia, relative to the sum of squares
ROUNDING = 2.0**-46  # bound on the rounding error of a short float64 sum, relative to its terms


@dataclass(frozen=True, kw_only=True)
class Clustering:
    """The d = min(k, distinct values) clusters of an array, in ascending order.

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
    """Find the clusters of least inertia: the global optimum, independent of the entries' order.

    Ties go to the lowest last cut. No entry is equal to a cut point, as moving it to the other side
    would lower the inertia, so `upper_bounds` and `cut_points` divide the entries identically.

    Args:
        values: any shape; float16, float32, or uint16 with the bits of bfloat16, which numpy
            lacks (in mlx: `np.array(w.view(mx.uint16))`).
        k: number of clusters, 2 to 8.

    Raises:
        RecipeError: k out of range.
        ValueError: empty array, unsupported dtype, or NaN or infinite entries.
    """
    flat = _flat(values, k)
    edges, alive = np.array([0, 1]), np.ones((k - 1, 1), bool)
    if flat.dtype == np.float32 and flat.size >= SMALL:
        keys, bins = histogram.runs_of_bins(flat)
        edges, alive = _narrow(bins, edges * bins.size, alive, few=0)
        runs, edges = histogram.expand(flat, keys, bins, edges, alive)
    else:
        runs = _runs_of_distinct(flat)
        edges = edges * runs.size
    parts = min(k, runs.size)
    edges, alive = _narrow(runs, edges, alive[: parts - 1], FEW)
    return _summary(runs, _best_cuts(runs, _boundaries(edges, alive), parts))


def cluster_sklearn(values: np.ndarray, k: int = 3, n_init: int = 10) -> Clustering:
    """Cluster with scikit-learn's KMeans, as the SplitQuantV2 paper does (arXiv:2503.07657).

    Hundreds of times slower than `cluster`, and only a local optimum: for tests and timings. The
    centers are the float64 means of its clusters, so if KMeans stopped before convergence, a few
    entries may be on the other side of a cut point.

    Args:
        values: as for `cluster`.
        k: number of clusters, 2 to 8.
        n_init: number of initializations; the best result is returned.

    Raises:
        RecipeError, ValueError: as for `cluster`.
    """
    from sklearn.cluster import KMeans

    flat = _flat(values, k)
    numbers = as_float32(flat)
    histogram.require_finite(numbers)
    model = KMeans(
        min(k, np.unique(numbers).size),
        n_init=n_init,  # pyright: ignore[reportArgumentType]  inferred from the default, "auto"
        random_state=0,
    )
    labels = np.asarray(model.fit_predict(numbers[:, None]))
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


def _flat(values: np.ndarray, k: int) -> np.ndarray:
    if k not in range(2, 9):
        raise RecipeError(f"expected 2 to 8, got {k!r:.40}", field="clusters")
    if values.size == 0:
        raise ValueError(f"expected a non-empty array to cluster, got shape {values.shape}")
    if values.dtype not in (np.float16, np.float32, np.uint16):
        raise ValueError(
            f"dtype: expected float16, float32 or uint16 (bits of bfloat16), got {values.dtype}"
        )
    return np.ascontiguousarray(values).reshape(-1)


def _runs_of_distinct(flat: np.ndarray) -> Runs:
    if flat.dtype == np.float32:
        histogram.require_finite(flat)
        value, count = np.unique(flat + np.float32(0.0), return_counts=True)
    else:
        counts = histogram.count_patterns(flat.view(np.uint16))
        keys = histogram.ASCENDING[counts[histogram.ASCENDING] > 0].astype(np.uint16)
        value = as_float32(keys.view(flat.dtype))
        count = counts[keys]
        histogram.require_finite(value)
    return histogram.runs_of_equal(value.astype(np.float64), count)


def _narrow(
    runs: Runs, edges: np.ndarray, alive: np.ndarray, few: int
) -> tuple[np.ndarray, np.ndarray]:
    """Divide and test stretches until those that may contain a cut are single or `few` runs.

    Stretch b is between boundaries edges[b] and edges[b + 1], `edges` (n + 1,), and may contain
    cut c if alive[c, b], `alive` (parts - 1, n).
    """
    measure, upper = _measure(runs), math.inf
    while True:
        any_alive = np.any(alive, axis=0)
        start, stop = edges[:-1][any_alive], edges[1:][any_alive]
        crowd = max(alive.sum(axis=1), default=0)
        # The approximate slack of each bound. Dividing stretches far below the loosest one adds
        # tests that exclude nothing; if the loosest are single bins, they must be expanded first.
        loose = (runs.count[stop] - runs.count[start]) * (runs.high[stop - 1] - runs.low[start])
        due = (stop - start > 1) & (loose > loose.max(initial=0.0) / 16)
        if not due.any() or np.sum(stop - start) <= few or crowd > CROWD:
            return edges, alive
        inner = _inner(measure, start[due], stop[due], max(2, STRETCHES // crowd))
        finer = np.unique(np.concatenate(([0, runs.size], start, stop, inner)))
        alive = alive[:, np.searchsorted(edges, finer[:-1], side="right") - 1]
        edges = finer
        alive, upper = _test(runs, edges, alive, upper)


def _measure(runs: Runs) -> np.ndarray:
    # The share of entries suits smooth distributions, of squares outliers, of runs many scales.
    square = runs.square[0] - runs.square[0][0]
    return (
        runs.count / runs.count[-1]
        + square / max(square[-1], np.finfo(np.float64).tiny)
        + np.linspace(0.0, 1.0, runs.size + 1)
    )


def _inner(measure: np.ndarray, start: np.ndarray, stop: np.ndarray, pieces: int) -> np.ndarray:
    """Divide each stretch into pieces of equal measure, and also at its middle run."""
    share = np.arange(pieces) / pieces
    goal = measure[start] + np.outer(share, measure[stop] - measure[start])
    inner = np.clip(np.searchsorted(measure, goal), start, stop)
    return np.concatenate(((start + stop) // 2, inner.ravel()))


def _test(
    runs: Runs, edges: np.ndarray, alive: np.ndarray, upper: float
) -> tuple[np.ndarray, float]:
    """Lower `upper`, then keep the stretches where a cut may give an inertia up to `upper`.

    The recursion runs over pairs: the stretch of a cut, and the side to which its entries go.
    """
    stretches = [(edges[:-1][row], edges[1:][row]) for row in alive]
    ends = (np.array([0]),) * 2, (np.array([runs.size]),) * 2
    chain = [ends[0], *stretches, ends[1]]
    steps = [_between(runs, *pair) for pair in pairwise(chain)]

    before, after = [np.zeros((1, 2))], [np.zeros((1, 2))]
    for step in steps[:-1]:
        before.append((before[-1][..., None, None] + step).min(axis=(0, 1)))
    for step in reversed(steps[1:]):
        after.append((step + after[-1]).min(axis=(2, 3)))
    bounds = [a + b for a, b in zip(before[1:], reversed(after[1:]), strict=True)]

    choice = [np.unravel_index(np.argmin(bound), bound.shape) for bound in bounds]
    cuts = [stretch[1 - side][b] for stretch, (b, side) in zip(stretches, choice, strict=True)]
    upper = min(upper, runs.inertia(np.maximum.accumulate(cuts), SLACK) * (1.0 + ROUNDING))
    still_alive = np.zeros_like(alive)
    for row, old, bound in zip(still_alive, alive, bounds, strict=True):
        row[old] = bound.min(axis=1) <= upper
    return still_alive, upper


def _between(
    runs: Runs, left: tuple[np.ndarray, np.ndarray], right: tuple[np.ndarray, np.ndarray]
) -> np.ndarray:
    """Bound the inertia of a cluster that starts in one stretch and ends in another.

    Args:
        runs: runs of the whole array.
        left: (n,) starts and (n,) stops of the stretches it may start in.
        right: (m,) starts and (m,) stops of those it may end in.

    Returns:
        (n, 2, m, 2): all entries of either stretch go left [0] or right [1]. Infinite if the
        stretches are in the wrong order, 0 for a cluster inside one stretch.
    """
    bounds = np.full((left[0].size, 2, right[0].size, 2), np.inf)
    a, b = np.nonzero(left[0][:, None] == right[0])
    bounds[a, :, b, :] = 0.0
    a, b = np.nonzero(left[1][:, None] <= right[0])
    middle = runs.statistics(left[1][a], right[0][b], -SLACK)
    above = (runs.count[left[1]] - runs.count[left[0]])[a], runs.high[left[1] - 1][a]
    bottom = runs.low[np.minimum(right[0], runs.size - 1)]
    below = (runs.count[right[1]] - runs.count[right[0]])[b], bottom[b]
    for side, inner in ((0, middle), (1, _join(*middle, *above))):
        bounds[a, side, b, 1] = inner[2]
        bounds[a, side, b, 0] = _join(*inner, *below)[2]
    return bounds


def _join(
    count: np.ndarray, mean: np.ndarray, inertia: np.ndarray, extra: np.ndarray, place: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Add `extra` entries of value `place` to a cluster; rounds the inertia down."""
    total = count + extra
    share = extra / np.maximum(total, 1.0)
    shift = np.abs(place - mean)
    safe = np.maximum(shift - ROUNDING * (np.abs(place) + np.abs(mean)), 0.0)
    return total, mean + share * (place - mean), inertia + count * share * safe**2


def _boundaries(edges: np.ndarray, alive: np.ndarray) -> np.ndarray:
    # A cut needs a run on either side whose stretch is alive.
    run_alive = np.repeat(np.any(alive, axis=0), np.diff(edges))
    return np.flatnonzero(run_alive[:-1] & run_alive[1:]) + 1


def _best_cuts(runs: Runs, positions: np.ndarray, parts: int) -> np.ndarray:
    """Return the parts - 1 of the ascending boundaries `positions` with the least inertia."""
    if parts == 1:
        return positions[:0]
    stops = np.append(positions, runs.size)
    starts = np.insert(positions, 0, 0)

    def segment(first: np.ndarray, last: np.ndarray) -> np.ndarray:
        return runs.statistics(starts[first], stops[last])[2]

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

    The argmin never falls as j grows, so every BRANCH-th row bounds the search of the rows between;
    all rows of one level are evaluated together.
    """
    size = before.size
    best, choice = np.empty(size), np.zeros(size, np.intp)
    best[:1] = before[:1] + cost(choice[:1], choice[:1])
    step = 1
    while step < size:
        step *= BRANCH
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
        sums = before[columns] + cost(columns, np.repeat(rows, width))
        best[rows] = np.minimum.reduceat(sums, offset)
        hits = np.flatnonzero(sums == np.repeat(best[rows], width))
        choice[rows] = columns[hits[np.searchsorted(hits, offset)]]
    return best, choice


def _summary(runs: Runs, cuts: np.ndarray) -> Clustering:
    edges = np.concatenate(([0], cuts, [runs.size]))
    count, centers, _ = runs.statistics(edges[:-1], edges[1:])
    return Clustering(
        centers=tuple(centers.tolist()),
        cut_points=_midpoints(centers),
        upper_bounds=tuple(runs.high[cuts - 1].tolist()),
        counts=tuple(count.astype(int).tolist()),
        inertia=runs.inertia(cuts),
    )


def _midpoints(centers: np.ndarray | list[float]) -> tuple[float, ...]:
    ordered = np.asarray(centers, np.float64)
    return tuple(((ordered[:-1] + ordered[1:]) / 2).tolist())
