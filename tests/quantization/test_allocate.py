"""Sharing out bits: the optimum, against brute force."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import Bounds, LinearConstraint, milp

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
    assert sum(weight[name][option] for name, option in chosen.items()) <= budget
    best = min(
        sum(loss[name][option] for name, option in zip(loss, options, strict=True))
        for options in itertools.product(range(4), repeat=5)
        if sum(weight[name][option] for name, option in zip(loss, options, strict=True)) <= budget
    )
    assert sum(loss[name][option] for name, option in chosen.items()) <= best * (1 + 1e-5)


@pytest.mark.parametrize("seed", range(8))
def test_choices_of_many_items_are_those_of_a_mixed_integer_program(seed):
    loss, weight = problem(seed, items=20 + 10 * seed, options=8)
    names = list(loss)
    budget = sum(own[3] for own in weight.values())
    once = np.kron(np.eye(len(names)), np.ones(8))
    costs = np.array([[*weight[name].values()] for name in names]).reshape(1, -1)
    values = np.array([[*loss[name].values()] for name in names]).ravel()
    best = milp(
        values / values.max(),
        integrality=np.ones(values.size),
        bounds=Bounds(0, 1),
        constraints=[LinearConstraint(once, 1, 1), LinearConstraint(costs, ub=budget)],
        options={"mip_rel_gap": 1e-6},
    )
    chosen = allocate(loss, weight, budget)
    assert sum(weight[name][option] for name, option in chosen.items()) <= budget
    found = sum(loss[name][option] for name, option in chosen.items())
    assert found == pytest.approx(best.fun * values.max(), rel=2e-5)


def test_items_that_are_all_alike():
    loss, weight = problem(2, items=1, options=6)
    (own_loss,), (own_weight,) = loss.values(), weight.values()
    names = [str(number) for number in range(400)]
    budget = 200 * (own_weight[1] + own_weight[4]) + 1
    chosen = allocate(dict.fromkeys(names, own_loss), dict.fromkeys(names, own_weight), budget)
    assert sum(own_weight[option] for option in chosen.values()) <= budget
    found = sum(own_loss[option] for option in chosen.values())
    assert found <= 200 * (own_loss[1] + own_loss[4])


def test_a_budget_that_nothing_fits():
    loss, weight = problem(0)
    with pytest.raises(RecipeError, match=r"expected at least \d.*, got 1$"):
        allocate(loss, weight, 1)


def test_the_size_of_a_large_model_takes_seconds():
    loss, weight = problem(1, items=600, options=7)
    budget = sum(own[3] for own in weight.values())
    chosen = allocate(loss, weight, budget)
    assert sum(weight[name][option] for name, option in chosen.items()) <= budget
    even = sum(own[3] for own in loss.values())
    assert sum(loss[name][option] for name, option in chosen.items()) <= even
