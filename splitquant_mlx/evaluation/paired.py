"""Tell whether two models that answered the same questions differ: McNemar's exact test.

Questions that both answer right, or both wrong, say nothing about the difference. Of the n that
only one of them answers right, each is the one's or the other's with probability 1/2 if the models
are equally good (McNemar 1947, in its exact binomial form). The test sees differences that the
standard errors of the two accuracies, which ignore that the questions are the same, hide.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from splitquant_mlx.errors import RecipeError


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Hold how two models compare on the same questions.

    Attributes:
        questions: their number.
        only_first: how many only the first model answered right.
        only_second: how many only the second did.
        difference: accuracy of the first less that of the second.
        p_value: probability of a split at least this uneven between equally good models,
            two-sided; 1 when the models never differ.
    """

    questions: int
    only_first: int
    only_second: int
    difference: float
    p_value: float


def compare(first: Sequence[int], second: Sequence[int]) -> Comparison:
    """Compare two models by their answers to the same questions in the same order.

    Args:
        first: 1 for each question that the first model answered right, 0 for each other.
        second: the same of the second model.

    Raises:
        RecipeError: when there are no answers, or not as many of the one as of the other.
    """
    if len(first) != len(second) or not first:
        raise RecipeError(
            f"got {len(first)} answers of one model and {len(second)} of the other: wanted both "
            "models' answers to the same questions"
        )
    only_first = sum(a > b for a, b in zip(first, second, strict=True))
    only_second = sum(a < b for a, b in zip(first, second, strict=True))
    return Comparison(
        questions=len(first),
        only_first=only_first,
        only_second=only_second,
        difference=(only_first - only_second) / len(first),
        p_value=_binomial_p_value(only_first, only_second),
    )


def _binomial_p_value(a: int, b: int) -> float:
    """Return the two-sided p-value of `a` heads and `b` tails of a fair coin."""
    tail = sum(math.comb(a + b, i) for i in range(min(a, b) + 1))
    return min(1.0, 2 * tail / 2 ** (a + b))
