"""Signal-to-noise ratio of a quantized weight."""

import math

import mlx.core as mx
import numpy as np


def row_squares(w: mx.array, w_hat: mx.array) -> tuple[np.ndarray, np.ndarray]:
    """Return sum w^2 and sum (w - w_hat)^2 of every row (out,), float64.

    Args:
        w: the weight (out, in).
        w_hat: what the codes stand for, (out, k * in) float32: k parts side by side, to be summed.
    """
    exact = np.array(w.astype(mx.float32)).astype(np.float64)
    parts = np.array(w_hat).reshape(len(exact), -1, exact.shape[1])
    noise = exact - parts.sum(axis=1, dtype=np.float64)
    return np.square(exact).sum(axis=1), np.square(noise).sum(axis=1)


def decibels(signal: float, noise: float) -> float:
    """Return 10 log10(signal / noise), infinite where one of them is zero."""
    return 10 * math.log10(signal / noise) if signal and noise else math.inf
