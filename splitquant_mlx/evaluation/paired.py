"""McNemar's exact test of two models that answered the same questions.

Questions that both models answer correctly, or both wrongly, carry no information about the
difference. Of the n that exactly one model answers correctly, each belongs to either model with
probability 1/2 if the models are equally good (McNemar 1947, exact binomial form). The test detects
differences that the standard errors of the two accuracies hide, because they ignore the pairing.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from scipy.stats import binomtest

from splitquant_mlx.errors import RecipeError


@dataclass(frozen=True, kw_only=True)
class McNemar:
    """Result of McNemar's exact test of two models on the same questions.

    Attributes:
        questions: number of questions.
        only_first: questions that only the first model answered correctly.
        only_second: questions that only the second model answered correctly.
        difference: accuracy of the first model minus that of the second.
        p_value: two-sided; 1 when the models never differ.
    """

    questions: int
    only_first: int
    only_second: int
    difference: float
    p_value: float


def compare(first: Sequence[int], second: Sequence[int]) -> McNemar:
    """Compare two models by their answers to the same questions in the same order.

    Args:
        first: 1 for each question that the first model answered correctly, else 0.
        second: the same for the second model.

    Raises:
        RecipeError: when there are no answers, or the two numbers of answers differ.
    """
    if len(first) != len(second) or not first:
        raise RecipeError(
            "paired test: expected both models' answers to the same questions, got "
            f"{len(first)} answers of one model and {len(second)} of the other"
        )
    only_first = sum(a > b for a, b in zip(first, second, strict=True))
    only_second = sum(a < b for a, b in zip(first, second, strict=True))
    discordant = only_first + only_second
    return McNemar(
        questions=len(first),
        only_first=only_first,
        only_second=only_second,
        difference=(only_first - only_second) / len(first),
        p_value=float(binomtest(only_first, discordant).pvalue) if discordant else 1.0,
    )
