"""Measure the second moments of what each layer of a model is fed."""

from collections.abc import Callable

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from splitquant_mlx.calibration.blocks import Pass, Tap, start_pass, tapped

Moment = Callable[[mx.array], mx.array]


def mean_square(x: mx.array) -> mx.array:
    """Return sum x_j^2 (in,) over the rows of x (n, in): the diagonal of `gram`."""
    return (x * x).sum(0)


def gram(x: mx.array) -> mx.array:
    """Return x^T x (in, in)."""
    return x.T @ x


class Moments:
    """Give the moments of one layer after the other, in the model's order.

    A block is run when the first of its layers is asked for, and its moments are dropped when a
    layer of the next one is, so that those of one block are in memory at a time.

    Args:
        model: the unquantized model, lazily loaded; its blocks are taken from it as they are done.
        tokens: (texts, length) that it is run on.
        paths: the layers that will be asked for.
        moment: `mean_square` or `gram`.

    Attributes:
        after_blocks: those of `paths` that are in no block; they are to be asked for last.
    """

    def __init__(self, model: nn.Module, tokens: np.ndarray, paths: list[str], moment: Moment):
        self._pass: Pass = start_pass(model, tokens)
        self._moment = moment
        self._next = 0
        self._found: dict[str, mx.array] = {}
        self._tokens = tokens.size
        names = {id(module): path for path, module in model.named_modules()}
        prefixes = [f"{names[id(block)]}." for block in self._pass.blocks]
        self._inner = [
            [path.removeprefix(prefix) for path in paths if path.startswith(prefix)]
            for prefix in prefixes
        ]
        self._prefixes = prefixes
        self.after_blocks = [path for path in paths if not path.startswith(tuple(prefixes))]

    def __getitem__(self, path: str) -> mx.array:
        """Return the mean over all tokens of the moment of the inputs of a layer, float32."""
        while path not in self._found:
            self._advance()
        return self._found[path]

    def _advance(self) -> None:
        index = self._next
        if index > len(self._prefixes):
            raise KeyError("layers are to be asked for in the model's order")
        self._next += 1
        self._found = {}
        if index == len(self._prefixes):
            with tapped(self._pass.model, self.after_blocks) as taps:
                for state in self._pass.states:
                    self._pass.finish(state)
                    self._add(taps, "")
        else:
            block, prefix = self._pass.blocks[index], self._prefixes[index]
            with tapped(block, self._inner[index]) as taps:
                self._pass.advance(index, lambda: self._add(taps, prefix))
            self._pass.release(index)
        self._found = {path: total / self._tokens for path, total in self._found.items()}
        mx.eval(self._found)

    def _add(self, taps: dict[str, Tap], prefix: str) -> None:
        shared: dict[int, mx.array] = {}  # q, k and v are fed the same array
        for path, tap in taps.items():
            x = tap.inputs
            if x is None:
                continue
            if id(x) not in shared:
                rows = x.reshape(-1, x.shape[-1]).astype(mx.float32)
                shared[id(x)] = self._moment(rows)
            before = self._found.get(prefix + path)
            self._found[prefix + path] = shared[id(x)] if before is None else before + shared[id(x)]
        mx.eval(self._found)
        for tap in taps.values():
            tap.inputs = None
