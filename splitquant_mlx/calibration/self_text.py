"""Sample calibration text from the model itself, so that no data set is needed.

A third of the texts begin with a random token, a third with one of a few common openings of a
document, and a third, if there is a chat template, with its opening of a user's turn, so that the
model writes a question and its answer. The rest is sampled at temperature 1: lower temperatures and
fewer kinds of beginnings gave calibrations that transfer less well to other text.
"""

import itertools
import time
from collections.abc import Iterator
from functools import partial
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from splitquant_mlx.calibration.saved_state import SavedState
from splitquant_mlx.errors import CheckpointError
from splitquant_mlx.models.prompt_cache import make_cache
from splitquant_mlx.progress import SAMPLING, Progress
from splitquant_mlx.runtime.cores import cores, run_parallel, serialized

OPENINGS = (
    "The history of", "In mathematics,", "def ", "#include <", "Chapter 1\n\n", "Question: ",
    "Once upon a time", "According to a new study", "Ingredients:\n", "Dear ", "import ",
    "The following is a list of", "In 1994,", "<html>", "Abstract\n\n", "The city of", "How to ",
    "# ", "She ", "He was born in", "It is", "1. ", "A: ", "BREAKING: ", "The album", "Der ", "El ",
    "Les ", "The species", "Theorem. ", "SELECT ", "{\"", "I think", "The army", "Copyright (c)",
)  # fmt: skip
MARK = "\x01"
BATCH_TEXTS = 256  # at most
CACHE_BYTES = 1 << 30  # keys and values of a batch: 256 texts of 128 tokens for 1B, 64 for 8B
CORE_TEXTS = 16  # least part of a batch for a core of a CPU
READ = 4  # positions of a resumed text that are read at a time
BLOCK = 64  # tokens of the vocabulary per partial sum
SAVE_S = 20.0  # between two saves


def sample_tokens(
    model: nn.Module,
    prompts: list[list[int]],
    *,
    length: int,
    seed: int,
    progress: Progress,
    saved_state: SavedState | None = None,
) -> np.ndarray:
    """Return tokens (texts, length) int32 sampled from `model`, in batches.

    Args:
        model: one of mlx-lm's.
        prompts: beginning of each text, at least one token.
        length: tokens per text, including its beginning.
        seed: of the sampling.
        progress: progress reporter.
        saved_state: state of an interrupted call, to resume from; removed at the end.
    """
    tokens = np.zeros((len(prompts), length), np.int32)
    for row, prompt in zip(tokens, prompts, strict=True):
        row[: len(prompt)] = prompt[:length]
    given = np.array([min(len(prompt), length) for prompt in prompts])
    batches = -(-len(prompts) // _batch_limit(model, length))
    size = -(-len(prompts) // batches)
    steps = batches * (length - 1)
    done = _restore(saved_state, tokens)
    with progress.task(SAMPLING, steps) as advance:
        if done:
            progress.note(f"Resuming: {done} of {steps} steps done")
            advance(done)
        saved_s = time.monotonic()
        for batch in range(done // (length - 1), batches):
            texts = slice(batch * size, (batch + 1) * size)
            first = done - batch * (length - 1) if done > batch * (length - 1) else 0
            for position in _continue(model, tokens[texts], given[texts], first + 1, [seed, batch]):
                advance(1)
                if saved_state and time.monotonic() - saved_s > SAVE_S:
                    steps_done = mx.array(batch * (length - 1) + position)
                    saved_state.save("tokens", [steps_done, mx.array(tokens)])
                    saved_s = time.monotonic()
    if saved_state:
        saved_state.remove()
    return tokens


def _batch_limit(model: nn.Module, length: int) -> int:
    """Return `texts_per_batch` for texts of `length` tokens."""
    cache = make_cache(model, length, half=True)
    model(mx.zeros((1, length), mx.int32), cache=cache)  # sets the sizes, is not evaluated
    return texts_per_batch(sum(layer.nbytes for layer in cache))


def texts_per_batch(cache_bytes: int) -> int:
    """Return the maximum number of texts in a batch, given the size of the cache of one, bytes."""
    return min(BATCH_TEXTS, max(CORE_TEXTS, CACHE_BYTES // max(1, cache_bytes)))


def _continue(
    model: nn.Module, tokens: np.ndarray, given: np.ndarray, first: int, seed: list[int]
) -> Iterator[int]:
    """Sample `tokens` (texts, length) from position `first` on, beyond the `given` ones.

    Yields each position when it is complete. The random numbers depend on the seed and the position
    alone, so that a text can be resumed. The texts are divided among the cores of a CPU.
    """
    count = max(1, min(cores(), len(tokens) // CORE_TEXTS))
    ends = [len(tokens) * part // count for part in range(count + 1)]
    parts = [slice(*pair) for pair in itertools.pairwise(ends)]
    call = serialized(model, model)  # a call may replace layers

    def read(part: slice) -> list[Any]:
        cache = make_cache(model, tokens.shape[1], half=True)
        for start in range(0, first - 1, READ):  # logits are not evaluated
            call(mx.array(tokens[part, start : min(start + READ, first - 1)]), cache=cache)
            mx.eval([layer.state for layer in cache])
        return cache

    def write(part: slice, cache: list[Any], position: int) -> None:
        logits = call(mx.array(tokens[part, position - 1 : position]), cache=cache)[:, -1]
        # logits depend on keys and values, not on other states, which belong to this thread
        mx.eval(logits, [layer.state for layer in cache if not hasattr(layer, "keys")])
        sampled = _sample(logits, [*seed, position], part)
        tokens[part, position] = np.where(given[part] <= position, sampled, tokens[part, position])

    caches = run_parallel([partial(read, part) for part in parts])
    for position in range(first, tokens.shape[1]):
        run_parallel([partial(write, *pair, position) for pair in zip(parts, caches, strict=True)])
        yield position


def _sample(logits: mx.array, seed: list[int], part: slice) -> np.ndarray:
    """Sample a token for each row of `logits` (texts, vocabulary), a `part` of a batch.

    On the CPU by inverse transform sampling, with one random number per text; mlx's categorical
    draws one per token of the vocabulary and takes six times as long.
    """
    rng = np.random.default_rng(seed)
    if mx.default_device() != mx.cpu:
        key = mx.random.key(int(rng.integers(1 << 63)))
        return np.array(mx.random.categorical(logits, key=key))
    points = rng.random(part.stop)[part.start :]
    rows = np.array(logits.astype(mx.float32), copy=False)
    return np.array([_invert(row, point) for row, point in zip(rows, points, strict=True)])


def _invert(logits: np.ndarray, point: float) -> int:
    """Return the token at which the distribution function of `logits` exceeds `point`."""
    p = np.exp(logits - logits.max())
    whole = len(p) // BLOCK * BLOCK
    blocks = p[:whole].reshape(-1, BLOCK).sum(axis=-1)
    sums = np.cumsum(np.concatenate([blocks, p[whole:]]), dtype=np.float64)
    at = point * sums[-1]
    block = min(int(np.searchsorted(sums, at, side="right")), len(sums) - 1)
    if block >= len(blocks):
        return whole + block - len(blocks)
    inside = np.cumsum(p[block * BLOCK : (block + 1) * BLOCK], dtype=np.float64)
    left = at - (sums[block - 1] if block else 0.0)
    return block * BLOCK + min(int(np.searchsorted(inside, left, side="right")), BLOCK - 1)


def _restore(saved_state: SavedState | None, tokens: np.ndarray) -> int:
    """Set `tokens` to the saved ones, if any; returns the number of steps done."""
    saved = saved_state.load("tokens") if saved_state else None
    if saved is None:
        return 0
    steps_done, tokens[...] = map(np.array, saved)
    return int(steps_done)


def beginnings(tokenizer: Any, texts: int, rng: np.random.Generator) -> list[list[int]]:
    """Return the first tokens of each of `texts` texts, at least one per text.

    A beginning-of-text token is there only if the tokenizer adds it. In SmolLM2-Instruct it is the
    one that opens a turn of a chat: sensitivities on plain texts after it agree less with those on
    WikiText-2 (correlation of their logarithms 0.89, without it 0.95).
    """
    start = tokenizer.encode("")[:1]
    if start != [tokenizer.bos_token_id]:
        start = []
    special = set(tokenizer.all_special_ids)
    plain = [token for token in sorted(tokenizer.get_vocab().values()) if token not in special]
    if not plain:
        raise CheckpointError(
            "the tokenizer has no token for text, so that the model cannot write calibration text: "
            "provide text with --calibration FILE"
        )
    kinds = [
        lambda: [*start, int(rng.choice(plain))],
        lambda: [*start, *_encode(tokenizer, str(rng.choice(OPENINGS)))],
    ]
    if question := _before_question(tokenizer):
        kinds.append(lambda: question)
    return [kinds[i % len(kinds)]() for i in range(texts)]


def _before_question(tokenizer: Any) -> list[int]:
    """Return the chat template's tokens before the user's message; none without a template."""
    if not tokenizer.has_chat_template:
        return []
    chat = [{"role": "user", "content": MARK}]
    try:
        text = tokenizer.apply_chat_template(chat, tokenize=False)
    except Exception:  # a checkpoint's template may raise anything
        return []
    before, mark, _ = text.partition(MARK)
    return _encode(tokenizer, before) if mark else []


def _encode(tokenizer: Any, text: str) -> list[int]:
    return tokenizer.encode(text, add_special_tokens=False)
