"""Share out bits among layers: the best choice of one option a layer under a budget.

The multiple-choice knapsack problem. At a price p of cost every item takes, by itself, the option
of the least loss + p cost. The sum of these, less p times the budget, is no larger than the least
loss (Lagrange's bound); what a choice loses above it is

    sum_i (loss + p cost of its option, above the item's least) + p (budget left unspent).

At the right price little of that is needed, so few options of each item come into question, and all
choices of these are gone through, item by item. Of choices begun with the same items those stay
that no other is both cheaper and better than (Nemhauser and Ullmann, Management Science 15, 1969).
"""

from collections.abc import Hashable, Mapping
from typing import TypeVar

import numpy as np

from splitquant_mlx.errors import RecipeError

Option = TypeVar("Option", bound=Hashable)
FIRST = 1e-5  # of the loss, that a choice may lose at first; far below what a prediction is worth
HALVINGS = 100  # of the range that the price lies in


def allocate(
    loss: Mapping[str, Mapping[Option, float]],
    cost: Mapping[str, Mapping[Option, float]],
    budget: float,
) -> dict[str, Option]:
    """Choose an option for every item with the least total loss at a total cost within the budget.

    The loss is the least possible to 0.001 %.

    Args:
        loss: of every item at every option, 0 or more.
        cost: like `loss`.
        budget: the most that the costs of the chosen options may sum to.

    Raises:
        RecipeError: when even the cheapest options exceed the budget.
    """
    options = [list(own) for own in loss.values()]
    shape = len(options), max(map(len, options), default=0)
    losses, costs = np.full(shape, np.inf), np.zeros(shape)
    for row, (item, own) in enumerate(zip(loss, options, strict=True)):
        losses[row, : len(own)] = [loss[item][option] for option in own]
        costs[row, : len(own)] = [cost[item][option] for option in own]
        costs[row, len(own) :] = costs[row, : len(own)].min()
    least = costs.min(axis=1).sum()
    if least > budget:
        raise RecipeError(f"expected at least {least:.3g}, the least possible, got {budget:g}")
    price = _price(losses, costs, budget)
    priced = losses + price * costs
    chosen = priced.argmin(axis=1)
    rows = np.arange(len(chosen))
    above = priced - priced[rows, chosen][:, None]
    gap, limit = price * (budget - costs[rows, chosen].sum()), FIRST * losses[rows, chosen].sum()
    while 0 < limit < 2 * gap:  # at the last, `chosen` itself is within the limit
        found = _best_within(limit, losses, costs, above, price, budget)
        if found is not None:
            chosen = found
            break
        limit *= 2
    return {item: own[i] for item, own, i in zip(loss, options, chosen.tolist(), strict=True)}


def _price(losses: np.ndarray, costs: np.ndarray, budget: float) -> float:
    """Return the least price at which what every item takes by itself is within the budget."""

    def fits(price: float) -> bool:
        chosen = (losses + price * costs).argmin(axis=1)
        return costs[np.arange(len(chosen)), chosen].sum() <= budget

    if fits(0.0):
        return 0.0
    steps = np.diff(np.sort(costs, axis=1), axis=1)
    low, high = 0.0, 2 * losses[np.isfinite(losses)].max() / steps[steps > 0].min()
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        low, high = (low, middle) if fits(middle) else (middle, high)
    return high


def _best_within(
    limit: float,
    losses: np.ndarray,
    costs: np.ndarray,
    above: np.ndarray,
    price: float,
    budget: float,
) -> np.ndarray | None:
    """Return the best choice, if it loses at most `limit` more than the bound.

    Args:
        limit: see the module.
        losses: (items, options).
        costs: (items, options).
        above: loss + price cost, less the item's least, (items, options).
        price: of cost.
        budget: for the costs.

    Returns:
        The number of each item's option, (items,), or None.
    """
    allowed = above <= limit
    least = np.where(allowed, costs, np.inf).min(axis=1)
    most = np.where(allowed, costs, -np.inf).max(axis=1)
    spent = lost = over = np.zeros(1)
    taken = []
    for i, own in enumerate(map(np.flatnonzero, allowed)):
        spent, lost, over = (
            np.add.outer(sums, of[i, own]).ravel()
            for sums, of in ((spent, costs), (lost, losses), (over, above))
        )
        room = budget - spent
        unspent = np.maximum(room - most[i + 1 :].sum(), 0)
        kept = np.flatnonzero((room >= least[i + 1 :].sum()) & (over + price * unspent <= limit))
        kept = kept[np.lexsort((lost[kept], spent[kept]))]  # the cheapest first
        before = np.minimum.accumulate(np.append(np.inf, lost[kept]))[:-1]
        kept = kept[lost[kept] < before]
        spent, lost, over = spent[kept], lost[kept], over[kept]
        taken.append((kept // len(own), own[kept % len(own)]))
    if not len(lost):
        return None
    chosen, number = np.zeros(len(losses), int), lost.argmin()
    for i, (before, option) in reversed(list(enumerate(taken))):
        chosen[i], number = option[number], before[number]
    return chosen
