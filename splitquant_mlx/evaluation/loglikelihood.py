"""Score continuations of contexts: ln p(continuation | context), each shared token computed once.

Three steps, each with the key-value cache that the one before it left:

1. The tokens that all contexts begin with, one row.
2. Contexts of about equal length side by side, up to the length of the shortest, less one token.
   Rows of one length need no padding.
3. What is left of each context, and each of its continuations, side by side and padded on the
   right, where causal attention sees no padding. Continuations that differ in their last token
   only, as single letters do, are one row: the last token is predicted but never read.

The output layer, most of the work of a short batch where the vocabulary is large, runs in step 3
alone, in blocks of bounded size. Caches that cannot be copied from row to row, such as those of
recurrent and sliding-window layers, get no steps 1 and 2: the same numbers, more slowly.
"""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from splitquant_mlx.errors import RecipeError
from splitquant_mlx.evaluation.scoring import block_rows, token_array
from splitquant_mlx.models.prompt_cache import make_cache
from splitquant_mlx.progress import SILENT, Progress
from splitquant_mlx.runtime.cores import in_rounds, one_at_a_time
from splitquant_mlx.runtime.ranks import Group, deal

BATCH_TOKENS = 4096
MAX_STEP = 1024  # attention over more at once takes more memory than it gains time
CACHE_STEP = 16  # tokens that rows of a cache make room for at a time
SLACK = 16  # the contexts of a batch differ in length by a sixteenth at most

Tokens = tuple[int, ...]
Pair = tuple[Sequence[int], Sequence[int]]
Choice = tuple[Tokens, list[tuple[int, Tokens]]]  # a context; its continuations with their index


@dataclass(frozen=True, kw_only=True)
class Score:
    """Hold how a model rates a continuation of a context.

    Attributes:
        loglikelihood: sum of ln p of its tokens, nats; 0 for a continuation of no tokens.
        is_greedy: whether every token is the most likely one.
    """

    loglikelihood: float
    is_greedy: bool


def score(
    model: nn.Module,
    pairs: Sequence[Pair],
    *,
    batch_tokens: int = BATCH_TOKENS,
    group: Group | None = None,
    progress: Progress = SILENT,
) -> Iterator[tuple[int, Score]]:
    """Yield the index and the score of each (context, continuation), the longest contexts first.

    The scores come batch by batch, all pairs of one context in one batch. How pairs are batched
    changes a score by rounding alone.

    Args:
        model: one of mlx-lm's, best after `scoring.for_scoring`.
        pairs: tokens of the context, at least one, and of the continuation; see `fit`.
        batch_tokens: how many tokens to hold in memory at a time, those in the cache included, on
            each core of a CPU; a single pair may be longer.
        group: ranks among which the batches are dealt out; only those of this one are scored.
        progress: told how many pairs have been scored.

    Raises:
        RecipeError: when a context is empty, a token is none of the model's, or `batch_tokens` is
            less than 1.
    """
    if batch_tokens < 1:
        raise RecipeError(f"batch_tokens: expected 1 or more, got {batch_tokens}")
    contexts: dict[Tokens, list[tuple[int, Tokens]]] = {}
    for index, (context, continuation) in enumerate(pairs):
        if not context:
            raise RecipeError(
                f"pair {index} has an empty context, which predicts nothing: begin it with the "
                "tokenizer's beginning-of-text token"
            )
        contexts.setdefault(tuple(context), []).append((index, tuple(continuation)))
    if not pairs:
        return
    groups = sorted(contexts.items(), key=lambda group: len(group[0]), reverse=True)
    used = {
        t for context, ends in groups for part in (context, *(e for _, e in ends)) for t in part
    }
    _, vocabulary = token_array(model, sorted(used))
    runner = _Runner(model, vocabulary, batch_tokens)
    with progress.task("Scoring", len(pairs)) as advance:
        prefix = _common_prefix(groups) if runner.shares else 0
        opening = runner.extend(runner.empty(), [0], [groups[0][0][:prefix]])
        batches = deal(group, list(_batches(groups, batch_tokens)))
        works = [partial(_score_batch, runner, opening, prefix, batch) for batch in batches]
        for scored in itertools.chain.from_iterable(in_rounds(works)):
            for found in scored:
                yield found
                advance(1)


def fit(context: Sequence[int], continuation: Sequence[int], length: int | None) -> Pair:
    """Drop a pair's first tokens where it is too long for a model, as lm-evaluation-harness does.

    The model reads all tokens but the last, so one more than `length` fits.

    Args:
        context: tokens.
        continuation: tokens.
        length: of what the model can read, tokens; None is no limit.

    Raises:
        RecipeError: when the continuation alone is too long.
    """
    if length is None or len(context) + len(continuation) <= length + 1:
        return context, continuation
    if len(continuation) > length:
        raise RecipeError(
            f"a continuation has {len(continuation)} tokens, the model reads {length} at most"
        )
    return context[len(context) + len(continuation) - length - 1 :], continuation


def _common_prefix(groups: list[Choice]) -> int:
    """Return how many tokens all contexts begin with, leaving one or more of each."""
    contexts = [context for context, _ in groups]
    first, last = min(contexts), max(contexts)  # in lexical order, so those between agree too
    limit = min(map(len, contexts)) - 1
    return next((i for i in range(limit) if first[i] != last[i]), limit)


def _batches(groups: list[Choice], batch_tokens: int) -> Iterator[list[Choice]]:
    """Yield contexts, sorted from long to short, in batches of similar length."""
    batch: list[Choice] = []
    for group in groups:
        if batch:
            longest = len(batch[0][0])
            shorter = longest - len(group[0])
            if shorter > longest // SLACK or (len(batch) + 1) * longest > batch_tokens:
                yield batch
                batch = []
        batch.append(group)
    yield batch


class _Runner:
    """Run a model over rows of tokens that continue the rows of a cache."""

    def __init__(self, model: nn.Module, vocabulary: int, batch_tokens: int) -> None:
        from mlx_lm.models.cache import KVCache

        self._model, self._call = model, one_at_a_time(model, model)
        self._plain = KVCache
        self._logit_rows = block_rows(vocabulary)
        self._batch_tokens = batch_tokens
        self.shares = all(type(layer) is KVCache for layer in self.empty())

    def empty(self) -> list[Any]:
        """Return a new cache without tokens, for any number of rows."""
        return make_cache(self._model, CACHE_STEP)

    def row_limit(self, tokens: int) -> int:
        """Return how many rows of `tokens`, cached ones included, to hold at a time."""
        return max(1, min(self._batch_tokens // tokens, self._logit_rows))

    def extend(
        self, cache: list[Any], rows: list[int], tokens: Sequence[Sequence[int]]
    ) -> list[Any]:
        """Copy rows of a cache and append `tokens` (rows, columns) to the copy."""
        cache = self._copy(cache, rows)
        step = max(1, min(MAX_STEP, self._batch_tokens // len(rows)))
        inputs = mx.array(np.array(tokens, np.int32))
        for start in range(0, inputs.shape[1], step):
            self._call(inputs[:, start : start + step], cache=cache)
            mx.eval([layer.state for layer in cache])  # and no logits
        return cache

    def logits(
        self, cache: list[Any], rows: list[int], tokens: np.ndarray, first: int
    ) -> Iterator[tuple[int, mx.array]]:
        """Yield blocks (rows, columns, vocabulary) from column `first` on, with their column."""
        cache = self.extend(cache, rows, tokens[:, :first].tolist())
        step = max(1, self._logit_rows // len(rows))
        for start in range(first, tokens.shape[1], step):
            block = self._call(mx.array(tokens[:, start : start + step]), cache=cache)
            yield start, block.astype(mx.float32)

    def _copy(self, cache: list[Any], rows: list[int]) -> list[Any]:
        if not self.shares or not cache[0].offset:
            return self.empty()
        copied = []
        for layer in cache:
            new = self._plain()
            new.step = CACHE_STEP
            new.keys = mx.take(layer.keys[..., : layer.offset, :], mx.array(rows), axis=0)
            new.values = mx.take(layer.values[..., : layer.offset, :], mx.array(rows), axis=0)
            new.offset = layer.offset
            copied.append(new)
        return copied


def _score_batch(
    runner: _Runner, opening: list[Any], prefix: int, batch: list[Choice]
) -> list[tuple[int, Score]]:
    """Return the scores of all continuations of a batch of contexts."""
    found = []
    shared = min(len(context) for context, _ in batch) - 1 if runner.shares else 0
    trunk = runner.extend(opening, [0] * len(batch), [c[prefix:shared] for c, _ in batch])
    rows: dict[tuple[int, Tokens], list[tuple[int, Tokens]]] = {}
    for parent, (context, continuations) in enumerate(batch):
        for index, continuation in continuations:
            if continuation:
                inputs = context[shared:] + continuation[:-1]
                rows.setdefault((parent, inputs), []).append((index, continuation))
            else:
                found.append((index, Score(loglikelihood=0.0, is_greedy=True)))
    ordered = sorted(rows.items(), key=lambda row: len(row[0][1]), reverse=True)
    while ordered:
        limit = runner.row_limit(shared + len(ordered[0][0][1]))
        found += _score_rows(runner, trunk, ordered[:limit])
        ordered = ordered[limit:]
    return found


def _score_rows(
    runner: _Runner,
    trunk: list[Any],
    rows: list[tuple[tuple[int, Tokens], list[tuple[int, Tokens]]]],
) -> Iterator[tuple[int, Score]]:
    """Yield the scores of rows that run side by side, the longest first."""
    parents = [parent for (parent, _), _ in rows]
    tokens = np.zeros((len(rows), len(rows[0][0][1])), np.int32)
    wanted, owners = [], []  # (row, column, token) of every logit asked for, and its pair
    for row, ((_, inputs), continuations) in enumerate(rows):
        tokens[row, : len(inputs)] = inputs
        for index, continuation in continuations:
            columns = range(len(inputs) - len(continuation), len(inputs))
            wanted += [(row, *found) for found in zip(columns, continuation, strict=True)]
            owners += [index] * len(continuation)
    picks, pairs = np.array(wanted), np.array(owners)
    sums, greedy = dict.fromkeys(owners, 0.0), dict.fromkeys(owners, True)
    for start, logits in runner.logits(trunk, parents, tokens, int(picks[:, 1].min())):
        here = (picks[:, 1] >= start) & (picks[:, 1] < start + logits.shape[1])
        row, column, token = (mx.array(part) for part in (picks[here] - (0, start, 0)).T)
        log_p = logits[row, column, token] - mx.logsumexp(logits, axis=-1)[row, column]
        likely = mx.argmax(logits, axis=-1)[row, column] == token
        mx.eval(log_p, likely)
        found = zip(pairs[here], np.array(log_p), np.array(likely), strict=True)
        for index, value, top in found:
            sums[index] += float(value)
            greedy[index] &= bool(top)
    for index, total in sums.items():
        yield index, Score(loglikelihood=total, is_greedy=greedy[index])
