"""Run a model over texts to score them, within a bounded memory.

The logits of one window of 2,048 tokens are a gigabyte where the vocabulary has 128,000 entries,
so they come in blocks.
"""

from collections.abc import Iterator, Sequence

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from splitquant_mlx.errors import RecipeError

BLOCK_BYTES = 128 << 20
MAX_BLOCK_ROWS = 4096


def token_array(model: nn.Module, tokens: Sequence[int] | np.ndarray) -> tuple[np.ndarray, int]:
    """Return `tokens` as an int32 array of the same shape, and the size of the vocabulary.

    Raises:
        RecipeError: when a token is none of the model's, which mlx would not notice.
    """
    array = np.asarray(tokens, np.int32)
    vocabulary = model(mx.zeros((1, 1), mx.int32)).shape[-1]  # lazy: nothing is computed
    if array.size and not (array.min() >= 0 and array.max() < vocabulary):
        raise RecipeError(
            f"got tokens from {array.min()} to {array.max()}, the model knows 0 to "
            f"{vocabulary - 1}: use the model's own tokenizer"
        )
    return array, vocabulary


def block_rows(vocabulary: int) -> int:
    """Return how many predictions over a vocabulary to hold in memory at a time."""
    return max(1, min(MAX_BLOCK_ROWS, BLOCK_BYTES // (4 * vocabulary)))


def logit_blocks(
    model: nn.Module, tokens: np.ndarray, vocabulary: int, first: int = 0
) -> Iterator[tuple[int, mx.array]]:
    """Yield the logits of every next token from position `first` on, block by block.

    The blocks go through the model one after the other with a key-value cache, so that neither
    their number nor `first` changes the result, and the output layer is applied to no position
    that is not asked for.

    Args:
        model: one of mlx-lm's.
        tokens: (texts, length), int32.
        vocabulary: its size, which sets the size of a block.
        first: positions before it are context only.

    Yields:
        The position a block begins at, and its logits (texts, positions, vocabulary), float32 and
        not evaluated yet; a block is for the caller to evaluate before it asks for the next.
    """
    from mlx_lm.models.cache import make_prompt_cache

    texts, length = tokens.shape
    step = max(1, block_rows(vocabulary) // texts)
    cache = make_prompt_cache(model)
    inputs = mx.array(tokens)
    for start in range(0, first, step):
        model(inputs[:, start : min(start + step, first)], cache=cache)
        mx.eval([layer.state for layer in cache])
    for start in range(first, length, step):
        yield start, model(inputs[:, start : start + step], cache=cache).astype(mx.float32)


def log_probability_blocks(model: nn.Module, windows: np.ndarray) -> Iterator[mx.array]:
    """Yield ln p of every next token of every window, (positions, vocabulary), float32.

    The blocks follow the text, do not cross windows, and depend on the vocabulary's size alone:
    two models of one vocabulary yield blocks that match.

    Args:
        model: one of mlx-lm's.
        windows: tokens (windows, length), each window a text of its own.

    Raises:
        RecipeError: when a token is none of the model's.
    """
    windows, vocabulary = token_array(model, windows)
    for window in windows:
        for _, logits in logit_blocks(model, window[None], vocabulary):
            yield log_probabilities_of(logits[0])


def log_probabilities_of(logits: mx.array) -> mx.array:
    """Return ln p for float32 logits (..., vocabulary), evaluated."""
    log_p = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
    mx.eval(log_p)
    return log_p
