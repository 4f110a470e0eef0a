"""Second moments of the inputs of each layer, block by block."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import NamedTuple

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from splitquant_mlx.calibration.blocks import (
    Inputs,
    Pass,
    collect_inputs,
    start_pass,
    strip_prefix,
    tapped,
)
from splitquant_mlx.calibration.sums import Statistic, Sum, hessian, sum_of
from splitquant_mlx.runtime.cores import run_parallel

FEW_TOKENS = 64  # per expert: with fewer, its statistic is mostly that of all experts


def shrunk(mean: mx.array, statistic: Statistic, tokens: int) -> mx.array:
    """Return the mean of a statistic; of `hessian` off-diagonals are over 1 + (2 in / tokens)^2.

    Estimated on few tokens, they generalise worse to other text than the diagonal does, as those of
    a sample covariance (Ledoit and Wolf, 2004). gptq's squared output error on WikiText-2 is 0.75
    to 0.84 of that without it in three down_proj of Qwen2.5-Coder-1.5B (8,960 inputs, 8,192
    tokens), 0.93 to 1.00 in four of Qwen2.5-Coder-0.5B (4,864 inputs, 16,384 tokens).
    """
    if statistic is not hessian:
        return mean
    smaller, channels = mean / (1 + (2 * len(mean) / tokens) ** 2), mx.arange(len(mean))
    smaller[channels, channels] = mx.diagonal(mean)
    return smaller


@dataclass(frozen=True, kw_only=True)
class InputStatistics:
    """Input statistics of the layers of one block.

    Attributes:
        prefix: of the block's parameter paths, such as "model.layers.0."; empty for the layers
            outside of all blocks.
        means: by layer path, the mean over all tokens of the layer's statistic, float32, `shrunk`
            if it is a Hessian; for a stack of experts one per expert, computed on access; for a
            learned layer `Learned`.
        rare: by path of a stack, the experts with fewer than `FEW_TOKENS` tokens, whose means are
            mostly those of the whole stack.
    """

    prefix: str
    means: Mapping[str, "Mean"]
    rare: Mapping[str, list[int]]

    @property
    def nbytes(self) -> int:
        """Return the size of the statistics, bytes; arrays that layers share count once."""
        return sum({id(mean): mean.nbytes for mean in self.means.values()}.values())


def iterate_blocks(
    load: Callable[[], nn.Module], tokens: np.ndarray, statistics: Mapping[str, Statistic]
) -> Iterator[InputStatistics]:
    """Run a model block by block; yields the input statistics of each block's layers.

    Only one block's weights and statistics are in memory at a time. The last item is for the layers
    outside of all blocks.

    Args:
        load: loads the unquantized model lazily.
        tokens: calibration texts (texts, length).
        statistics: statistic to compute, by layer path.

    Raises:
        RecipeError: when the model is not built of blocks that can be called one by one.
    """
    run = start_pass(load, tokens)
    prefixes = run.prefixes
    for index, prefix in enumerate(prefixes):
        yield _block_statistics(run, index, prefix, strip_prefix(prefix, statistics), tokens.size)
    outer = {
        path: statistic
        for path, statistic in statistics.items()
        if not path.startswith(tuple(prefixes))
    }
    yield outer_statistics(run, outer, tokens.size)


def _block_statistics(
    run: Pass, index: int, prefix: str, statistics: Mapping[str, Statistic], tokens: int
) -> InputStatistics:
    """Run block `index`, free its weights, and return its layers' input statistics."""
    means = _Means(statistics, tokens)
    with tapped(run.blocks[index], list(statistics)) as taps:
        for batches in run.watched(index, lambda: collect_inputs(taps)):
            means.add(batches)
    run.release(index)
    return means.result(prefix)


def outer_statistics(
    run: Pass, statistics: Mapping[str, Statistic], tokens: int
) -> InputStatistics:
    """Return the input statistics of layers outside of all blocks, after the last block."""
    means = _Means(statistics, tokens)
    with tapped(run.model, list(statistics), evaluate=False) as taps:
        for state in run.states if statistics else ():
            run.finish(state)
            inputs = collect_inputs(taps)
            mx.eval(inputs)
            means.add([inputs])
    return means.result("")


class _Means:
    """Means over `tokens` of the input statistics of tapped layers."""

    def __init__(self, statistics: Mapping[str, Statistic], tokens: int):
        self._statistics = statistics
        self._tokens = tokens
        self._sums: dict[str, Sum] = {}
        self._experts: dict[str, ExpertMeans] = {}

    def add(self, batches: Sequence[Mapping[str, Inputs]]) -> None:
        """Add the inputs of some batches, in order."""
        # q, k and v share their input array, as do gate and up
        firsts: dict[tuple[int, Statistic], str] = {}
        shared = {
            path: firsts.setdefault((id(inputs.argument), self._statistics[path]), path)
            for path, inputs in batches[0].items()
        }
        parts = [self._tasks(path, [batch[path] for batch in batches]) for path in firsts.values()]
        run_parallel([task for tasks in parts for task in tasks])
        for path, first in shared.items():
            self._share(path, first)

    def _share(self, path: str, first: str) -> None:
        if first in self._sums:
            self._sums[path] = self._sums[first]
        else:
            self._experts[path] = self._experts[first]

    def _tasks(self, path: str, batches: Sequence[Inputs]) -> list[Callable[[], None]]:
        """Return functions that add the inputs of a layer in some batches."""
        statistic = self._statistics[path]
        if batches[0].routes is None:
            rows = [_rows(inputs) for inputs in batches]
            mx.eval(rows)  # here, as tasks run in other threads
            return self._sums.setdefault(path, sum_of(statistic)).tasks(rows)
        means = self._experts.setdefault(path, ExpertMeans(batches[0].experts, statistic))

        def add() -> None:
            for inputs in batches:
                means.add(_rows(inputs), np.array(inputs.routes).reshape(-1))

        return [add]

    def result(self, prefix: str) -> InputStatistics:
        """Return the means; layers that share their inputs share the array."""
        finished: dict[int, mx.array] = {}
        for path, total in self._sums.items():
            if id(total) not in finished:
                mean = shrunk(total.pop() / self._tokens, self._statistics[path], self._tokens)
                mx.eval(mean)
                finished[id(total)] = mean
        of_layers = {path: finished[id(total)] for path, total in self._sums.items()}
        means: dict[str, Mean] = {**of_layers, **self._experts}
        rare = {prefix + path: experts.rare for path, experts in self._experts.items()}
        return InputStatistics(
            prefix=prefix, means={prefix + path: mean for path, mean in means.items()}, rare=rare
        )


def _rows(inputs: Inputs) -> mx.array:
    """Return inputs as (n, in) float32."""
    return inputs.rows.reshape(-1, inputs.rows.shape[-1]).astype(mx.float32)


class ExpertMeans:
    """Means of a statistic over the tokens of each expert: `means[expert]`, computed on access.

    Inputs are stored, without duplicates, as long as they take less memory than one sum per expert
    would: a token goes to many experts, and an expert's `hessian` is large. The statistic of all
    experts' tokens is added to that of each expert with the weight of `FEW_TOKENS` tokens.

    Args:
        experts: number of experts.
        statistic: function of the inputs (n, in).
    """

    def __init__(self, experts: int, statistic: Statistic):
        self._statistic = statistic
        self._counts = np.zeros(experts, np.int64)
        self._batches: list[_Routed] = []
        self._sums: np.ndarray | None = None
        self._overall: np.ndarray | None = None

    @property
    def nbytes(self) -> int:
        """Return the size of stored inputs and sums, bytes."""
        rows = sum(batch.rows.nbytes for batch in self._batches)
        return rows + (0 if self._sums is None else self._sums.nbytes)

    @property
    def rare(self) -> list[int]:
        """Return the experts with few tokens."""
        return np.flatnonzero(self._counts < FEW_TOKENS).tolist()

    def add(self, rows: mx.array, experts: np.ndarray) -> None:
        """Add inputs (n, in) float32, with the expert of each (n,)."""
        self._counts += np.bincount(experts, minlength=len(self._counts))
        self._batches.append(_Routed.of(np.array(rows), experts))
        entry = self._of(self._batches[0].rows[:1])
        if self._sums is not None or self.nbytes > len(self) * entry.nbytes:
            if self._sums is None:
                self._sums = np.zeros((len(self), *entry.shape), np.float32)
            for expert in np.unique(np.concatenate([batch.experts for batch in self._batches])):
                self._sums[expert] += self._of(self._rows_of(int(expert)))
            self._batches.clear()

    def __len__(self) -> int:
        return len(self._counts)

    def __getitem__(self, expert: int) -> mx.array:
        if self._overall is None:
            self._overall = self._sum_of_all() * (FEW_TOKENS / self._counts.sum())
        total = self._of(self._rows_of(expert)) if self._sums is None else self._sums[expert]
        tokens = int(self._counts[expert]) + FEW_TOKENS
        mean = mx.array((total + self._overall) / tokens)
        return shrunk(mean, self._statistic, tokens)

    def _sum_of_all(self) -> np.ndarray:
        if self._sums is not None:
            return self._sums.sum(axis=0)
        return reduce(np.add, (self._of(batch.all_rows()) for batch in self._batches))

    def _rows_of(self, expert: int) -> np.ndarray:
        return np.concatenate([batch.rows_of(expert) for batch in self._batches])

    def _of(self, rows: np.ndarray) -> np.ndarray:
        return np.array(self._statistic(mx.array(rows)))


class _Routed(NamedTuple):
    """Inputs of a stack of experts.

    Attributes:
        rows: (m, in) float32, without duplicates.
        numbers: (n,) index of each input in `rows`.
        experts: (n,) expert of each input.
    """

    rows: np.ndarray
    numbers: np.ndarray
    experts: np.ndarray

    @classmethod
    def of(cls, rows: np.ndarray, experts: np.ndarray) -> "_Routed":
        """Remove duplicates from inputs (n, in)."""
        factors = np.random.default_rng(0).integers(1 << 63, size=rows.shape[1], dtype=np.uint64)
        settings = {"dtype": np.uint64, "casting": "unsafe"}
        hashes = np.einsum("ij,j->i", rows.view(np.uint32), factors, **settings)
        _, first, numbers = np.unique(hashes, return_index=True, return_inverse=True)
        return cls(rows[first], numbers, experts)

    def rows_of(self, expert: int) -> np.ndarray:
        """Return the inputs (k, in) of an expert."""
        return self.rows[self.numbers[self.experts == expert]]

    def all_rows(self) -> np.ndarray:
        """Return the rows, each scaled by the square root of its number of occurrences."""
        times = np.bincount(self.numbers, minlength=len(self.rows))
        return self.rows * np.sqrt(times, dtype=np.float32)[:, None]


class Learned(NamedTuple):
    """What is learned for a layer instead of a statistic, float32; see `blockwise`.

    Attributes:
        w: weights to round, (out, groups, group_size).
        scales: (out, groups, 1).
        biases: (out, groups, 1).
    """

    w: mx.array
    scales: mx.array
    biases: mx.array

    @property
    def nbytes(self) -> int:
        """Return the size of the arrays, bytes."""
        return sum(array.nbytes for array in self)


Mean = mx.array | ExpertMeans | Learned
