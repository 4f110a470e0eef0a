"""The bootstrap interval of a mean KL divergence."""

import numpy as np
import pytest

from splitquant_mlx.evaluation.divergence import bootstrap_interval


def test_the_interval_agrees_with_the_normal_approximation():
    means = np.random.default_rng(1).exponential(0.1, 400)
    low, high = bootstrap_interval(means)
    half = 1.96 * means.std(ddof=1) / 20  # by the central limit theorem
    assert low == pytest.approx(means.mean() - half, abs=0.15 * half)
    assert high == pytest.approx(means.mean() + half, abs=0.15 * half)
    assert bootstrap_interval(means) == (low, high)
    assert bootstrap_interval(means[:1]) == (None, None)
