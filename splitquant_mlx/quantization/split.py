"""Split a weight by k-means into parts that sum to it.

SplitQuantV2 (Song & Lin 2025, arXiv:2503.07657, section 3): cluster all entries of a weight into
k groups by value; part c contains the entries of group c and is zero elsewhere. Every part has a
narrower range than the weight, so the same number of codes covers it more finely.

Each zero has the sign of the entry it replaces. The sum of the parts is then exactly the weight,
even where the weight is -0.0, since only -0.0 + -0.0 is -0.0.
"""

from itertools import pairwise

import mlx.core as mx

from splitquant_mlx.errors import RecipeError
from splitquant_mlx.quantization.host import host_values
from splitquant_mlx.quantization.kmeans import Clustering, cluster, cluster_sklearn


def cluster_weight(w: mx.array, clusters: int = 3, kmeans: str = "exact") -> Clustering:
    """Cluster all entries of `w` (any shape; float16, bfloat16 or float32) into `clusters` groups.

    Raises:
        RecipeError: `clusters` is not 2 to 8, or `kmeans` neither "exact" nor "sklearn".
        ValueError: `w` contains NaN or infinite values, is empty, or has another dtype.
    """
    if kmeans not in ("exact", "sklearn"):
        raise RecipeError(f"expected 'exact' or 'sklearn', got {kmeans!r:.40}", field="kmeans")
    values = host_values(w)
    if kmeans == "sklearn":
        return cluster_sklearn(values, clusters, n_init=1)  # scikit-learn's default
    return cluster(values, clusters)


def split(w: mx.array, clusters: int = 3, kmeans: str = "exact") -> list[mx.array]:
    """Split `w` into `clusters` parts of its shape and dtype, lowest entries first.

    The parts sum exactly to `w`. If `w` has fewer distinct values than `clusters`, the last parts
    are zero.

    Raises:
        RecipeError, ValueError: as `cluster_weight` does.
    """
    return parts_of(w, cluster_weight(w, clusters, kmeans), clusters)


def parts_of(w: mx.array, clustering: Clustering, clusters: int) -> list[mx.array]:
    """Split `w` by a given clustering; see `split`."""
    if not clustering.upper_bounds:
        return [w, *[w * 0] * (clusters - 1)]
    # a bound is one of the entries, so the cast is exact
    bounds = [mx.array(bound, w.dtype) for bound in clustering.upper_bounds]
    above = [w > bound for bound in bounds]
    inside = [w <= bounds[0], *(low > high for low, high in pairwise(above)), above[-1]]
    # multiplying by a mask is five times as fast as mx.where on the CPU
    return [w * mask for mask in inside] + [w * 0] * (clusters - len(inside))
