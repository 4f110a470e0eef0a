"""Bit allocation: the optimum, against brute force and a mixed-integer program."""

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
    cost = {name: {o: float(rng.integers(1, 50)) * (o + 1) for o in loss[name]} for name in names}
    return loss, cost


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), share=st.floats(0.0, 1.0))
def test_choice_is_optimal(seed, share):
    loss, cost = problem(seed)
    lowest = sum(min(costs.values()) for costs in cost.values())
    highest = sum(max(costs.values()) for costs in cost.values())
    budget = lowest + share * (highest - lowest)
    chosen = allocate(loss, cost, budget)
    assert chosen.keys() == loss.keys()
    assert sum(cost[name][option] for name, option in chosen.items()) <= budget
    best = min(
        sum(loss[name][option] for name, option in zip(loss, options, strict=True))
        for options in itertools.product(range(4), repeat=5)
        if sum(cost[name][option] for name, option in zip(loss, options, strict=True)) <= budget
    )
    assert sum(loss[name][option] for name, option in chosen.items()) <= best * (1 + 1e-5)


@pytest.mark.parametrize("seed", range(8))
def test_many_items_match_a_mixed_integer_program(seed):
    loss, cost = problem(seed, items=20 + 10 * seed, options=8)
    names = list(loss)
    budget = sum(costs[3] for costs in cost.values())
    once = np.kron(np.eye(len(names)), np.ones(8))
    costs = np.array([[*cost[name].values()] for name in names]).reshape(1, -1)
    values = np.array([[*loss[name].values()] for name in names]).ravel()
    best = milp(
        values / values.max(),
        integrality=np.ones(values.size),
        bounds=Bounds(0, 1),
        constraints=[LinearConstraint(once, 1, 1), LinearConstraint(costs, ub=budget)],
        options={"mip_rel_gap": 1e-6},
    )
    chosen = allocate(loss, cost, budget)
    assert sum(cost[name][option] for name, option in chosen.items()) <= budget
    total = sum(loss[name][option] for name, option in chosen.items())
    assert total == pytest.approx(best.fun * values.max(), rel=2e-5)


def test_identical_items():
    loss, cost = problem(2, items=1, options=6)
    (losses,), (costs,) = loss.values(), cost.values()
    names = [str(number) for number in range(400)]
    budget = 200 * (costs[1] + costs[4]) + 1
    chosen = allocate(dict.fromkeys(names, losses), dict.fromkeys(names, costs), budget)
    assert sum(costs[option] for option in chosen.values()) <= budget
    total = sum(losses[option] for option in chosen.values())
    assert total <= 200 * (losses[1] + losses[4])


def test_budget_below_the_cheapest_choice():
    loss, cost = problem(0)
    with pytest.raises(RecipeError, match=r"expected at least \d.*, got 1$"):
        allocate(loss, cost, 1)


def test_size_of_a_large_model():
    loss, cost = problem(1, items=600, options=7)
    budget = sum(costs[3] for costs in cost.values())
    chosen = allocate(loss, cost, budget)
    assert sum(cost[name][option] for name, option in chosen.items()) <= budget
    even = sum(losses[3] for losses in loss.values())
    assert sum(loss[name][option] for name, option in chosen.items()) <= even
