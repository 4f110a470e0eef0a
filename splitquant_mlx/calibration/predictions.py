"""Predictions of the original model, stored as its most likely tokens."""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from splitquant_mlx.calibration.blocks import start_pass
from splitquant_mlx.calibration.saved_state import SavedState
from splitquant_mlx.progress import PREDICTING, Progress
from splitquant_mlx.runtime.cores import run_parallel, serialized_eval

MOST_LIKELY = 128  # tokens stored per position; all others count as one event
TEXTS = 256  # in memory at a time


class Predictions(NamedTuple):
    """Most likely next tokens at each position of texts.

    Attributes:
        tokens: (texts, length, k) int32.
        log_p: their log-probabilities, nats, float32.
    """

    tokens: mx.array
    log_p: mx.array


def predict(
    load: Callable[[], nn.Module],
    tokens: np.ndarray,
    *,
    progress: Progress,
    saved_state: SavedState,
) -> Predictions:
    """Return the predictions of a model after each token of `tokens` (texts, length).

    Only one block's weights are in memory at a time.

    Args:
        load: loads one of mlx-lm's models lazily.
        tokens: texts (texts, length).
        progress: progress reporter.
        saved_state: state of an interrupted call, to resume from.

    Raises:
        RecipeError: when the model is not built of blocks that can be called one by one.
    """
    parts = []
    with progress.task(PREDICTING, len(tokens)) as advance:
        for start in range(0, len(tokens), TEXTS):
            texts, name = tokens[start : start + TEXTS], f"predictions-{start}"
            part = saved_state.load(name)
            if part is None:
                part = list(_predict_some(load, texts))
                saved_state.save(name, part)
            parts.append(part)
            advance(len(texts))
    return Predictions(*(mx.concatenate(list(arrays)) for arrays in zip(*parts, strict=True)))


def _predict_some(load: Callable[[], nn.Module], tokens: np.ndarray) -> Predictions:
    run = start_pass(load, tokens)
    for index in range(len(run.blocks)):
        run.advance(index)
        run.release(index)
    pieces = [piece for state in run.states for piece in run.pieces(state)]
    mx.eval(pieces)
    compute = serialized_eval(lambda piece: most_likely(run.finish(piece)), run.model)
    parts = run_parallel([partial(compute, piece) for piece in pieces])
    return Predictions(*(mx.concatenate(list(arrays)) for arrays in zip(*parts, strict=True)))


def most_likely(logits: mx.array) -> Predictions:
    """Return the most likely tokens of logits (texts, length, vocabulary)."""
    logits = logits.astype(mx.float32)
    count = min(MOST_LIKELY, logits.shape[-1])
    tokens = mx.argpartition(-logits, count - 1, axis=-1)[..., :count].astype(mx.int32)
    log_p = mx.take_along_axis(logits, tokens, axis=-1)
    return Predictions(tokens, log_p - mx.logsumexp(logits, axis=-1, keepdims=True))


@mx.custom_function
def kl_divergence(logits: mx.array, tokens: mx.array, log_p: mx.array) -> mx.array:
    """Return the mean KL divergence of `logits` (..., vocabulary) from predictions, nats, float32.

    All other tokens count as one event, which makes the result a lower bound. The gradient is for
    `logits` alone; it shares nothing with the divergence, so that either is computed alone.
    """
    q, p, rest_q, rest_p = _events(logits, tokens, log_p)
    kl = (p * (log_p - mx.log(q))).sum(-1) + (rest_p * mx.log(rest_p / rest_q)).squeeze(-1)
    return kl.mean()


@kl_divergence.vjp
def _gradient(
    primals: tuple[mx.array, mx.array, mx.array], cotangent: mx.array, output: mx.array
) -> tuple[mx.array, mx.array, mx.array]:
    logits, tokens, log_p = primals
    q, p, rest_q, rest_p = _events(logits, tokens, log_p)
    all_q = mx.softmax(logits.astype(mx.float32), axis=-1)
    gradient = mx.put_along_axis(all_q * (1 - rest_p / rest_q), tokens, q - p, axis=-1)
    scaled = gradient * (cotangent * logits.shape[-1] / logits.size)
    return scaled.astype(logits.dtype), mx.zeros_like(tokens), mx.zeros_like(log_p)


def _events(logits: mx.array, tokens: mx.array, log_p: mx.array) -> tuple[mx.array, ...]:
    """Return q and p of the stored tokens, and of all others together."""
    logits = logits.astype(mx.float32)
    chosen = mx.take_along_axis(logits, tokens, axis=-1)
    q = mx.exp(mx.maximum(chosen - mx.logsumexp(logits, axis=-1, keepdims=True), -80.0))
    p = mx.exp(log_p)
    rest = (mx.maximum(1 - x.sum(axis=-1, keepdims=True), 1e-6) for x in (q, p))
    return (q, p, *rest)
