"""Measure the perplexity of a model on a text.

Perplexity is exp of the mean of -ln p(token | preceding tokens). A text longer than the context is
split into windows, as in "Perplexity of fixed-length models" in the documentation of transformers:
a window of `context_length` tokens starts every `stride` tokens and scores the tokens that are in
no earlier window, each with at least `context_length - stride` tokens of context. The first token
of a window has no context and is not scored by it: this leaves out the first token of the text
and, with `stride` = `context_length`, the first of every window.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from splitquant_mlx.errors import RecipeError
from splitquant_mlx.evaluation.scoring import block_rows, logit_blocks, token_array
from splitquant_mlx.progress import SILENT, Progress
from splitquant_mlx.runtime.ranks import Group, shard, unshard


@dataclass(frozen=True, kw_only=True)
class Perplexity:
    """Perplexity of a model on a text.

    Attributes:
        perplexity: exp(mean_nll).
        standard_error: standard error of the perplexity by the delta method: perplexity times the
            standard error of mean_nll. It assumes independent tokens; those of a text are
            correlated, so the true error is somewhat larger. The error of a difference between two
            models on the same text is far smaller.
        mean_nll: mean negative log-likelihood per scored token, nats.
        tokens: number of scored tokens.
        context_length: tokens per window.
        stride: tokens from the start of one window to the next.
    """

    perplexity: float
    standard_error: float
    mean_nll: float
    tokens: int
    context_length: int
    stride: int


def measure_perplexity(
    model: nn.Module,
    tokens: Sequence[int] | np.ndarray,
    *,
    context_length: int = 512,
    stride: int | None = None,
    group: Group | None = None,
    progress: Progress = SILENT,
) -> Perplexity:
    """Measure the perplexity of `tokens` in batches of windows that fit the memory bound.

    Args:
        model: an mlx-lm model, preferably prepared by `dense.for_scoring`.
        tokens: one text; see `text.encode` for its first token.
        context_length: tokens per window, at most the model's context length.
        stride: tokens from the start of one window to the next; None is `context_length`. Half of
            that doubles the work and gives every token at least half a window of context.
        group: ranks that share the batches; every rank returns the complete result.
        progress: progress reporter.

    Raises:
        RecipeError: when context_length, stride or the text's length is out of range, or a token
            is not in the model's vocabulary.
    """
    stride = context_length if stride is None else stride
    array, vocabulary = token_array(model, tokens)
    _check(len(array), context_length, stride)
    windows = list(_windows(len(array), context_length, stride))
    batch_size = max(1, block_rows(vocabulary) // context_length)
    batches = shard(group, list(_batches(windows, batch_size)))
    total = sum(len(starts) * (length - first) for starts, length, first in batches)
    values: list[list[float]] = []
    with progress.task("Measuring perplexity", total) as advance:
        for starts, length, first in batches:
            texts = np.stack([array[start : start + length] for start in starts])
            values.append([])
            for nll in _negative_log_likelihoods(model, texts, vocabulary, first):
                values[-1] += nll.tolist()
                advance(nll.size)
    return perplexity_of(np.concatenate(unshard(group, values)), context_length, stride)


def perplexity_of(nll: np.ndarray, context_length: int, stride: int) -> Perplexity:
    """Return the statistics of the negative log-likelihoods (tokens,) of scored tokens, nats."""
    mean = float(nll.mean())
    # exp overflows for a severely damaged model
    perplexity = math.exp(mean) if mean < 709 else math.inf if mean >= 709 else math.nan
    return Perplexity(
        perplexity=perplexity,
        standard_error=perplexity * float(nll.std(ddof=1)) / math.sqrt(len(nll)),
        mean_nll=mean,
        tokens=len(nll),
        context_length=context_length,
        stride=stride,
    )


def _check(tokens: int, context_length: int, stride: int) -> None:
    if context_length < 3:
        raise RecipeError(
            f"expected at least 3 tokens, got {context_length}", field="context_length"
        )
    if not 1 <= stride <= context_length:
        raise RecipeError(
            f"expected 1 to context_length ({context_length}) tokens, got {stride}", field="stride"
        )
    if tokens < context_length:
        raise RecipeError(
            f"expected a text of at least context_length ({context_length}) tokens, got {tokens}: "
            "give a longer text or a smaller context_length"
        )


def _windows(tokens: int, context_length: int, stride: int) -> Iterator[tuple[int, int, int]]:
    """Yield the start of each window, its length, and the position of its first scored token."""
    scored = 0
    for start in range(0, tokens, stride):
        end = min(start + context_length, tokens)
        first = max(scored - start, 1)
        if first < end - start:
            yield start, end - start, first
        if end == tokens:
            return
        scored = end


def _batches(
    windows: list[tuple[int, int, int]], size: int
) -> Iterator[tuple[list[int], int, int]]:
    """Yield the starts of up to `size` windows of the same length and first scored position."""
    for (length, first), group in groupby(windows, key=lambda window: window[1:]):
        starts = [start for start, _, _ in group]
        for i in range(0, len(starts), size):
            yield starts[i : i + size], length, first


def _negative_log_likelihoods(
    model: nn.Module, texts: np.ndarray, vocabulary: int, first: int
) -> Iterator[np.ndarray]:
    """Yield -ln p of the tokens (texts, length) from position `first` on, in blocks, nats."""
    # position i predicts token i + 1
    for start, logits in logit_blocks(model, texts[:, :-1], vocabulary, first - 1):
        targets = mx.array(texts[:, start + 1 : start + 1 + logits.shape[1], None])
        target_logits = mx.take_along_axis(logits, targets, axis=-1)
        yield np.array(mx.logsumexp(logits, axis=-1, keepdims=True) - target_logits).ravel()
