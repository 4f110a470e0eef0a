"""Measure how far a model's predictions are from a reference model's.

For each position of a text, p is the reference's distribution of the next token and q the
model's; the Kullback-Leibler divergence is sum_v p_v (ln p_v - ln q_v), in nats.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn
import numpy as np


@dataclass(frozen=True, kw_only=True)
class Divergence:
    """Hold the distance of a model from a reference over `positions` predictions.

    Attributes:
        positions: number of predictions compared.
        kl_mean: mean KL divergence, nats.
        kl_median: median, nats.
        kl_p99: 99th percentile, nats.
        top1_agreement: share of positions at which both find the same token most likely.
    """

    positions: int
    kl_mean: float
    kl_median: float
    kl_p99: float
    top1_agreement: float


def log_probabilities(model: nn.Module, tokens: list[int]) -> mx.array:
    """Return ln p of every next token, (len(tokens), vocabulary), float32."""
    logits = model(mx.array([tokens]))[0].astype(mx.float32)
    return logits - mx.logsumexp(logits, axis=-1, keepdims=True)


def divergence(reference: Iterable[mx.array], model: Iterable[mx.array]) -> Divergence:
    """Compare two sequences of log-probabilities (positions, vocabulary), one array a text.

    Raises:
        ValueError: when there is nothing to compare, or the vocabularies differ.
    """
    kl, same = [], []
    for p, q in zip(reference, model, strict=True):
        if p.shape != q.shape:
            raise ValueError(f"log-probabilities of shapes {p.shape} and {q.shape} differ")
        # a float32 sum over a large vocabulary may fall just below zero
        kl.append(np.array(mx.maximum(mx.sum(mx.exp(p) * (p - q), axis=-1), 0)))
        same.append(np.array(mx.argmax(p, axis=-1) == mx.argmax(q, axis=-1)))
    if not kl:
        raise ValueError("no text to compare on")
    values = np.concatenate(kl).astype(np.float64)
    return Divergence(
        positions=len(values),
        kl_mean=float(values.mean()),
        kl_median=float(np.median(values)),
        kl_p99=float(np.percentile(values, 99)),
        top1_agreement=float(np.concatenate(same).mean()),
    )
