"""Measure how well a model predicts a text.

Perplexity is exp of the mean of -ln p(token | the tokens before it). A text longer than the
context is read in windows, as the documentation of transformers does it ("Perplexity of
fixed-length models"): a window of `context_length` tokens begins every `stride` tokens, and scores
the tokens that no window before it held, so that each has at least `context_length - stride`
tokens of context. The first token of a window has no context and is never scored: of the text that
is its first token, and with `stride` = `context_length` one in every window.
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
from splitquant_mlx.runtime.ranks import Group, collect, deal


@dataclass(frozen=True, kw_only=True)
class Perplexity:
    """Hold how well a model predicts a text.

    Attributes:
        perplexity: exp(mean_nll).
        standard_error: of the perplexity, by the delta method: perplexity times the standard
            error of mean_nll. It takes the tokens for independent draws; those of one text are
            not, so the true error is somewhat larger. It is also no error of a difference: two
            models on the same text differ by far less than their errors suggest.
        mean_nll: mean negative log-likelihood of a scored token, nats.
        tokens: number of tokens scored.
        context_length: tokens of a window.
        stride: tokens from one window's start to the next one's.
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
    """Measure the perplexity of `tokens`; the windows of a batch are as many as memory allows.

    Args:
        model: one of mlx-lm's, best after `scoring.for_scoring`.
        tokens: one text; see `text.encode` for the token that opens it.
        context_length: tokens of a window; more than the model was trained for tells nothing.
        stride: tokens from one window's start to the next one's; None is `context_length`. Half
            of it doubles the work and gives every token half a window of context or more.
        group: ranks that share the work, batch by batch, and have one result.
        progress: told how many tokens have been scored.

    Raises:
        RecipeError: when the lengths do not fit each other or the text, or a token is none of the
            model's.
    """
    stride = context_length if stride is None else stride
    array, vocabulary = token_array(model, tokens)
    _check(len(array), context_length, stride)
    windows = list(_windows(len(array), context_length, stride))
    batch_size = max(1, block_rows(vocabulary) // context_length)
    batches = deal(group, list(_batches(windows, batch_size)))
    total = sum(len(starts) * (length - first) for starts, length, first in batches)
    values: list[list[float]] = []
    with progress.task("Measuring perplexity", total) as advance:
        for starts, length, first in batches:
            texts = np.stack([array[start : start + length] for start in starts])
            values.append([])
            for nll in _negative_log_likelihoods(model, texts, vocabulary, first):
                values[-1] += nll.tolist()
                advance(nll.size)
    return perplexity_of(np.concatenate(collect(group, values)), context_length, stride)


def perplexity_of(nll: np.ndarray, context_length: int, stride: int) -> Perplexity:
    """Return the statistics of the negative log-likelihoods (tokens,) of scored tokens, nats."""
    mean = float(nll.mean())
    # a ruined model's exp may not fit a float
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
        raise RecipeError(f"context_length: expected at least 3 tokens, got {context_length}")
    if not 1 <= stride <= context_length:
        raise RecipeError(
            f"stride: expected 1 to context_length ({context_length}) tokens, got {stride}"
        )
    if tokens < context_length:
        raise RecipeError(
            f"the text has {tokens} tokens, expected at least context_length ({context_length}): "
            "give a longer text or a smaller context_length"
        )


def _windows(tokens: int, context_length: int, stride: int) -> Iterator[tuple[int, int, int]]:
    """Yield where each window starts, its length, and which of its tokens to score first."""
    seen = 0
    for start in range(0, tokens, stride):
        end = min(start + context_length, tokens)
        first = max(seen - start, 1)
        if first < end - start:
            yield start, end - start, first
        if end == tokens:
            return
        seen = end


def _batches(
    windows: list[tuple[int, int, int]], size: int
) -> Iterator[tuple[list[int], int, int]]:
    """Yield the starts of at most `size` windows that agree in all else."""
    for (length, first), alike in groupby(windows, key=lambda window: window[1:]):
        starts = [start for start, _, _ in alike]
        for i in range(0, len(starts), size):
            yield starts[i : i + size], length, first


def _negative_log_likelihoods(
    model: nn.Module, texts: np.ndarray, vocabulary: int, first: int
) -> Iterator[np.ndarray]:
    """Yield -ln p of the tokens (texts, length) from position `first` on, in blocks, nats."""
    # position i predicts token i + 1
    for start, logits in logit_blocks(model, texts[:, :-1], vocabulary, first - 1):
        wanted = mx.array(texts[:, start + 1 : start + 1 + logits.shape[1], None])
        found = mx.take_along_axis(logits, wanted, axis=-1)
        yield np.array(mx.logsumexp(logits, axis=-1, keepdims=True) - found).ravel()
