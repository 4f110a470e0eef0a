"""What the original predicts, kept as its likeliest tokens, so that it need not stay in memory."""

from collections.abc import Callable
from typing import NamedTuple

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from splitquant_mlx.calibration.blocks import start_pass
from splitquant_mlx.calibration.unfinished import Unfinished
from splitquant_mlx.progress import Progress

LIKELIEST = 128  # tokens kept at each position; all others are one event
TEXTS = 256  # whose states are in memory together


class Predictions(NamedTuple):
    """The likeliest next tokens of texts.

    Attributes:
        tokens: (texts, length, k) int32.
        log_p: their log-probabilities, nats, float32.
    """

    tokens: mx.array
    log_p: mx.array


def predict(
    load: Callable[[], nn.Module], tokens: np.ndarray, *, progress: Progress, unfinished: Unfinished
) -> Predictions:
    """Return what a model predicts after each token of `tokens` (texts, length).

    Only one block's weights are in memory at a time.

    Args:
        load: loads one of mlx-lm's models, unread.
        tokens: the texts.
        progress: progress reporter.
        unfinished: where an interrupted call left off, this one goes on.

    Raises:
        RecipeError: when the model is not built of blocks that can be called one by one.
    """
    found = []
    with progress.task("Asking the original", len(tokens)) as advance:
        for start in range(0, len(tokens), TEXTS):
            own, name = tokens[start : start + TEXTS], f"predictions-{start}"
            kept = unfinished.arrays(name)
            if kept is None:
                kept = list(_predict_some(load, own))
                unfinished.keep(name, kept)
            found.append(kept)
            advance(len(own))
    return Predictions(*(mx.concatenate(list(arrays)) for arrays in zip(*found, strict=True)))


def _predict_some(load: Callable[[], nn.Module], tokens: np.ndarray) -> Predictions:
    run = start_pass(load, tokens)
    for index in range(len(run.blocks)):
        run.advance(index)
        run.release(index)
    found = []
    for state in run.states:
        for piece in run.pieces(state):
            found.append(likeliest(run.finish(piece)))
            mx.eval(found[-1])
    return Predictions(*(mx.concatenate(list(arrays)) for arrays in zip(*found, strict=True)))


def likeliest(logits: mx.array) -> Predictions:
    """Return the likeliest tokens of logits (texts, length, vocabulary)."""
    logits = logits.astype(mx.float32)
    number = min(LIKELIEST, logits.shape[-1])
    tokens = mx.argpartition(-logits, number - 1, axis=-1)[..., :number].astype(mx.int32)
    log_p = mx.take_along_axis(logits, tokens, axis=-1)
    return Predictions(tokens, log_p - mx.logsumexp(logits, axis=-1, keepdims=True))


@mx.custom_function
def kl_divergence(logits: mx.array, tokens: mx.array, log_p: mx.array) -> mx.array:
    """Return the mean KL divergence of `logits` (..., vocabulary) from predictions, nats, float32.

    Tokens that are not among the likeliest ones are one event, which makes it a lower bound. The
    gradient is for `logits` alone, and needs nothing that the divergence itself does, which is
    computed only where it is asked for.
    """
    q, p, rest_q, rest_p = _events(logits, tokens, log_p)
    found = (p * (log_p - mx.log(q))).sum(-1) + (rest_p * mx.log(rest_p / rest_q)).squeeze(-1)
    return found.mean()


@kl_divergence.vjp
def _gradient(
    primals: tuple[mx.array, mx.array, mx.array], cotangent: mx.array, output: mx.array
) -> tuple[mx.array, mx.array, mx.array]:
    logits, tokens, log_p = primals
    q, p, rest_q, rest_p = _events(logits, tokens, log_p)
    all_q = mx.softmax(logits.astype(mx.float32), axis=-1)
    found = mx.put_along_axis(all_q * (1 - rest_p / rest_q), tokens, q - p, axis=-1)
    scaled = found * (cotangent * logits.shape[-1] / logits.size)
    return scaled.astype(logits.dtype), mx.zeros_like(tokens), mx.zeros_like(log_p)


def _events(logits: mx.array, tokens: mx.array, log_p: mx.array) -> tuple[mx.array, ...]:
    """Return q and p of the likeliest tokens, and of all others together."""
    logits = logits.astype(mx.float32)
    chosen = mx.take_along_axis(logits, tokens, axis=-1)
    q = mx.exp(mx.maximum(chosen - mx.logsumexp(logits, axis=-1, keepdims=True), -80.0))
    p = mx.exp(log_p)
    rest = (mx.maximum(1 - x.sum(axis=-1, keepdims=True), 1e-6) for x in (q, p))
    return (q, p, *rest)
