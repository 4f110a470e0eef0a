"""Compute logits and log-probabilities of texts in blocks of bounded memory.

The logits of one window of 2,048 tokens take a gigabyte with a vocabulary of 128,000 entries.
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
        RecipeError: when a token is not in the model's vocabulary; mlx does not check this.
    """
    array = np.asarray(tokens, np.int32)
    vocabulary = model(mx.zeros((1, 1), mx.int32)).shape[-1]  # lazy: nothing is computed
    if array.size and not (array.min() >= 0 and array.max() < vocabulary):
        raise RecipeError(
            f"expected tokens from 0 to {vocabulary - 1}, got {array.min()} to {array.max()}: use "
            "the model's tokenizer"
        )
    return array, vocabulary


def block_rows(vocabulary: int) -> int:
    """Return the number of logit rows to hold in memory at a time."""
    return max(1, min(MAX_BLOCK_ROWS, BLOCK_BYTES // (4 * vocabulary)))


def logit_blocks(
    model: nn.Module, tokens: np.ndarray, vocabulary: int, first: int = 0
) -> Iterator[tuple[int, mx.array]]:
    """Yield the next-token logits from position `first` on, block by block.

    The blocks run through the model in order with a key-value cache, so that the result depends
    neither on their size nor on `first`. The output layer skips the positions before `first`.

    Args:
        model: an mlx-lm model.
        tokens: (texts, length), int32.
        vocabulary: vocabulary size, which sets the block size.
        first: earlier positions are context only.

    Yields:
        The first position of a block and its logits (texts, positions, vocabulary), float32, not
        yet evaluated; evaluate each block before requesting the next.
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

    Blocks are in the order of the text and do not cross windows. Their sizes depend on the
    vocabulary size only, so that two models of the same vocabulary yield matching blocks.

    Args:
        model: an mlx-lm model.
        windows: tokens (windows, length); windows are independent texts.

    Raises:
        RecipeError: when a token is not in the model's vocabulary.
    """
    windows, vocabulary = token_array(model, windows)
    for window in windows:
        for _, logits in logit_blocks(model, window[None], vocabulary):
            yield log_probabilities_of(logits[0])


def log_probabilities_of(logits: mx.array) -> mx.array:
    """Return ln p of float32 logits (..., vocabulary), evaluated."""
    log_p = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
    mx.eval(log_p)
    return log_p
