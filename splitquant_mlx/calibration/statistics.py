"""Second moments of the inputs of a model's layers, block by block."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from splitquant_mlx.calibration.blocks import Tap, start_pass, tapped

Statistic = Callable[[mx.array], mx.array]


def sum_of_squares(x: mx.array) -> mx.array:
    """Return sum x_j^2 (in,) over the rows of x (n, in): the diagonal of `hessian`."""
    return (x * x).sum(0)


def hessian(x: mx.array) -> mx.array:
    """Return x^T x (in, in), half the Hessian of the layer's squared output error.

    On the CPU by numpy, which computes half of a symmetric product (BLAS's syrk).
    """
    if mx.default_device() != mx.cpu:
        return x.T @ x
    rows = np.array(x, copy=False)
    return mx.array(rows.T @ rows)


@dataclass(frozen=True, kw_only=True)
class InputStatistics:
    """Statistics of the inputs of some layers.

    Attributes:
        prefix: begins the paths of all parameters of the block, as in "model.layers.0."; empty
            for those that are in no block.
        means: by the path of a layer, the mean over all tokens of its statistic, float32.
    """

    prefix: str
    means: Mapping[str, mx.array]


def iterate_blocks(
    model: nn.Module, tokens: np.ndarray, statistics: Mapping[str, Statistic]
) -> Iterator[InputStatistics]:
    """Run a model block by block, and yield what the layers of each block are fed.

    Only one block's weights and statistics are held here at a time; a block's weights are taken
    from the model when it is done. What comes last is for the layers that are in no block.

    Args:
        model: the unquantized model, lazily loaded; it cannot be run again.
        tokens: (texts, length) that it is run on.
        statistics: what to gather, by the path of the layer.

    Raises:
        RecipeError: when the model is not built of blocks that can be called one by one.
    """
    run = start_pass(model, tokens)
    names = {id(module): path for path, module in model.named_modules()}
    prefixes = [f"{names[id(block)]}." for block in run.blocks]
    for index, prefix in enumerate(prefixes):
        own = {
            path.removeprefix(prefix): statistic
            for path, statistic in statistics.items()
            if path.startswith(prefix)
        }
        sums = _Sums(own)
        with tapped(run.blocks[index], list(own)) as taps:
            run.advance(index, lambda sums=sums, taps=taps: sums.add(taps))
        run.release(index)
        means = sums.means(tokens.size)
        yield InputStatistics(
            prefix=prefix, means={prefix + path: mean for path, mean in means.items()}
        )
    outer = {
        path: statistic
        for path, statistic in statistics.items()
        if not path.startswith(tuple(prefixes))
    }
    sums = _Sums(outer)
    with tapped(model, list(outer)) as taps:
        for state in run.states if outer else ():
            run.finish(state)
            sums.add(taps)
    yield InputStatistics(prefix="", means=sums.means(tokens.size))


class _Sums:
    """Sums of the statistics of what tapped layers were called with."""

    def __init__(self, statistics: Mapping[str, Statistic]):
        self._statistics = statistics
        self._sums: dict[str, mx.array] = {}

    def add(self, taps: Mapping[str, Tap]) -> None:
        """Take what the taps hold."""
        shared: dict[tuple[int, Statistic], mx.array] = {}  # q, k and v are fed the same array
        for path, tap in taps.items():
            if (x := tap.inputs) is None:
                continue
            key = id(x), self._statistics[path]
            if key not in shared:
                shared[key] = key[1](x.reshape(-1, x.shape[-1]).astype(mx.float32))
            before = self._sums.get(path)
            self._sums[path] = shared[key] if before is None else before + shared[key]
        mx.eval(self._sums)
        for tap in taps.values():
            tap.inputs = None

    def means(self, tokens: int) -> dict[str, mx.array]:
        """Return the sums over the number of tokens."""
        means = {path: total / tokens for path, total in self._sums.items()}
        mx.eval(means)
        return means
