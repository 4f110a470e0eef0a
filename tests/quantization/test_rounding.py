"""Rounding channel by channel, in numpy and in the kernel, against a scalar reference."""

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
    arrays = target, reference, feedback, scale, -7 * scale
    return [array.astype(np.float32) for array in arrays]


def reference_codes(target, reference, feedback, scale, bias, top):
    codes, errors = np.zeros_like(target), np.zeros_like(target)
    for row in range(target.shape[1]):
        for k in range(len(target)):
            goal = target[k, row] + feedback[k, :k] @ errors[:k, row]
            code = min(max(np.rint((goal - bias[row]) / scale[row]), 0), top)
            codes[k, row] = code
            errors[k, row] = reference[k, row] - (code * scale[row] + bias[row])
    return codes, errors


@settings(max_examples=20, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    group_size=st.sampled_from([32, 64, 128]),
    top=st.sampled_from([3, 7, 15, 255]),
)
def test_numpy_matches_the_reference(seed, group_size, top):
    arrays = group(seed, group_size, 5)
    expected = reference_codes(*arrays, top)
    codes, errors = round_group(arrays[0].copy(), *arrays[1:], top)
    same = codes == expected[0]
    # a value halfway between two codes may be rounded either way, which changes later channels
    assert same[: len(same) // 2].mean() > 0.9
    np.testing.assert_allclose(errors[0], expected[1][0], atol=1e-6)
    whole = same.all(axis=0)
    np.testing.assert_allclose(errors[:, whole], expected[1][:, whole], atol=1e-4)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="no g++")
@pytest.mark.parametrize("group_size", [32, 64, 128])
def test_kernel_matches_the_reference(group_size, tmp_path):
    names = ["target", "reference", "feedback", "scale", "bias"]
    arrays = group(3, group_size, 70)
    outputs = {name: np.full_like(arrays[0], np.nan) for name in ("codes", "errors")}
    run_kernel(
        SOURCE,
        tmp_path,
        threads=96,  # more than rows
        constants={"GROUP": group_size, "OUT": 70, "TOP": 15},
        inputs=dict(zip(names, arrays, strict=True)),
        outputs=outputs,
    )
    expected = reference_codes(*arrays, 15)
    same = (outputs["codes"] == expected[0]).all(axis=0)
    assert same.mean() > 0.9
    np.testing.assert_allclose(outputs["errors"][:, same], expected[1][:, same], atol=1e-4)
