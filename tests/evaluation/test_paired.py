"""McNemar's exact test against the definition of its p-value, and its symmetries."""

import math
from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from splitquant_mlx import RecipeError
from splitquant_mlx.evaluation.paired import compare

answers = st.lists(st.tuples(st.integers(0, 1), st.integers(0, 1)), min_size=1, max_size=300)


@given(answers)
def test_p_value_is_the_doubled_binomial_tail(pairs):
    first, second = zip(*pairs, strict=True)
    result = compare(first, second)
    assert result.questions == len(pairs)
    assert result.only_first == pairs.count((1, 0)) and result.only_second == pairs.count((0, 1))
    assert result.difference == pytest.approx(sum(first) / len(pairs) - sum(second) / len(pairs))
    n, fewer = result.only_first + result.only_second, min(result.only_first, result.only_second)
    tail = sum(math.comb(n, i) for i in range(fewer + 1)) / 2**n
    assert result.p_value == pytest.approx(min(1.0, 2 * tail), rel=1e-9)
    other = compare(second, first)
    assert other.p_value == result.p_value and other.difference == -result.difference


@pytest.mark.parametrize("heads", range(9))
def test_p_value_counts_all_outcomes_at_least_as_extreme(heads):
    first = [1] * heads + [0] * (8 - heads) + [1, 0]
    second = [0] * heads + [1] * (8 - heads) + [1, 0]
    outcomes = [sum(coins) for coins in product((0, 1), repeat=8)]
    as_uneven = sum(abs(outcome - 4) >= abs(heads - 4) for outcome in outcomes)
    assert compare(first, second).p_value == as_uneven / 2**8


def test_a_large_difference_among_many_questions():
    result = compare([1] * 900 + [0] * 272, [0] * 1172)
    assert result.only_first == 900 and 0 < result.p_value < 1e-200
    assert compare([1] * 5000, [0] * 5000).p_value == 0.0  # below the smallest float


@pytest.mark.parametrize(("first", "second"), [([], []), ([1], [1, 0])])
def test_different_numbers_of_answers_are_rejected(first, second):
    with pytest.raises(RecipeError, match=f"got {len(first)} answers of one model"):
        compare(first, second)
