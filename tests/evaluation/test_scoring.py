"""Logits in blocks, and of dense and quantized models, equal those of one whole pass."""

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import VOCAB, write_checkpoint

from splitquant_mlx import QuantizedSplitLinear, Recipe, RecipeError, convert
from splitquant_mlx.evaluation import scoring
from splitquant_mlx.models.dense import for_scoring
from splitquant_mlx.models.loader import load_model

# relative to the largest logit: float32 sums in another order
TOLERANCE = 1e-5
RECIPES = {
    "split": Recipe(group_size=32),
    "split lm_head": Recipe(group_size=32, bits=2, lm_head="split"),
    "split per channel": Recipe(group_size=32, granularity="channel"),
    "rtn": Recipe(method="rtn", group_size=32),
    "rtn 5-bit": Recipe(method="rtn", group_size=32, bits=5),
    "mxfp4": Recipe(method="rtn", mode="mxfp4"),
    "nvfp4": Recipe(method="rtn", mode="nvfp4"),
    "mxfp8": Recipe(method="rtn", mode="mxfp8"),
}
QUANTIZED = (nn.QuantizedLinear, nn.QuantizedEmbedding, QuantizedSplitLinear)


def logits_of(model, vocabulary, length=40):
    tokens = np.random.default_rng(0).integers(0, vocabulary, (2, length))
    return np.array(model(mx.array(tokens)).astype(mx.float32))


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("source", ["stories", "untied"])
def test_dense_and_quantized_models_agree(source, name, tmp_path, request):
    if source == "stories":
        directory, vocabulary = request.getfixturevalue("stories"), 512
    else:
        directory = write_checkpoint(tmp_path / "source", tie_word_embeddings=False)
        vocabulary = VOCAB
    convert(directory, tmp_path / "model", recipe=RECIPES[name])
    model = load_model(tmp_path / "model")
    assert any(isinstance(module, QUANTIZED) for module in model.modules())
    expected = logits_of(model, vocabulary)
    dense = for_scoring(model)
    remaining = {type(module) for module in dense.modules() if isinstance(module, QUANTIZED)}
    assert remaining <= ({nn.QuantizedEmbedding} if source == "untied" else set())
    result = logits_of(dense, vocabulary)
    assert np.abs(result - expected).max() <= TOLERANCE * np.abs(expected).max()
    original = logits_of(load_model(directory), vocabulary)
    assert np.abs(result - original).max() > 100 * TOLERANCE * np.abs(expected).max()


def test_a_gpu_runs_the_quantized_model(split_stories, monkeypatch):
    model = load_model(split_stories)
    kinds = [type(module) for module in model.modules()]
    monkeypatch.setattr(mx, "default_device", lambda: mx.Device(mx.gpu))
    assert for_scoring(model) is model
    assert [type(module) for module in model.modules()] == kinds


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Return models of several architectures, one with sliding-window attention."""
    home = tmp_path_factory.mktemp("models")
    names = ("llama", "qwen3", "gemma3_text", "mixtral")
    return {name: load_model(write_checkpoint(home / name, name)) for name in names}


@settings(max_examples=20, deadline=None)
@given(st.data())
def test_blocks_equal_one_whole_pass(models, data):
    model = models[data.draw(st.sampled_from(sorted(models)))]
    texts, length = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 70))
    first = data.draw(st.integers(0, length - 1))
    rows = data.draw(st.integers(1, 80))
    tokens = np.random.default_rng(length).integers(0, VOCAB, (texts, length), np.int32)
    whole = np.array(model(mx.array(tokens)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scoring, "MAX_BLOCK_ROWS", rows)
        position = first
        for start, logits in scoring.logit_blocks(model, tokens, VOCAB, first):
            assert start == position and logits.dtype == mx.float32
            assert logits.shape[0] * logits.shape[1] <= max(rows, texts)
            expected = whole[:, start : start + logits.shape[1]]
            assert np.abs(np.array(logits) - expected).max() <= TOLERANCE * np.abs(whole).max()
            position += logits.shape[1]
        assert position == length


def test_a_block_is_bounded_in_bytes():
    for vocabulary in (105, 49_152, 128_256, 10**9):
        rows = scoring.block_rows(vocabulary)
        assert rows >= 1 and (rows == 1 or rows * vocabulary * 4 <= scoring.BLOCK_BYTES)


def test_log_probabilities_are_normalized(stories):
    windows = np.arange(120, dtype=np.int32).reshape(3, 40)
    blocks = list(scoring.log_probability_blocks(load_model(stories), windows))
    assert sum(block.shape[0] for block in blocks) == 120
    for block in blocks:
        assert mx.allclose(mx.exp(block).sum(axis=-1), mx.array(1.0), atol=1e-5)


def test_tokens_outside_the_vocabulary_are_rejected(stories):
    model = load_model(stories)
    with pytest.raises(RecipeError, match="expected tokens from 0 to 511"):
        list(scoring.log_probability_blocks(model, np.array([[1, 600]])))
