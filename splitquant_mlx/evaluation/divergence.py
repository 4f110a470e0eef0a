"""Measure the KL divergence of a model's predictions from a reference model's.

For each position of a text, p is the reference's distribution of the next token and q the
model's; the Kullback-Leibler divergence is sum_v p_v (ln p_v - ln q_v), in nats.
"""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from splitquant_mlx.errors import RecipeError
from splitquant_mlx.evaluation.perplexity import Perplexity, perplexity_of
from splitquant_mlx.evaluation.reference import Reference
from splitquant_mlx.evaluation.scoring import log_probabilities_of, log_probability_blocks
from splitquant_mlx.progress import SILENT, Progress
from splitquant_mlx.runtime.ranks import Group, unshard

RESAMPLES = 2000


@dataclass(frozen=True, kw_only=True)
class Divergence:
    """KL divergence of a model from a reference over `positions` predictions.

    Attributes:
        positions: number of predictions compared.
        kl_mean: mean KL divergence, nats.
        kl_median: median, nats.
        kl_p99: 99th percentile, nats.
        kl_low, kl_high: 95 % confidence interval of kl_mean, nats, by bootstrap over windows of
            text, because positions within a window are correlated; None for a single window.
        top1_agreement: fraction of positions with the same most likely token in both models.
        standard_error: standard error of kl_mean, nats, which assumes independent positions; NaN
            for a single position.
    """

    positions: int
    kl_mean: float
    kl_median: float
    kl_p99: float
    kl_low: float | None
    kl_high: float | None
    top1_agreement: float
    standard_error: float


def measure_divergence(
    model: nn.Module,
    reference: Reference,
    *,
    group: Group | None = None,
    progress: Progress = SILENT,
) -> Divergence:
    """Compare a model with a reference over all next-token predictions of its windows.

    Args:
        model: an mlx-lm model, preferably prepared by `dense.for_scoring`.
        reference: see `reference.open_reference`.
        group: ranks that share the windows; `reference` has those of this rank, and every rank
            returns the complete result.
        progress: progress reporter.

    Raises:
        RecipeError: when the vocabularies of the two models differ.
        SplitQuantError: when the reference is not cached and cannot be loaded.
    """
    kl, same, _ = _run(model, reference, progress)
    kl, same = (np.array(unshard(group, values.tolist())) for values in (kl, same))
    return _divergence(kl, same)


def measure_both(
    model: nn.Module, reference: Reference, *, progress: Progress = SILENT
) -> tuple[Divergence, Perplexity]:
    """Measure divergence and perplexity over the same windows in one pass of the model.

    The perplexity equals that of `measure_perplexity` with stride = context_length; windows have
    at least 3 tokens. See `measure_divergence` for arguments and errors.
    """
    kl, same, nll = _run(model, reference, progress)
    length = kl.shape[1]
    return _divergence(kl, same), perplexity_of(nll[:, :-1].ravel(), length, length)


def _run(
    model: nn.Module, reference: Reference, progress: Progress
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return KL divergence, top-1 agreement and -ln q of the next token, shaped as the windows.

    -ln q of a window's last position, which has no next token, is meaningless.
    """
    windows = reference.windows
    following = mx.array(np.roll(windows, -1, axis=1).reshape(-1, 1))
    nll: list[np.ndarray] = []
    with progress.task("Measuring divergence", windows.size) as advance:

        def blocks() -> Iterator[mx.array]:
            start = 0
            for block in log_probability_blocks(model, windows):
                end = start + block.shape[0]
                nll.append(-np.array(mx.take_along_axis(block, following[start:end], axis=-1)))
                yield block
                advance(end - start)
                start = end

        kl, same = _compare(reference, blocks())
    shape = windows.shape
    return kl.reshape(shape), same.reshape(shape), np.concatenate(nll).reshape(shape)


def log_probabilities(model: nn.Module, tokens: list[int]) -> mx.array:
    """Return ln p of every next token, (len(tokens), vocabulary), float32."""
    return log_probabilities_of(model(mx.array([tokens]))[0].astype(mx.float32))


def divergence(reference: Iterable[mx.array], model: Iterable[mx.array]) -> Divergence:
    """Compare two sequences of log-probability blocks (positions, vocabulary).

    Raises:
        RecipeError: when there are no blocks, or the vocabularies differ.
    """
    kl, same = _compare(reference, model)
    return _divergence(kl[None], same)


def _compare(
    reference: Iterable[mx.array], model: Iterable[mx.array]
) -> tuple[np.ndarray, np.ndarray]:
    """Return the KL divergence of every position, nats, and whether the top-1 tokens agree."""
    kl, same = [], []
    for p, q in zip(reference, model, strict=True):
        if p.shape != q.shape:
            raise RecipeError(
                f"expected log-probabilities of shape {p.shape} (positions, vocabulary), as the "
                f"reference's, got {q.shape}: compare models of the same vocabulary"
            )
        kl.append(np.array(_kl(p, q)))
        same.append(np.array(mx.argmax(p, axis=-1) == mx.argmax(q, axis=-1)))
    if not kl:
        raise RecipeError("expected at least one prediction to compare, got none: give a text")
    return np.concatenate(kl).astype(np.float64), np.concatenate(same)


def _divergence(kl: np.ndarray, same: np.ndarray) -> Divergence:
    """Return the statistics of KL divergences (windows, positions), nats."""
    count, (low, high) = kl.size, bootstrap_interval(kl.mean(axis=1))
    return Divergence(
        positions=count,
        kl_mean=float(kl.mean()),
        kl_median=float(np.median(kl)),
        kl_p99=float(np.percentile(kl, 99)),
        kl_low=low,
        kl_high=high,
        top1_agreement=float(same.mean()),
        standard_error=float(kl.std(ddof=1)) / math.sqrt(count) if count > 1 else math.nan,
    )


def bootstrap_interval(means: np.ndarray) -> tuple[float | None, float | None]:
    """Return the 95 % bootstrap percentile interval of the mean of `means`, with a fixed seed."""
    if len(means) < 2:
        return None, None
    draws = np.random.default_rng(0).choice(means, (RESAMPLES, len(means))).mean(axis=1)
    low, high = np.percentile(draws, [2.5, 97.5])
    return float(low), float(high)


def _kl(log_p: mx.array, log_q: mx.array) -> mx.array:
    """Return the KL divergence of every row, nats.

    The added terms q - p sum to zero up to rounding. They make every summand non-negative and
    cancel, to first order, an error common to a row's log-probabilities, such as its logsumexp's.
    """
    p, q = mx.exp(log_p), mx.exp(log_q)
    return mx.maximum(mx.sum(p * (log_p - log_q) + (q - p), axis=-1), 0)
