"""The split: parts that sum exactly to the weight, divided at the cuts of k-means."""

from functools import reduce

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from splitquant_mlx import RecipeError, cluster_weight, split

DTYPES = {"float16": mx.float16, "bfloat16": mx.bfloat16, "float32": mx.float32}


def bits_of(w):
    return np.array(w.view(mx.uint32 if w.dtype == mx.float32 else mx.uint16))


@pytest.mark.parametrize("dtype", DTYPES)
@settings(deadline=None, max_examples=60)
@given(
    values=hnp.arrays(
        np.float32,
        hnp.array_shapes(min_dims=1, max_dims=4, max_side=12),
        elements=st.one_of(
            st.sampled_from([0.0, -0.0, 1.0, -1.0, 60000.0]), st.floats(-6e4, 6e4, width=32)
        ),
    ),
    k=st.integers(2, 8),
)
def test_parts_sum_to_the_weight_bitwise(dtype, values, k):
    w = mx.array(values).astype(DTYPES[dtype])
    parts = split(w, k)
    assert len(parts) == k
    assert all(part.dtype == w.dtype and part.shape == w.shape for part in parts)
    assert np.array_equal(bits_of(reduce(mx.add, parts)), bits_of(w))


@pytest.mark.parametrize("dtype", DTYPES)
def test_cut_points_divide_the_entries(dtype):
    w = mx.array(np.random.default_rng(0).standard_normal((64, 96)).astype(np.float32))
    w = w.astype(DTYPES[dtype])
    clustering = cluster_weight(w)
    low, high = clustering.cut_points
    values = np.array(w.astype(mx.float32), dtype=np.float64)
    labels = (values > low).astype(int) + (values > high)
    for c, part in enumerate(split(w)):
        assert np.array_equal(np.array((part == w) & (w != 0)), (labels == c) & (values != 0))
    lower, middle, upper = split(w)
    assert mx.max(lower).item() <= 0 and mx.min(upper).item() >= 0
    assert np.all(np.abs(np.array(middle.astype(mx.float32))) <= max(-low, high))


def test_parts_cover_narrower_ranges():
    w = mx.random.normal((64, 64), key=mx.random.key(0))
    spans = [(part.max() - part.min()).item() for part in split(w)]
    assert max(spans) < (w.max() - w.min()).item()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nan_and_infinity_are_rejected(bad):
    with pytest.raises(ValueError, match="NaN or infinite"):
        split(mx.array([1.0, bad, 2.0]))


@pytest.mark.parametrize("settings", [{"clusters": 1}, {"clusters": 2.5}, {"kmeans": "fast"}])
def test_settings_are_checked(settings):
    with pytest.raises(RecipeError, match=next(iter(settings))):
        split(mx.array([1.0, 2.0, 3.0]), **settings)
