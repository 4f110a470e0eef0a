"""Allocate bits to layers: one option per layer, with the least total loss under a budget.

This is the multiple-choice knapsack problem. At a price p per unit of cost, each item separately
has an option of least loss + p cost. The sum of these minima, minus p times the budget, is a lower
bound on the total loss (Lagrangian relaxation). The loss of a choice exceeds the bound by

    sum_i (loss + p cost of its option, minus the item's minimum) + p (unspent budget).

At a suitable price the optimum exceeds the bound by little, so few options of each item can be part
of it. All choices of these are enumerated item by item; partial choices that another one dominates
in cost and loss are dropped (Nemhauser and Ullmann, Management Science 15, 1969).
"""

from collections.abc import Hashable, Mapping
from typing import TypeVar

import numpy as np

from splitquant_mlx.errors import RecipeError

Option = TypeVar("Option", bound=Hashable)
FIRST_LIMIT = 1e-5  # excess over the bound searched first, as a fraction of the loss
BISECTIONS = 100


def allocate(
    loss: Mapping[str, Mapping[Option, float]],
    cost: Mapping[str, Mapping[Option, float]],
    budget: float,
) -> dict[str, Option]:
    """Choose one option per item with the least total loss and a total cost within the budget.

    The loss is optimal to within 0.001 %.

    Args:
        loss: item -> option -> loss, 0 or more.
        cost: item -> option -> cost.
        budget: maximum total cost.

    Raises:
        RecipeError: the cheapest options exceed the budget.
    """
    options = [list(by_option) for by_option in loss.values()]
    shape = len(options), max(map(len, options), default=0)
    losses, costs = np.full(shape, np.inf), np.zeros(shape)
    for row, (item, names) in enumerate(zip(loss, options, strict=True)):
        losses[row, : len(names)] = [loss[item][name] for name in names]
        costs[row, : len(names)] = [cost[item][name] for name in names]
        costs[row, len(names) :] = costs[row, : len(names)].min()
    lowest = costs.min(axis=1).sum()
    if lowest > budget:
        raise RecipeError(f"expected at least {lowest:.3g}, the lowest possible, got {budget:g}")
    price = _price(losses, costs, budget)
    priced = losses + price * costs
    chosen = priced.argmin(axis=1)
    rows = np.arange(len(chosen))
    excess = priced - priced[rows, chosen][:, None]
    gap = price * (budget - costs[rows, chosen].sum())
    limit = FIRST_LIMIT * losses[rows, chosen].sum()
    while 0 < limit < 2 * gap:  # `chosen` itself is within a limit of `gap`
        best = _best_within(limit, losses, costs, excess, price, budget)
        if best is not None:
            chosen = best
            break
        limit *= 2
    return {item: names[i] for item, names, i in zip(loss, options, chosen.tolist(), strict=True)}


def _price(losses: np.ndarray, costs: np.ndarray, budget: float) -> float:
    """Return the lowest price at which the items' separate choices are within the budget."""

    def fits(price: float) -> bool:
        chosen = (losses + price * costs).argmin(axis=1)
        return costs[np.arange(len(chosen)), chosen].sum() <= budget

    if fits(0.0):
        return 0.0
    steps = np.diff(np.sort(costs, axis=1), axis=1)
    low, high = 0.0, 2 * losses[np.isfinite(losses)].max() / steps[steps > 0].min()
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        low, high = (low, middle) if fits(middle) else (middle, high)
    return high


def _best_within(
    limit: float,
    losses: np.ndarray,
    costs: np.ndarray,
    excess: np.ndarray,
    price: float,
    budget: float,
) -> np.ndarray | None:
    """Return the best choice whose loss exceeds the bound by at most `limit`.

    Args:
        limit: see the module.
        losses: (items, options).
        costs: (items, options).
        excess: loss + price * cost, minus the item's minimum, (items, options).
        price: per unit of cost.
        budget: maximum total cost.

    Returns:
        The index of each item's option, (items,), or None if there is no such choice.
    """
    allowed = excess <= limit
    lowest = np.where(allowed, costs, np.inf).min(axis=1)
    highest = np.where(allowed, costs, -np.inf).max(axis=1)
    cost = loss = over = np.zeros(1)  # of all partial choices
    steps = []
    for i, options in enumerate(map(np.flatnonzero, allowed)):
        cost, loss, over = (
            np.add.outer(sums, terms[i, options]).ravel()
            for sums, terms in ((cost, costs), (loss, losses), (over, excess))
        )
        left = budget - cost
        unspent = np.maximum(left - highest[i + 1 :].sum(), 0)
        keep = np.flatnonzero((left >= lowest[i + 1 :].sum()) & (over + price * unspent <= limit))
        keep = keep[np.lexsort((loss[keep], cost[keep]))]  # by ascending cost
        best_cheaper = np.minimum.accumulate(np.append(np.inf, loss[keep]))[:-1]
        keep = keep[loss[keep] < best_cheaper]
        cost, loss, over = cost[keep], loss[keep], over[keep]
        steps.append((keep // len(options), options[keep % len(options)]))
    if not len(loss):
        return None
    chosen, index = np.zeros(len(losses), int), loss.argmin()
    for i, (previous, option) in reversed(list(enumerate(steps))):
        chosen[i], index = option[index], previous[index]
    return chosen
