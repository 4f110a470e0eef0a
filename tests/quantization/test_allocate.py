"""Sharing out bits: the optimum, against brute force."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from splitquant_mlx import RecipeError
from splitquant_mlx.quantization.allocate import allocate


def problem(seed, items=5, options=4):
    rng = np.random.default_rng(seed)
    names = [f"layer {i}" for i in range(items)]
    loss = {name: {o: float(rng.exponential(4.0**-o)) for o in range(options)} for name in names}
    weight = {name: {o: float(rng.integers(1, 50)) * (o + 1) for o in loss[name]} for name in names}
    return loss, weight


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), share=st.floats(0.0, 1.0))
def test_no_other_choice_is_better(seed, share):
    loss, weight = problem(seed)
    least = sum(min(own.values()) for own in weight.values())
    most = sum(max(own.values()) for own in weight.values())
    budget = least + share * (most - least)
    chosen = allocate(loss, weight, budget)
    assert chosen.keys() == loss.keys()
    assert sum(weight[name][option] for name, option in chosen.items()) <= budget * (1 + 1e-6)
    best = min(
        sum(loss[name][option] for name, option in zip(loss, options, strict=True))
        for options in itertools.product(range(4), repeat=5)
        if sum(weight[name][option] for name, option in zip(loss, options, strict=True)) <= budget
    )
    assert sum(loss[name][option] for name, option in chosen.items()) <= best * 1.001 + 1e-9


def test_a_budget_that_nothing_fits():
    loss, weight = problem(0)
    with pytest.raises(RecipeError, match=r"expected at least \d.*, got 1$"):
        allocate(loss, weight, 1)


def test_the_size_of_a_large_model_takes_seconds():
    loss, weight = problem(1, items=600, options=7)
    budget = sum(own[3] for own in weight.values())
    chosen = allocate(loss, weight, budget)
    assert sum(weight[name][option] for name, option in chosen.items()) <= budget * (1 + 1e-6)
    even = sum(own[3] for own in loss.values())
    assert sum(loss[name][option] for name, option in chosen.items()) <= even
