"""Time the exact k-means against scikit-learn's, which the published approach uses.

python benchmarks/kmeans_speed.py docs/kmeans.json
"""

import json
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx

from splitquant_mlx.cli.progress import Bars
from splitquant_mlx.progress import SILENT, Progress
from splitquant_mlx.quantization.split import cluster_weight
from splitquant_mlx.recipe import DTYPES
from splitquant_mlx.runtime.environment import made_with


def bench_kmeans(
    *,
    side: int = 4096,
    trials: int = 5,
    sklearn_trials: int = 3,
    dtype: str = "bfloat16",
    clusters: int = 3,
) -> dict[str, Any]:
    """Time both ways to cluster one square matrix of normal weights, in this process, in turns.

    Args:
        side: of the matrix.
        trials: counted runs of the exact way, each after one that is not.
        sklearn_trials: counted runs of scikit-learn (its default of one start).
        dtype: "float16", "bfloat16" or "float32".
        clusters: k, 2 to 8.

    Returns:
        JSON values: medians and all runs, nanoseconds a weight, their ratio, and the inertia each
        found.
    """
    w = mx.random.normal((side, side), key=mx.random.key(0)) * 0.02
    w = w.astype(getattr(mx, dtype))
    mx.eval(w)

    def timed(kmeans: str) -> tuple[float, float]:
        started = time.perf_counter()
        inertia = cluster_weight(w, clusters, kmeans).inertia
        return (time.perf_counter() - started) / w.size * 1e9, inertia

    cluster_weight(w[:8], clusters, "sklearn")  # its first call imports it
    exact, sklearn = [], []
    for trial in range(max(trials, sklearn_trials)):
        if trial < sklearn_trials:
            sklearn.append(timed("sklearn"))
        if trial < trials:
            timed("exact")  # scikit-learn's threads spin on for a while, and the caches are theirs
            exact.append(timed("exact"))
    exact_ns = statistics.median(ns for ns, _ in exact)
    sklearn_ns = statistics.median(ns for ns, _ in sklearn)
    return {
        "shape": [side, side],
        "dtype": dtype,
        "clusters": clusters,
        "exact_ns_per_weight": exact_ns,
        "sklearn_ns_per_weight": sklearn_ns,
        "ratio": sklearn_ns / exact_ns,
        "exact_runs_ns": [ns for ns, _ in exact],
        "sklearn_runs_ns": [ns for ns, _ in sklearn],
        "exact_inertia": exact[0][1],
        "sklearn_inertia": sklearn[0][1],
    }


def bench_all_kmeans(
    dtypes: Sequence[str],
    clusters: Sequence[int],
    *,
    side: int = 4096,
    trials: int = 5,
    progress: Progress = SILENT,
) -> dict[str, Any]:
    """Run `bench_kmeans` for every pair of a dtype and a number of clusters.

    Returns:
        JSON values: "runs", one `bench_kmeans` each, and the environment.
    """
    pairs = [(dtype, k) for dtype in dtypes for k in clusters]
    with progress.task("Clustering", len(pairs)) as advance:
        runs = []
        for dtype, k in pairs:
            runs.append(bench_kmeans(side=side, trials=trials, dtype=dtype, clusters=k))
            advance(1)
    return {"runs": runs, **made_with()}


if __name__ == "__main__":
    measured = bench_all_kmeans(DTYPES, [3], progress=Bars())
    Path(sys.argv[1]).write_text(json.dumps(measured, indent=2) + "\n", encoding="utf-8")
