"""Have a model write the text it is calibrated on, so that no data set is needed.

A third of the texts begin with a random token, a third with one of a few common openings of a
document, and a third, where there is a chat template, with a user's message that the model itself
invents, so that it goes on to answer it. Everything else is drawn from the model at temperature 1:
lower temperatures and fewer kinds of beginnings gave calibrations that carry over less well to
other text.
"""

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from splitquant_mlx.progress import Progress

OPENINGS = (
    "The history of", "In mathematics,", "def ", "#include <", "Chapter 1\n\n", "Question: ",
    "Once upon a time", "According to a new study", "Ingredients:\n", "Dear ", "import ",
    "The following is a list of", "In 1994,", "<html>", "Abstract\n\n", "The city of", "How to ",
    "# ", "She ", "He was born in", "It is", "1. ", "A: ", "BREAKING: ", "The album", "Der ", "El ",
    "Les ", "The species", "Theorem. ", "SELECT ", "{\"", "I think", "The army", "Copyright (c)",
)  # fmt: skip
MARK = "\x01"
BATCH_TEXTS = 128  # 128 tokens of each have 0.5 GB of keys and values for 1B, 2.1 GB for 8B


def sample_tokens(
    model: nn.Module, prompts: list[list[int]], *, length: int, seed: int, progress: Progress
) -> np.ndarray:
    """Return tokens (texts, length) int32 that `model` wrote, `BATCH_TEXTS` side by side.

    Args:
        model: one of mlx-lm's, unquantized.
        prompts: the beginning of each text, at least one token.
        length: tokens of each, its beginning among them.
        seed: of the sampling.
        progress: told of every token of a batch.
    """
    batches = [
        prompts[start : start + BATCH_TEXTS] for start in range(0, len(prompts), BATCH_TEXTS)
    ]
    keys = mx.random.split(mx.random.key(seed), len(batches))
    with progress.task("Sampling text", len(batches) * (length - 1)) as advance:
        return np.concatenate(
            [
                _continue(model, batch, length, key, advance)
                for batch, key in zip(batches, keys, strict=True)
            ]
        )


def _continue(
    model: nn.Module,
    prompts: list[list[int]],
    length: int,
    key: mx.array,
    advance: Callable[[float], None],
) -> np.ndarray:
    """Return tokens (texts, length): `prompts`, cut or carried on by the model, side by side."""
    from mlx_lm.models.cache import make_prompt_cache

    tokens = np.zeros((len(prompts), length), np.int32)
    given = np.array([min(len(prompt), length) for prompt in prompts])
    for row, prompt in zip(tokens, prompts, strict=True):
        row[: len(prompt)] = prompt[:length]
    cache = make_prompt_cache(model)
    for position in range(1, length):
        inputs = mx.array(tokens[:, position - 1 : position])
        key, own = mx.random.split(key)
        drawn = mx.random.categorical(model(inputs, cache=cache)[:, -1], key=own)
        free = given <= position
        tokens[free, position] = np.array(drawn)[free]
        advance(1)
    return tokens


def beginnings(tokenizer: Any, texts: int, rng: np.random.Generator) -> list[list[int]]:
    """Return the tokens that each of `texts` texts begins with, at least one.

    A token that begins all texts is there only if the tokenizer puts it there by itself. In
    SmolLM2-Instruct it is the one that opens a turn of a chat: sensitivities on plain texts behind
    it agree less with those on WikiText-2 (correlation of their logarithms 0.89, without 0.95).
    """
    start = tokenizer.encode("")[:1]
    if start != [tokenizer.bos_token_id]:
        start = []
    special = set(tokenizer.all_special_ids)
    usual = [token for token in sorted(tokenizer.get_vocab().values()) if token not in special]
    kinds = [
        lambda: [*start, int(rng.choice(usual))],
        lambda: [*start, *_encode(tokenizer, str(rng.choice(OPENINGS)))],
    ]
    if question := _before_question(tokenizer):
        kinds.append(lambda: question)
    return [kinds[i % len(kinds)]() for i in range(texts)]


def _before_question(tokenizer: Any) -> list[int]:
    """Return the tokens of the chat template before the user's words; none without a template."""
    if not tokenizer.has_chat_template:
        return []
    chat = [{"role": "user", "content": MARK}]
    try:
        text = tokenizer.apply_chat_template(chat, tokenize=False)
    except Exception:  # a template is a program of the checkpoint's, and may fail as it likes
        return []
    before, found, _ = text.partition(MARK)
    return _encode(tokenizer, before) if found else []


def _encode(tokenizer: Any, text: str) -> list[int]:
    return tokenizer.encode(text, add_special_tokens=False)
