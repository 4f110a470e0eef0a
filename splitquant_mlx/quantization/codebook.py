"""Compute one codebook per row of a weight: exact weighted 1-D k-means, vectorized over rows.

In one dimension the optimal clusters are intervals of the sorted values (see `kmeans`). With m_i
the importance of value x_i, and inner sums over a cluster, the weighted inertia of a row is

    sum_i m_i x_i^2 - sum over clusters (sum m_i x_i)^2 / sum m_i,

so the optimal cuts maximise the second term. Dynamic programming over the last cut finds the global
optimum. The optimal last cut never moves left as values are added, so a row of n values takes
O(k n log n).

SqueezeLLM (Kim et al., arXiv:2306.07629) clusters rows the same way by Lloyd's iterations, with
importances from the diagonal of the Hessian.
"""

import numpy as np

BLOCK = 1 << 15  # entries per block of rows, so that prefix sums fit in the CPU cache
TINY = np.finfo(np.float64).tiny
POWER_SCALES = np.linspace(0.4, 1.2, 33, dtype=np.float32)  # relative to the row maximum


def row_codebooks(w: np.ndarray, importance: np.ndarray, k: int) -> np.ndarray:
    """Return the codebook of each row with the least weighted squared error: the global optimum.

    Args:
        w: (rows, n) float.
        importance: (rows, n), not negative: the weight of each entry's squared error.
        k: values per codebook.

    Returns:
        (rows, k) float32, ascending; values repeat if a row has fewer distinct entries.
    """
    rows = max(1, BLOCK // w.shape[1])
    blocks = [
        _codebooks(w[start : start + rows], importance[start : start + rows], k)
        for start in range(0, len(w), rows)
    ]
    return np.concatenate(blocks).astype(np.float32)


def power_codebooks(w: np.ndarray, importance: np.ndarray, k: int) -> np.ndarray:
    """Return codebooks (rows, k) of signed powers of two times the best of some scales per row."""
    powers = 2.0 ** -np.arange(k // 2, dtype=np.float32)
    unit = np.concatenate((-powers, powers[::-1]))
    scales = np.abs(w).max(1) * POWER_SCALES[:, None]  # (candidates, rows)
    candidates = scales[..., None] * unit
    errors = [(importance * (w - nearest(w, levels)) ** 2).sum(1) for levels in candidates]
    return candidates[np.argmin(errors, axis=0), np.arange(len(w))]


def nearest(w: np.ndarray, levels: np.ndarray) -> np.ndarray:
    """Return for each entry of w (rows, n) the nearest of its row's levels (rows, k)."""
    middles = (levels[:, 1:] + levels[:, :-1]) / 2
    codes = np.zeros(w.shape, np.intp)
    for middle in middles.T:
        codes += w > middle[:, None]
    return np.take_along_axis(levels, codes, axis=1)


def _codebooks(w: np.ndarray, importance: np.ndarray, k: int) -> np.ndarray:
    order = np.argsort(w, axis=1)
    x = np.take_along_axis(w, order, axis=1).astype(np.float64)
    m = np.take_along_axis(importance, order, axis=1).astype(np.float64)
    middle = x[:, x.shape[1] // 2, None]
    mass, moment = (
        np.pad(np.cumsum(values, axis=1), ((0, 0), (1, 0))) for values in (m, m * (x - middle))
    )  # (rows, n + 1): sums over the entries before a cut
    best, choices = _gain(mass, moment), []
    for _ in range(k - 2):
        best, choice = _best_last_cuts(best, mass, moment)
        choices.append(choice)
    cuts = [np.full(len(x), x.shape[1])]
    if k > 1:
        cuts.append(np.argmax(best + _gain(mass[:, -1:] - mass, moment[:, -1:] - moment), axis=1))
    rows = np.arange(len(x))
    for choice in reversed(choices):
        cuts.append(choice[rows, cuts[-1]])
    bounds = np.stack([np.zeros_like(cuts[0]), *cuts[::-1]], axis=1)
    masses, moments = (np.diff(np.take_along_axis(a, bounds, 1), axis=1) for a in (mass, moment))
    at_cut = np.take_along_axis(x, np.minimum(bounds[:, :-1], x.shape[1] - 1), axis=1)
    return np.where(masses > 0, middle + moments / np.maximum(masses, TINY), at_cut)


def _gain(mass: np.ndarray, moment: np.ndarray) -> np.ndarray:
    return moment * moment / np.maximum(mass, TINY)


def _best_last_cuts(
    before: np.ndarray, mass: np.ndarray, moment: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Maximise before[i] + the gain of entries i to j over i <= j: maxima and first argmaxima.

    All arrays are (rows, n + 1). Each round computes the positions j halfway between computed
    ones; the argmax lies between those of the two neighbours.
    """
    rows, size = before.shape
    best, choice = before.copy(), np.zeros((rows, size), np.intp)
    flat_before, flat_mass, flat_moment = before.ravel(), mass.ravel(), moment.ravel()
    offsets = np.arange(rows)[:, None] * size
    step = 1 << (size - 1).bit_length()
    while step > 1:
        step //= 2
        stops = np.arange(step, size, 2 * step)
        first = choice[:, stops - step]
        right = stops + step
        last = np.where(right < size, choice[:, np.minimum(right, size - 1)], size - 1)
        widths = (np.minimum(last, stops) - first + 1).ravel()
        begins = np.cumsum(widths) - widths
        starts = np.arange(widths.sum()) + np.repeat((first + offsets).ravel() - begins, widths)
        ends = (stops + offsets).ravel()
        gains = flat_before[starts] + _gain(
            np.repeat(flat_mass[ends], widths) - flat_mass[starts],
            np.repeat(flat_moment[ends], widths) - flat_moment[starts],
        )
        maxima = np.maximum.reduceat(gains, begins)
        hits = np.flatnonzero(gains == np.repeat(maxima, widths))
        cuts = starts[hits[np.searchsorted(hits, begins)]].reshape(rows, -1) - offsets
        best[:, stops], choice[:, stops] = maxima.reshape(rows, -1), cuts
    return best, choice
