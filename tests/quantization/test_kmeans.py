import itertools
from contextlib import contextmanager
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from splitquant_mlx.errors import RecipeError
from splitquant_mlx.quantization import histogram, kmeans
from splitquant_mlx.quantization.kmeans import Clustering, cluster, cluster_sklearn

ENDLESS = 1 << 62


def as_float64(values: np.ndarray) -> np.ndarray:
    if values.dtype == np.uint16:
        values = (values.astype(np.uint32) << 16).view(np.float32)
    return values.astype(np.float64).ravel()


def bfloat16(values: np.ndarray) -> np.ndarray:
    return (np.asarray(values, np.float32).view(np.uint32) >> 16).astype(np.uint16)


def exact_inertia(counted: list[tuple[Fraction, int]]) -> Fraction:
    count = sum(n for _, n in counted)
    mean = sum(x * n for x, n in counted) / count
    return sum(((x - mean) ** 2 * n for x, n in counted), Fraction(0))


def exact_optimum(counted: list[tuple[Fraction, int]], parts: int) -> Fraction:
    size = len(counted)
    return min(
        sum(exact_inertia(counted[a:b]) for a, b in itertools.pairwise((0, *cuts, size)))
        for cuts in itertools.combinations(range(1, size), parts - 1)
    )


def check_consistent(result: Clustering, values: np.ndarray, k: int) -> None:
    x = as_float64(values)
    d = min(k, np.unique(x).size)
    assert len(result.centers) == len(result.counts) == d
    assert len(result.cut_points) == len(result.upper_bounds) == d - 1
    assert all(a < b for a, b in itertools.pairwise(result.centers))
    assert result.cut_points == tuple((a + b) / 2 for a, b in itertools.pairwise(result.centers))
    labels = sum((x > bound).astype(int) for bound in result.upper_bounds) + np.zeros(x.size, int)
    by_cut = sum((x > cut).astype(int) for cut in result.cut_points) + np.zeros(x.size, int)
    np.testing.assert_array_equal(labels, by_cut)
    assert result.counts == tuple(np.bincount(labels, minlength=d).tolist())
    assert min(result.counts) > 0
    for label, bound in enumerate(result.upper_bounds):
        assert bound == x[labels == label].max()
    scale = np.abs(x).max() or 1.0
    for label, center in enumerate(result.centers):
        assert center == pytest.approx(x[labels == label].mean(), rel=1e-12, abs=1e-12 * scale)


def check_optimal(result: Clustering, values: np.ndarray, k: int) -> None:
    distinct, counts = np.unique(as_float64(values), return_counts=True)
    counted = [(Fraction(x), int(n)) for x, n in zip(distinct.tolist(), counts, strict=True)]
    best = exact_optimum(counted, min(k, len(counted)))
    ends = np.searchsorted(distinct, result.upper_bounds, side="right").tolist()
    edges = (0, *ends, len(counted))
    got = sum(exact_inertia(counted[a:b]) for a, b in itertools.pairwise(edges))
    assert got <= best * (1 + Fraction(1, 10**12))
    assert result.inertia == pytest.approx(float(best), rel=1e-12, abs=0)
    for center, (a, b) in zip(result.centers, itertools.pairwise(edges), strict=True):
        part = counted[a:b]
        mean = sum(x * n for x, n in part) / sum(n for _, n in part)
        size = max(abs(x) for x, _ in part)
        assert abs(Fraction(center) - mean) <= max(abs(mean), size * Fraction(1, 2**20)) / 10**14


FINITE = {
    "float16": [b for b in range(1 << 16) if b >> 10 & 0x1F != 0x1F],
    "bfloat16": [b for b in range(1 << 16) if b >> 7 & 0xFF != 0xFF],
}
# built once: hypothesis inspects every element of a list it is given
PATTERNS = {
    **{kind: st.sampled_from(patterns) for kind, patterns in FINITE.items()},
    "float32": st.integers(0, (1 << 32) - 1).filter(lambda b: b >> 23 & 0xFF != 0xFF),
}


@st.composite
def small_arrays(draw: st.DrawFn) -> np.ndarray:
    """Up to 11 distinct values of any size, or one ulp apart, or on a lattice, each repeated."""
    kind = draw(st.sampled_from(sorted(PATTERNS)))
    pattern = PATTERNS[kind]
    if kind == "float32":
        top, word = 0x7F7FFFFF, np.uint32
    else:
        top, word = FINITE[kind][len(FINITE[kind]) // 2 - 1], np.uint16
    sign = 1 << (np.dtype(word).itemsize * 8 - 1)
    start = draw(pattern)
    near = st.integers(0, 8).map(lambda ulps: start + ulps if start % sign + ulps <= top else start)
    special = st.sampled_from([0, sign, 1, 2, sign + 1, top, top - 1, sign + top])
    lattice = st.integers(-6, 6).map(lambda i: encode(i / 4, kind))
    source = draw(st.sampled_from([pattern, near, special, lattice]))
    bits = draw(st.lists(st.one_of(source, source, special, near), min_size=1, max_size=11))
    repeats = draw(
        st.lists(st.sampled_from([1, 1, 2, 3, 1000]), min_size=len(bits), max_size=len(bits))
    )
    array = np.repeat(np.array(bits, word), repeats)
    return array if kind == "bfloat16" else array.view(kind)


def encode(number: float, kind: str) -> int:
    if kind == "bfloat16":
        return int(bfloat16(np.array([number]))[0])
    word = np.uint16 if kind == "float16" else np.uint32
    return int(np.array([number], kind).view(word)[0])


@settings(max_examples=120, deadline=None)
@given(values=small_arrays(), k=st.integers(2, 8))
def test_is_the_global_optimum(values, k):
    result = cluster(values, k)
    check_optimal(result, values, k)
    check_consistent(result, values, k)


@contextmanager
def limits(value):
    """Set the sizes below which arrays are sorted and stretches are not divided."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kmeans, "SMALL", value)
        patch.setattr(kmeans, "FEW", value)
        yield


@settings(max_examples=120, deadline=None)
@given(values=small_arrays(), k=st.integers(2, 8))
def test_pruning_keeps_the_global_optimum(values, k):
    with limits(0):
        result = cluster(values, k)
    check_optimal(result, values, k)
    check_consistent(result, values, k)


def draw_weights(name: str, size: int) -> np.ndarray:
    rng = np.random.default_rng(7)
    normal = rng.standard_normal(size)
    return {
        "normal": lambda: normal * 0.02,
        "laplace": lambda: rng.laplace(size=size),
        "uniform": lambda: rng.uniform(-1, 1, size),
        "bimodal": lambda: normal + rng.choice([-5.0, 5.0], size),
        "outliers": lambda: np.where(rng.random(size) < 1e-4, 50.0, 0.02) * normal,
        "lattice": lambda: rng.integers(-8, 8, size) / 8,
        "off centre": lambda: 100 + normal * 1e-3,
        "many scales": lambda: rng.choice([-1, 1], size) * np.exp(rng.uniform(-30, 30, size)),
    }[name]().astype(np.float32)


DISTRIBUTIONS = [
    "normal",
    "laplace",
    "uniform",
    "bimodal",
    "outliers",
    "lattice",
    "off centre",
    "many scales",
]


@pytest.mark.parametrize("name", DISTRIBUTIONS)
@pytest.mark.parametrize("k", [3, 5])
def test_is_never_above_sklearn(name, k):
    values = draw_weights(name, 5_000)
    for array in (values, bfloat16(values)):
        result, published = cluster(array, k), cluster_sklearn(array, k)
        check_consistent(result, array, k)
        assert result.inertia <= published.inertia * (1 + 1e-12)
        assert sum(published.counts) == array.size


def test_sklearn_agrees_on_clear_clusters():
    values = draw_weights("bimodal", 5_000).astype(np.float16)
    values[:100] = 60_000
    result, published = cluster(values), cluster_sklearn(values)
    assert result.counts == published.counts
    assert result.upper_bounds == published.upper_bounds
    assert result.centers == pytest.approx(published.centers, rel=1e-12)
    assert result.inertia == pytest.approx(published.inertia, rel=1e-9)
    assert len(cluster_sklearn(np.ones(5, np.float32)).centers) == 1


@pytest.mark.parametrize("name", DISTRIBUTIONS)
@pytest.mark.parametrize("k", [2, 3, 5])
def test_float32_bins_and_full_sort_agree(name, k):
    values = draw_weights(name, 70_000)
    pruned = cluster(values, k)
    with limits(ENDLESS):
        full = cluster(values, k)
    assert pruned.counts == full.counts
    assert pruned.upper_bounds == full.upper_bounds
    assert pruned.centers == pytest.approx(full.centers, rel=1e-14)
    assert pruned.inertia == pytest.approx(full.inertia, rel=1e-13)


@pytest.mark.parametrize("spread", [0.0, 2.0**-23, 1e-3])
@pytest.mark.parametrize("outlier", [3e38, 1e9])
def test_outliers_do_not_reduce_precision(outlier, spread):
    rng = np.random.default_rng(3)
    bulk = rng.standard_normal(100_000).astype(np.float32) * np.float32(0.02)
    values = np.append(bulk, (outlier * (1 - np.arange(3) * spread)).astype(np.float32))
    distinct = np.unique(values[-3:]).size
    result, alone = cluster(values, 3 + distinct), cluster(bulk, 3)
    assert result.centers[:3] == pytest.approx(alone.centers, rel=1e-14)
    assert result.upper_bounds[:2] == alone.upper_bounds
    assert result.inertia == pytest.approx(alone.inertia, rel=1e-13)


@pytest.mark.parametrize("seed", range(12, 18))
def test_repeated_outliers_do_not_reduce_precision(seed):
    rng = np.random.default_rng(seed)
    bulk = (rng.standard_normal(30_000) * 0.02).astype(np.float32)
    for outlier in (10.0 ** rng.uniform(0, 38, 4)).astype(np.float32):
        values = np.append(bulk, np.repeat([outlier, outlier * np.float32(1.3)], 1000))
        assert cluster(values, 5).inertia == pytest.approx(cluster(bulk, 3).inertia, rel=1e-13)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_order_and_shape_do_not_matter(dtype):
    values = draw_weights("normal", 100_000)
    array = bfloat16(values) if dtype == "bfloat16" else values.astype(dtype)
    shuffled = np.random.default_rng(1).permutation(array)
    result = cluster(array)
    assert cluster(array) == result
    assert cluster(shuffled) == result
    assert cluster(array.reshape(250, 400)) == result
    assert cluster(np.asfortranarray(array.reshape(250, 400))) == result
    assert cluster(np.repeat(array, 2)[::2]) == result


@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("exponent", [-3, 4])
def test_power_of_two_scales_everything(dtype, exponent):
    values = draw_weights("uniform", 80_000).astype(dtype)
    values = values[np.abs(values) > 0.01]  # no float16 subnormals, which would round
    factor = 2.0**exponent
    plain, scaled = cluster(values, 4), cluster(values * values.dtype.type(factor), 4)
    assert scaled.counts == plain.counts
    for name in ("centers", "cut_points", "upper_bounds"):
        assert getattr(scaled, name) == tuple(factor * x for x in getattr(plain, name))
    assert scaled.inertia == pytest.approx(factor**2 * plain.inertia, rel=1e-14)


def test_negation_mirrors():
    values = draw_weights("laplace", 100_000)
    plain, mirrored = cluster(values, 5), cluster(-values, 5)
    assert mirrored.counts == plain.counts[::-1]
    assert mirrored.centers == pytest.approx([-c for c in plain.centers[::-1]], rel=1e-14)


@pytest.mark.parametrize("size", [1, 70_000])
def test_constant_array_is_one_cluster(size):
    for value in (np.float16(0.3), np.float32(-0.3), np.uint16(0x3F80)):
        result = cluster(np.full(size, value), 3)
        center = float(as_float64(np.array([value]))[0])
        assert result == Clustering(
            centers=(center,), cut_points=(), upper_bounds=(), counts=(size,), inertia=0.0
        )


@pytest.mark.parametrize("size", [2, 70_000])
def test_zero_has_no_sign(size):
    for array in (np.zeros(size, np.float16), np.zeros(size, np.float32)):
        array[1::2] *= -1
        assert cluster(array).counts == (size,)
        assert str(cluster(array).centers[0]) == "0.0"
    assert cluster(np.resize(np.array([0, 0x8000], np.uint16), size)).counts == (size,)


def test_fewer_values_than_clusters():
    values = np.array([5, 1, 1, 2], np.float32)
    result = cluster(values, 8)
    assert result.centers == (1.0, 2.0, 5.0)
    assert result.upper_bounds == (1.0, 2.0)
    assert result.counts == (2, 1, 1)
    assert result.inertia == 0.0
    assert cluster(np.repeat(values, 20_000), 8).counts == (40_000, 20_000, 20_000)


def test_ties_go_to_the_lowest_cut():
    assert cluster(np.array([1, 2, 3], np.float16), 2).counts == (1, 2)


def test_bin_moments_are_exact():
    rng = np.random.default_rng(5)
    values = (rng.standard_normal(3_000) * 10.0 ** rng.integers(-44, 38, 3_000)).astype(np.float32)
    keys, bins = histogram.runs_of_bins(values)
    bits = values.view(np.uint32)
    start = np.arange(bins.size)
    count, total, square = bins.moments(start, start + 1)
    for i in rng.choice(bins.size, 300, replace=False):
        inside = [Fraction(float(x)) for x in values[bits >> 16 == keys[i]]]
        assert count[i] == len(inside)
        assert all(bins.low[i] <= x <= bins.high[i] for x in inside)
        for pair, power in ((total, 1), (square, 2)):
            got = Fraction(float(pair[0][i])) + Fraction(float(pair[1][i]))
            expected = sum(x**power for x in inside)
            assert abs(got - expected) <= abs(expected) * Fraction(1, 2**85)


@pytest.mark.parametrize("k", [-1, 0, 1, 9])
@pytest.mark.parametrize("find", [cluster, cluster_sklearn])
def test_k_out_of_range(find, k):
    with pytest.raises(RecipeError, match=f"clusters: expected 2 to 8, got {k}"):
        find(np.ones(4, np.float32), k)


@pytest.mark.parametrize("find", [cluster, cluster_sklearn])
def test_unusable_arrays(find):
    with pytest.raises(ValueError, match="expected a non-empty array"):
        find(np.ones((0, 4), np.float16))
    for dtype in ("float64", "int16", "uint8", ">f4"):
        with pytest.raises(ValueError, match="expected float16, float32 or uint16"):
            find(np.ones(4, dtype))


@pytest.mark.parametrize("find", [cluster, cluster_sklearn])
@pytest.mark.parametrize("size", [3, 70_000])
def test_not_finite(find, size):
    patterns = {np.float16: [0x7C00, 0xFC00, 0x7E00, 0x7C01], np.uint16: [0x7F80, 0xFF80, 0x7FC1]}
    for dtype, bits in patterns.items():
        for pattern in bits:
            array = np.ones(size, dtype)
            array.view(np.uint16)[1] = pattern
            with pytest.raises(ValueError, match="NaN or infinite"):
                find(array)
    for pattern in (0x7F800000, 0xFF800000, 0x7FC00000, 0x7F800001, 0xFFFFFFFF):
        array = np.ones(size, np.float32)
        array.view(np.uint32)[1] = pattern
        with pytest.raises(ValueError, match="NaN or infinite"):
            find(array)
