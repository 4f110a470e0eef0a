"""Rounding channel by channel: numpy's way and the kernel's against one weight at a time."""

import shutil

import numpy as np
import pytest
from compiled import run_kernel
from hypothesis import given, settings
from hypothesis import strategies as st

from splitquant_mlx.quantization.rounding import SOURCE, round_group


def group(seed: int, group_size: int, out: int) -> list[np.ndarray]:
    """Return target, reference, feedback, scale and bias."""
    rng = np.random.default_rng(seed)
    target, reference = rng.standard_normal((2, group_size, out))
    feedback = rng.standard_normal((group_size, group_size)) / group_size
    scale = rng.uniform(0.1, 0.5, out) * rng.choice([-1, 1], out)
    made = target, reference, feedback, scale, -7 * scale
    return [array.astype(np.float32) for array in made]


def one_by_one(target, reference, feedback, scale, bias, top):
    codes, errors = np.zeros_like(target), np.zeros_like(target)
    for row in range(target.shape[1]):
        for k in range(len(target)):
            wanted = target[k, row] + feedback[k, :k] @ errors[:k, row]
            code = min(max(np.rint((wanted - bias[row]) / scale[row]), 0), top)
            codes[k, row] = code
            errors[k, row] = reference[k, row] - (code * scale[row] + bias[row])
    return codes, errors


@settings(max_examples=20, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    group_size=st.sampled_from([32, 64, 128]),
    top=st.sampled_from([3, 7, 15, 255]),
)
def test_rounding_is_that_of_one_weight_after_the_other(seed, group_size, top):
    given_ = group(seed, group_size, 5)
    expected = one_by_one(*given_, top)
    codes, errors = round_group(given_[0].copy(), *given_[1:], top)
    same = codes == expected[0]
    # what lies between two codes may go either way, and what comes after it with it
    assert same[: len(same) // 2].mean() > 0.9
    np.testing.assert_allclose(errors[0], expected[1][0], atol=1e-6)
    whole = same.all(axis=0)
    np.testing.assert_allclose(errors[:, whole], expected[1][:, whole], atol=1e-4)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="no g++")
@pytest.mark.parametrize("group_size", [32, 64, 128])
def test_the_kernel_does_what_numpy_does(group_size, tmp_path):
    names = ["target", "reference", "feedback", "scale", "bias"]
    made = group(3, group_size, 70)
    found = {name: np.full_like(made[0], np.nan) for name in ("codes", "errors")}
    run_kernel(
        SOURCE,
        tmp_path,
        threads=96,  # more than rows
        constants={"GROUP": group_size, "OUT": 70, "TOP": 15},
        inputs=dict(zip(names, made, strict=True)),
        outputs=found,
    )
    expected = one_by_one(*made, 15)
    same = (found["codes"] == expected[0]).all(axis=0)
    assert same.mean() > 0.9
    np.testing.assert_allclose(found["errors"][:, same], expected[1][:, same], atol=1e-4)
