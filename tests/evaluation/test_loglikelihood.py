"""A pair's score does not depend on the other pairs of its batch."""

import mlx.core as mx
import numpy as np
import pytest
import tiny
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy_llama import NumpyLlama

from splitquant_mlx import RecipeError, load
from splitquant_mlx.evaluation import scoring
from splitquant_mlx.evaluation.loglikelihood import fit, score
from splitquant_mlx.models.loader import load_model

TOLERANCE = 1e-5  # nats per token: float32 sums in another order
DENSE = ("llama", "qwen3", "gemma")
OTHERS = ("gemma3_text", "mamba")  # sliding-window caches; a recurrent state


def make_model(architecture, directory):
    if architecture == "mamba":
        from mlx_lm.models import mamba

        mx.random.seed(0)
        return mamba.Model(
            mamba.ModelArgs(
                model_type="mamba",
                vocab_size=tiny.VOCAB,
                hidden_size=32,
                intermediate_size=64,
                state_size=8,
                num_hidden_layers=2,
                conv_kernel=4,
                use_bias=False,
                use_conv_bias=True,
                time_step_rank=4,
            )
        )
    return load_model(tiny.write_checkpoint(directory / "model", architecture))


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Return a function that builds each architecture's model once."""
    made = {}

    def model(architecture):
        if architecture not in made:
            made[architecture] = make_model(architecture, tmp_path_factory.mktemp(architecture))
        return made[architecture]

    return model


def alone(model, context, continuation):
    """Score one pair without cache, padding or batch, in float64 after the logits."""
    if not continuation:
        return 0.0, True
    inputs = [*context, *continuation][:-1]
    logits = np.array(model(mx.array([inputs]))[0].astype(mx.float32)).astype(np.float64)
    logits = logits[len(context) - 1 :]
    shifted = logits - logits.max(axis=-1, keepdims=True)
    log_p = shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    result = log_p[range(len(continuation)), continuation].sum()
    return result, (logits.argmax(axis=-1) == continuation).all()


def check(model, pairs, **options):
    result = dict(score(model, pairs, **options))
    assert set(result) == set(range(len(pairs)))
    for index, (context, continuation) in enumerate(pairs):
        loglikelihood, greedy = alone(model, list(context), list(continuation))
        tolerance = TOLERANCE * max(len(continuation), 1)
        assert result[index].loglikelihood == pytest.approx(loglikelihood, abs=tolerance)
        assert result[index].is_greedy == greedy


def random_pairs(seed, contexts, longest, options, longest_option, common=0):
    random = np.random.default_rng(seed)
    opening = random.integers(2, tiny.VOCAB, common).tolist()
    pairs = []
    for _ in range(contexts):
        context = [*opening, *random.integers(2, tiny.VOCAB, random.integers(1, longest)).tolist()]
        for _ in range(options):
            length = random.integers(0, longest_option + 1)
            pairs.append((context, random.integers(2, tiny.VOCAB, length).tolist()))
    random.shuffle(pairs)
    return pairs


@pytest.mark.parametrize("batch_tokens", [20, 4096])
@pytest.mark.parametrize("architecture", [*DENSE, *OTHERS])
def test_batching_does_not_change_scores(architecture, batch_tokens, models):
    pairs = random_pairs(1, contexts=4, longest=40, options=3, longest_option=6, common=9)
    check(models(architecture), pairs, batch_tokens=batch_tokens)


@pytest.mark.parametrize("rows", [1, 7])
@pytest.mark.parametrize("architecture", ["llama", *OTHERS])
def test_the_block_size_does_not_change_scores(architecture, rows, models, monkeypatch):
    monkeypatch.setattr(scoring, "MAX_BLOCK_ROWS", rows)
    model, shapes = models(architecture), []
    pairs = random_pairs(2, contexts=3, longest=30, options=3, longest_option=9)
    expected = [alone(model, *pair)[0] for pair in pairs]

    def logsumexp(logits, axis):
        shapes.append(logits.shape)
        return original(logits, axis=axis)

    original = mx.logsumexp
    monkeypatch.setattr(mx, "logsumexp", logsumexp)
    result = dict(score(model, pairs))
    assert [result[i].loglikelihood for i in range(len(pairs))] == pytest.approx(expected, abs=1e-4)
    assert shapes and all(batch * columns <= rows for batch, columns, _ in shapes)


tokens = st.lists(st.integers(2, 4), max_size=6)  # few distinct tokens, so prefixes are shared


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.tuples(tokens.filter(bool), tokens), max_size=8), st.sampled_from([1, 8, 30, 500])
)
def test_any_lengths_and_common_prefixes(models, pairs, batch_tokens):
    check(models("llama"), pairs, batch_tokens=batch_tokens)


def test_agrees_with_numpy(stories, story_text):
    model, tokenizer = load(stories)
    tokens, oracle = tokenizer.encode(story_text[:700]), NumpyLlama(stories)
    pairs = [(tokens[:n], tokens[n : n + 5]) for n in (1, 30, 31, 90, 200)]
    pairs += [(tokens[:31], [7, 8]), (tokens[:31], [9]), (tokens[:31], [7, 9])]
    result = dict(score(model, pairs))
    for index, (context, continuation) in enumerate(pairs):
        log_p = oracle([*context, *continuation][:-1])[len(context) - 1 :]
        expected = log_p[range(len(continuation)), continuation].sum()
        assert result[index].loglikelihood == pytest.approx(expected, abs=1e-4)


def test_greedy_continuations_are_marked(stories):
    model, tokenizer = load(stories)
    context = tokenizer.encode("Once upon a time")
    written: list[int] = []
    for _ in range(6):
        written.append(int(mx.argmax(model(mx.array([context + written]))[0, -1])))
    other = [*written[:-1], (written[-1] + 1) % 512]
    late = [(written[0] + 1) % 512, *written[1:]]
    result = dict(score(model, [(context, written), (context, other), (context, late)]))
    assert [result[i].is_greedy for i in range(3)] == [True, False, False]


def test_shared_tokens_are_computed_once(models, monkeypatch):
    model = models("llama")
    opening, tails = list(range(2, 42)), [[50 + i, 60 + i, 70 + i] for i in range(6)]
    pairs = [([*opening, *tail], [letter]) for tail in tails for letter in (80, 81, 82, 83)]
    seen, original = [], type(model).__call__

    def counted(self, inputs, cache=None):
        seen.append(inputs.size)
        return original(self, inputs, cache=cache)

    monkeypatch.setattr(type(model), "__call__", counted)
    assert len(list(score(model, pairs))) == 24
    # the prefix, the rest of each context, and one token to find the vocabulary size
    assert sum(seen) == 40 + 6 * 3 + 1


def test_longest_contexts_come_first_and_progress_adds_up(models, recorder):
    pairs = [([5] * n, end) for n in (3, 40, 11) for end in ([6], [7, 8], [])]
    scores = score(models("llama"), pairs, batch_tokens=20, progress=recorder)
    assert [index // 3 for index, _ in scores] == [1, 1, 1, 2, 2, 2, 0, 0, 0]
    assert sum(recorder.reported) == 0 and recorder.reported[0] == -9


def test_nothing_to_score(models):
    assert list(score(models("llama"), [])) == []
    assert next(score(models("llama"), [([5], [])]))[1].loglikelihood == 0.0


@pytest.mark.parametrize(
    ("pairs", "options", "expected"),
    [
        ([([5], [6]), ([], [6])], {}, "pair 1: expected a context of at least one token"),
        ([([5], [96])], {}, "expected tokens from 0 to 95"),
        ([([-1], [5])], {}, "got -1 to 5"),
        ([([5], [6])], {"batch_tokens": 0}, "batch_tokens: expected 1 or more, got 0"),
    ],
)
def test_refusals(pairs, options, expected, models):
    with pytest.raises(RecipeError) as caught:
        list(score(models("llama"), pairs, **options))
    assert expected in str(caught.value) and "\n" not in str(caught.value)


@given(st.lists(st.integers(), min_size=1), st.lists(st.integers()), st.integers(1, 30))
def test_pairs_are_truncated_on_the_left(context, continuation, length):
    if len(continuation) > length:
        with pytest.raises(RecipeError, match=f"got {len(continuation)}"):
            fit(context, continuation, length)
        return
    cut, end = fit(context, continuation, length)
    # as in lm-evaluation-harness's models/huggingface.py
    read = (context + continuation)[-(length + 1) :][:-1]
    assert [*cut, *end][:-1] == read
    assert end == continuation and cut
    assert fit(context, continuation, None) == (context, continuation)


def test_many_short_rows_make_room_for_their_own_tokens_alone(models):
    """mlx-lm's caches make room for 256 positions: ten times the length of these rows."""
    model = models("llama")
    pairs = [
        ([1, 2 + i % 60, 3 + i % 50] * 7, [i % 40 + j] * 3) for i in range(400) for j in (1, 2)
    ]
    weights, before = mx.get_active_memory(), dict(score(model, pairs[:2]))
    mx.reset_peak_memory()
    scores = dict(score(model, pairs, batch_tokens=4096))
    assert mx.get_peak_memory() - weights < 16 * 4096 * cache_bytes(model)
    assert scores[0].loglikelihood == pytest.approx(before[0].loglikelihood, abs=TOLERANCE)


def cache_bytes(model):
    """Return the bytes that a model's cache holds for a token."""
    from mlx_lm.models.cache import make_prompt_cache

    cache = make_prompt_cache(model)
    model(mx.array([[1]]), cache=cache)
    return sum(x.keys[..., :1, :].nbytes + x.values[..., :1, :].nbytes for x in cache)
