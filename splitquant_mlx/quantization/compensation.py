"""Round a weight channel by channel, whatever its codes stand for; see `gptq` for the terms.

`compensate` is GPTQ's recursion and `descend` coordinate descent, for codes that say themselves
which value is nearest. `gptq` has both in a faster form for codes with a scale and a bias.

H is measured on a few thousand tokens, and what it says of pairs of channels holds less well for
other texts than what it says of single ones. `damped_hessian` therefore scales the entries off the
diagonal down; with none of them left, the cost is that of `imatrix`.
"""

from typing import Protocol

import numpy as np

# twelve layers of SmolLM2-135M, calibrated on 18,000 tokens of its own: the divergence predicted on
# WikiText-2 is 13 % higher with 0.1 and 15 % with 0.6 (geometric means)
OFF_DIAGONAL_SHRINKAGE = 0.3
DAMPING = 1e-3  # of the mean of the diagonal
STEP = 32  # channels between two large products


def damped_hessian(hessian: np.ndarray) -> np.ndarray:
    """Return `hessian` over its mean diagonal, shrunk off the diagonal, damped on it."""
    diagonal = np.diagonal(hessian)
    unit = float(diagonal.mean()) or 1.0
    h = (hessian * ((1 - OFF_DIAGONAL_SHRINKAGE) / unit)).astype(np.float32, copy=False)
    np.fill_diagonal(h, diagonal / unit + DAMPING)
    return h


def unit_upper(h: np.ndarray) -> np.ndarray:
    """Return U, unit upper triangular, of h = U D U^T."""
    # the lower factor of h with its channels reversed, reversed again
    factor = np.linalg.cholesky(h[::-1, ::-1])[::-1, ::-1]
    return factor / np.diagonal(factor)


class Codes(Protocol):
    """What stands for a weight (in, out), for `compensate` and `descend`; see `Grid`."""

    group_size: int

    def values(self) -> np.ndarray:
        """Return the weight (in, out) that the codes stand for."""
        ...

    def fit(self, group: int, columns: np.ndarray, importance: np.ndarray) -> None:
        """Prepare for the channels of a group, which are to be rounded next."""
        ...

    def round(self, channel: int, wanted: np.ndarray) -> np.ndarray:
        """Give a channel the codes nearest to `wanted` (out,); returns what they stand for."""
        ...


def compensate(grid: Codes, columns: np.ndarray, h: np.ndarray) -> None:
    """Give each channel its codes in turn, compensating the errors of those before it."""
    feedback = unit_upper(h)
    importance = np.diagonal(h)
    error = np.empty_like(columns)
    for start in range(0, len(columns), grid.group_size):
        end = start + grid.group_size
        wanted = columns[start:end] + feedback[:start, start:end].T @ error[:start]
        grid.fit(start // grid.group_size, wanted, importance[start:end])
        for k in range(start, end):
            error[k] = columns[k] - grid.round(k, wanted[k - start])
            if k + 1 < end:
                wanted[k + 1 - start :] += feedback[k, k + 1 : end, None] * error[k]


def descend(grid: Codes, columns: np.ndarray, h: np.ndarray) -> None:
    """Give each weight its best code, all others fixed, channel after channel."""
    values = grid.values()
    error = columns - values
    for start in range(0, len(columns), STEP):
        end = min(start + STEP, len(columns))
        gradient = h[start:end] @ error
        for k in range(start, end):
            step = gradient[k - start] / h[k, k]
            moved = grid.round(k, values[k] + step) - values[k]
            error[k] -= moved
            if k + 1 < end:
                gradient[k + 1 - start :] -= h[k + 1 : end, k, None] * moved
