"""Perplexity agrees with float64 numpy and with mlx-lm."""

import math

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy_llama import NumpyLlama, window_nlls

from splitquant_mlx import Recipe, RecipeError, convert, load
from splitquant_mlx.data.text import encode
from splitquant_mlx.evaluation import perplexity as module
from splitquant_mlx.evaluation import scoring
from splitquant_mlx.evaluation.perplexity import measure_perplexity
from splitquant_mlx.models.dense import for_scoring
from splitquant_mlx.models.loader import load_model

TOLERANCE = 1e-4
STRIDES = [(64, None), (64, 32), (64, 1), (50, 33), (128, 128)]


@pytest.fixture(scope="module")
def story(story_text) -> str:
    return story_text[:4000]


def check(result, nlls):
    mean = nlls.mean()
    assert result.tokens == len(nlls)
    assert result.mean_nll == pytest.approx(mean, rel=TOLERANCE)
    assert result.perplexity == pytest.approx(math.exp(mean), rel=TOLERANCE)
    error = math.exp(mean) * nlls.std(ddof=1) / math.sqrt(len(nlls))
    assert result.standard_error == pytest.approx(error, rel=TOLERANCE)


@pytest.mark.parametrize(("context_length", "stride"), STRIDES)
def test_agrees_with_numpy(context_length, stride, stories, story):
    model, tokenizer = load(stories)
    tokens = encode(tokenizer, story)[: 200 if stride != 1 else 70]
    result = measure_perplexity(model, tokens, context_length=context_length, stride=stride)
    stride = stride or context_length
    assert (result.context_length, result.stride) == (context_length, stride)
    check(result, window_nlls(NumpyLlama(stories), tokens, context_length, stride))
    assert 1 < result.perplexity < 12  # a trained model on text like its training data


@pytest.mark.parametrize("recipe", [Recipe(), Recipe(method="rtn", group_size=32, bits=5)])
def test_quantized_models_agree_with_numpy(recipe, stories, story, tmp_path):
    convert(stories, tmp_path / "model", recipe=recipe)
    _, tokenizer = load(stories)
    tokens = encode(tokenizer, story)[:130]
    nlls = window_nlls(NumpyLlama(tmp_path / "model"), tokens, 64, 48)
    quantized = load_model(tmp_path / "model")
    check(measure_perplexity(quantized, tokens, context_length=64, stride=48), nlls)
    dense = for_scoring(quantized)
    check(measure_perplexity(dense, tokens, context_length=64, stride=48), nlls)


def test_agrees_with_mlx_lm(stories, story, capsys):
    from mlx_lm.perplexity import eval_ppl

    model, tokenizer = load(stories)
    tokens = encode(tokenizer, story)[: 128 * 6]
    perplexity, standard_error = eval_ppl(model, mx.array(tokens).reshape(6, 128))
    result = measure_perplexity(model, tokens, context_length=128)
    assert result.perplexity == pytest.approx(perplexity, rel=1e-5)
    assert result.standard_error == pytest.approx(standard_error, rel=1e-5)
    assert result.tokens == 6 * 127


@pytest.mark.parametrize("rows", [1, 7, 32, 100])
def test_memory_bound_does_not_change_the_result(rows, stories, story, monkeypatch):
    model, tokenizer = load(stories)
    tokens = encode(tokenizer, story)[:150]
    expected = measure_perplexity(model, tokens, context_length=32, stride=20)
    shapes = []

    def watched(*arguments):
        for start, logits in scoring.logit_blocks(*arguments):
            shapes.append(logits.shape)
            yield start, logits

    monkeypatch.setattr(scoring, "MAX_BLOCK_ROWS", rows)
    monkeypatch.setattr(module, "logit_blocks", watched)
    result = measure_perplexity(model, tokens, context_length=32, stride=20)
    assert result.mean_nll == pytest.approx(expected.mean_nll, rel=1e-5)
    assert result.tokens == expected.tokens
    assert max(batch * positions for batch, positions, _ in shapes) <= rows
    assert rows < 100 or max(batch for batch, _, _ in shapes) == 100 // 32


@settings(max_examples=200, deadline=None)
@given(st.integers(3, 400), st.integers(3, 60), st.data())
def test_windows_score_every_token_once_with_enough_context(tokens, context_length, draw):
    stride = draw.draw(st.integers(1, context_length))
    context_length = min(context_length, tokens)
    stride = min(stride, context_length)
    scored = {}
    for start, length, first in module._windows(tokens, context_length, stride):
        assert 1 <= first < length <= context_length and start % stride == 0
        for position in range(start + first, start + length):
            assert position not in scored
            scored[position] = position - start
    openers = set(range(0, tokens, stride)) if stride == context_length else {0}
    assert set(scored) == set(range(tokens)) - openers
    assert all(
        context >= min(position, max(context_length - stride, 1))
        for position, context in scored.items()
    )


def test_more_context_helps(stories, story):
    model, tokenizer = load(stories)
    tokens = encode(tokenizer, story)[:600]
    result = [
        measure_perplexity(model, tokens, context_length=length, stride=stride).perplexity
        for length, stride in ((16, 16), (64, 64), (256, 64))
    ]
    assert result == sorted(result, reverse=True) and len(set(result)) == 3


def test_progress_adds_up(stories, recorder):
    result = measure_perplexity(
        load_model(stories), [5] * 100, context_length=30, stride=20, progress=recorder
    )
    assert sum(recorder.reported) == 0 and -recorder.reported[0] == result.tokens


@pytest.mark.parametrize(
    ("tokens", "options", "expected"),
    [
        ([1] * 63, {"context_length": 64}, "context_length (64) tokens, got 63"),
        ([], {}, "tokens, got 0"),
        ([1] * 99, {"context_length": 2}, "expected at least 3 tokens, got 2"),
        ([1] * 99, {"context_length": 64, "stride": 65}, "1 to context_length (64) tokens, got 65"),
        ([1] * 99, {"context_length": 64, "stride": 0}, "got 0"),
        ([1] * 99 + [512], {"context_length": 64}, "expected tokens from 0 to 511"),
        ([1] * 99 + [-1], {"context_length": 64}, "got -1 to 1"),
    ],
)
def test_refusals(tokens, options, expected, stories):
    with pytest.raises(RecipeError) as caught:
        measure_perplexity(load_model(stories), tokens, **options)
    assert expected in str(caught.value) and "\n" not in str(caught.value)


def test_perplexity_of_a_damaged_model_is_infinite(stories):
    model = load_model(stories)
    model.model.norm.weight = model.model.norm.weight * 1e6
    result = measure_perplexity(model, np.arange(3, 200), context_length=64)
    assert result.perplexity == math.inf and result.mean_nll > 709
