"""Score continuations of contexts: ln p(continuation | context), each shared token computed once.

Three steps, each extending the key-value cache of the previous one:

1. The common prefix of all contexts, as one row.
2. Batches of contexts of similar length, up to the length of the shortest minus one token, so that
   rows need no padding.
3. The rest of each context with each of its continuations, padded on the right, where causal
   attention does not see the padding. Continuations that differ only in their last token, such as
   single letters, share a row: the last token is predicted but not an input.

The output layer, most of the work of a short batch with a large vocabulary, runs only in step 3, in
blocks of bounded size. Caches whose rows cannot be copied, such as those of recurrent and
sliding-window layers, skip steps 1 and 2: slower, with the same scores.
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
from splitquant_mlx.runtime.cores import run_rounds, serialized
from splitquant_mlx.runtime.ranks import Group, shard

BATCH_TOKENS = 4096
MAX_STEP = 1024  # more tokens per step need more attention memory and gain little time
CACHE_STEP = 16  # tokens per row that a cache allocates at a time
SLACK = 16  # context lengths within a batch differ by at most 1/16

Tokens = tuple[int, ...]
Pair = tuple[Sequence[int], Sequence[int]]
ContextGroup = tuple[Tokens, list[tuple[int, Tokens]]]  # a context; (pair index, continuation)


@dataclass(frozen=True, kw_only=True)
class Score:
    """Log-likelihood of a continuation of a context.

    Attributes:
        loglikelihood: sum of ln p of its tokens, nats; 0 for an empty continuation.
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

    Scores come batch by batch; all pairs with the same context are in the same batch. Batching
    affects a score by rounding only.

    Args:
        model: an mlx-lm model, preferably prepared by `dense.for_scoring`.
        pairs: tokens of the context, at least one, and of the continuation; see `fit`.
        batch_tokens: maximum tokens in memory at a time, including those in the cache, per CPU
            core; a single pair may be longer.
        group: ranks that share the batches; only those of this rank are scored.
        progress: progress reporter.

    Raises:
        RecipeError: when a context is empty, a token is not in the model's vocabulary, or
            `batch_tokens` is less than 1.
    """
    if batch_tokens < 1:
        raise RecipeError(f"expected 1 or more, got {batch_tokens}", field="batch_tokens")
    contexts: dict[Tokens, list[tuple[int, Tokens]]] = {}
    for index, (context, continuation) in enumerate(pairs):
        if not context:
            raise RecipeError(
                f"pair {index}: expected a context of at least one token, got none: start it with "
                "the tokenizer's beginning-of-text token"
            )
        contexts.setdefault(tuple(context), []).append((index, tuple(continuation)))
    if not pairs:
        return
    groups = sorted(contexts.items(), key=lambda item: len(item[0]), reverse=True)
    _, vocabulary = token_array(model, sorted({t for pair in pairs for part in pair for t in part}))
    runner = _Runner(model, vocabulary, batch_tokens)
    with progress.task("Scoring", len(pairs)) as advance:
        prefix = _common_prefix(groups) if runner.can_copy else 0
        prefix_cache = runner.extend(runner.empty(), [0], [groups[0][0][:prefix]])
        batches = shard(group, list(_batches(groups, batch_tokens)))
        tasks = [partial(_score_batch, runner, prefix_cache, prefix, batch) for batch in batches]
        for scores in itertools.chain.from_iterable(run_rounds(tasks)):
            for indexed_score in scores:
                yield indexed_score
                advance(1)


def fit(context: Sequence[int], continuation: Sequence[int], length: int | None) -> Pair:
    """Truncate a pair on the left to the model's context length, as lm-evaluation-harness does.

    The last token is not an input, so `length` + 1 tokens fit.

    Args:
        context: tokens.
        continuation: tokens.
        length: the model's context length, tokens; None is no limit.

    Raises:
        RecipeError: when the continuation alone is too long.
    """
    if length is None or len(context) + len(continuation) <= length + 1:
        return context, continuation
    if len(continuation) > length:
        raise RecipeError(
            f"expected a continuation of at most {length} tokens (the model's context length), "
            f"got {len(continuation)}"
        )
    return context[len(context) + len(continuation) - length - 1 :], continuation


def _common_prefix(groups: list[ContextGroup]) -> int:
    """Return the length of the contexts' common prefix, less than the shortest context."""
    contexts = [context for context, _ in groups]
    first, last = min(contexts), max(contexts)  # lexicographic, so their prefix is common to all
    limit = min(map(len, contexts)) - 1
    return next((i for i in range(limit) if first[i] != last[i]), limit)


def _batches(groups: list[ContextGroup], batch_tokens: int) -> Iterator[list[ContextGroup]]:
    """Yield batches of similar length from contexts sorted from long to short."""
    batch: list[ContextGroup] = []
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
    """A model that runs on rows of tokens which extend the rows of a cache."""

    def __init__(self, model: nn.Module, vocabulary: int, batch_tokens: int) -> None:
        from mlx_lm.models.cache import KVCache

        self._model, self._call = model, serialized(model, model)
        self._kv_cache = KVCache
        self._logit_rows = block_rows(vocabulary)
        self._batch_tokens = batch_tokens
        self.can_copy = all(type(layer) is KVCache for layer in self.empty())

    def empty(self) -> list[Any]:
        """Return an empty cache for any number of rows."""
        return make_cache(self._model, CACHE_STEP)

    def row_limit(self, tokens: int) -> int:
        """Return the maximum number of rows of `tokens`, including cached tokens."""
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
            mx.eval([layer.state for layer in cache])  # not the logits
        return cache

    def logits(
        self, cache: list[Any], rows: list[int], tokens: np.ndarray, first: int
    ) -> Iterator[tuple[int, mx.array]]:
        """Yield (start, logits (rows, columns, vocabulary)) blocks from column `first` on."""
        cache = self.extend(cache, rows, tokens[:, :first].tolist())
        step = max(1, self._logit_rows // len(rows))
        for start in range(first, tokens.shape[1], step):
            block = self._call(mx.array(tokens[:, start : start + step]), cache=cache)
            yield start, block.astype(mx.float32)

    def _copy(self, cache: list[Any], rows: list[int]) -> list[Any]:
        if not self.can_copy or not cache[0].offset:
            return self.empty()
        copied = []
        for layer in cache:
            new = self._kv_cache()
            new.step = CACHE_STEP
            new.keys = mx.take(layer.keys[..., : layer.offset, :], mx.array(rows), axis=0)
            new.values = mx.take(layer.values[..., : layer.offset, :], mx.array(rows), axis=0)
            new.offset = layer.offset
            copied.append(new)
        return copied


def _score_batch(
    runner: _Runner, prefix_cache: list[Any], prefix: int, batch: list[ContextGroup]
) -> list[tuple[int, Score]]:
    """Return the scores of all continuations of a batch of contexts."""
    scores = []
    shared = min(len(context) for context, _ in batch) - 1 if runner.can_copy else 0
    cache = runner.extend(prefix_cache, [0] * len(batch), [c[prefix:shared] for c, _ in batch])
    rows: dict[tuple[int, Tokens], list[tuple[int, Tokens]]] = {}
    for parent, (context, continuations) in enumerate(batch):
        for index, continuation in continuations:
            if continuation:
                inputs = context[shared:] + continuation[:-1]
                rows.setdefault((parent, inputs), []).append((index, continuation))
            else:
                scores.append((index, Score(loglikelihood=0.0, is_greedy=True)))
    ordered = sorted(rows.items(), key=lambda row: len(row[0][1]), reverse=True)
    while ordered:
        limit = runner.row_limit(shared + len(ordered[0][0][1]))
        scores += _score_rows(runner, cache, ordered[:limit])
        ordered = ordered[limit:]
    return scores


def _score_rows(
    runner: _Runner,
    cache: list[Any],
    rows: list[tuple[tuple[int, Tokens], list[tuple[int, Tokens]]]],
) -> Iterator[tuple[int, Score]]:
    """Yield the scores of the rows of a batch, sorted from long to short.

    Args:
        runner: the model.
        cache: rows of the contexts' shared part.
        rows: ((row of the cache, inputs), [(pair index, continuation), ...]).
    """
    parents = [parent for (parent, _), _ in rows]
    tokens = np.zeros((len(rows), len(rows[0][0][1])), np.int32)
    targets, owners = [], []  # (row, column, token) of every scored token, and its pair index
    for row, ((_, inputs), continuations) in enumerate(rows):
        tokens[row, : len(inputs)] = inputs
        for index, continuation in continuations:
            columns = range(len(inputs) - len(continuation), len(inputs))
            targets += [(row, *target) for target in zip(columns, continuation, strict=True)]
            owners += [index] * len(continuation)
    positions, pairs = np.array(targets), np.array(owners)
    sums, greedy = dict.fromkeys(owners, 0.0), dict.fromkeys(owners, True)
    for start, logits in runner.logits(cache, parents, tokens, int(positions[:, 1].min())):
        in_block = (positions[:, 1] >= start) & (positions[:, 1] < start + logits.shape[1])
        row, column, token = (mx.array(part) for part in (positions[in_block] - (0, start, 0)).T)
        log_p = logits[row, column, token] - mx.logsumexp(logits, axis=-1)[row, column]
        is_top = mx.argmax(logits, axis=-1)[row, column] == token
        mx.eval(log_p, is_top)
        values = zip(pairs[in_block], np.array(log_p), np.array(is_top), strict=True)
        for index, value, top in values:
            sums[index] += float(value)
            greedy[index] &= bool(top)
    for index, total in sums.items():
        yield index, Score(loglikelihood=total, is_greedy=greedy[index])
