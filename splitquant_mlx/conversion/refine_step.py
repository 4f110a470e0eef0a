"""Divergence of a model over a few texts, and its gradients, block by block."""

from collections.abc import Callable
from functools import partial, reduce
from typing import Any, TypeVar

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten, tree_unflatten

from splitquant_mlx.calibration.blocks import start_pass_in_memory
from splitquant_mlx.calibration.predictions import Predictions, kl_divergence
from splitquant_mlx.runtime.cores import cores, run_parallel, serialized_eval

Value = TypeVar("Value")
Call = Callable[[int, mx.array], mx.array]


class Step:
    """Some texts, divided into parts that the cores of a CPU compute in parallel.

    Args:
        model: one of mlx-lm's, evaluated.
        tokens: (texts, length).
        predictions: of the original model for `tokens`.
    """

    def __init__(self, model: nn.Module, tokens: np.ndarray, predictions: Predictions):
        each = -(-len(tokens) // cores())
        self._run = start_pass_in_memory(model, tokens, each * tokens.shape[1])
        starts = range(0, len(tokens), each)
        self._expected = [[x[start : start + each] for x in predictions] for start in starts]
        self._shares = [len(state) / len(tokens) for state in self._run.states]
        mx.eval(self._run.states, self._run.calls, self._expected)

    def divergence(self) -> float:
        """Return the mean KL divergence from the predictions, nats per token."""
        run, last = self._run, self._states()[-1]
        values = self._outputs(self._divergence, run.model, last)
        pairs = zip(self._shares, values, strict=True)
        return sum(share * float(np.array(value)) for share, value in pairs)

    def gradients(self) -> Any:
        """Return the gradients of the divergence for all trainable parameters, as a tree.

        They are computed block by block, and each block runs again for it: in a single graph mlx
        allocates the full-size gradients of many layers before it reduces them.
        """
        run, states, collected = self._run, self._states(), {}
        trained, prefixes = dict(tree_flatten(run.model.trainable_parameters())), run.prefixes
        calls: list[tuple[Call, nn.Module, list[str]]] = []
        for index, prefix in enumerate(prefixes):
            names = [name for name in trained if name.startswith(prefix)]
            calls.append((partial(run.run, index), run.blocks[index], names))
        outer = [name for name in trained if not name.startswith(tuple(prefixes))]
        calls.append((self._divergence, run.model, outer))
        cotangents = [mx.array(share) for share in self._shares]
        for call, module, names in reversed(calls):
            of_call = [(name, trained[name]) for name in names]
            cotangents, gradients = self._backward(call, module, of_call, states.pop(), cotangents)
            collected.update(zip(names, gradients, strict=True))
        return tree_unflatten(list(collected.items()))

    def _backward(
        self,
        call: Call,
        module: nn.Module,
        trained: list[tuple[str, mx.array]],
        states: list[mx.array],
        cotangents: list[mx.array],
    ) -> tuple[list[mx.array], list[mx.array]]:
        """Return the gradients through `call` for the state of each part, and for `trained`."""
        model = self._run.model

        def build(part: int) -> list[mx.array]:
            def forward(state: mx.array, *arrays: mx.array) -> list[mx.array]:
                names = [name for name, _ in trained]
                model.update(tree_unflatten(list(zip(names, arrays, strict=True))))
                return [call(part, state)]

            primals = [states[part], *(array for _, array in trained)]
            _, gradients = mx.vjp(forward, primals, [cotangents[part]])
            model.update(tree_unflatten(trained))
            return gradients

        of_states, *of_trained = zip(*self._parallel(build, module), strict=True)
        gradients = [reduce(mx.add, parts) for parts in of_trained]
        mx.eval(gradients)
        return list(of_states), gradients

    def _states(self) -> list[list[mx.array]]:
        """Return the inputs of each block by part, and the outputs of the last."""
        run, states = self._run, [self._run.states]
        for index, block in enumerate(run.blocks):
            states.append(self._outputs(partial(run.run, index), block, states[-1]))
        return states

    def _outputs(self, call: Call, module: nn.Module, states: list[mx.array]) -> list[mx.array]:
        return self._parallel(lambda part: call(part, states[part]), module)

    def _divergence(self, part: int, state: mx.array) -> Any:
        return kl_divergence(self._run.finish(state), *self._expected[part])

    def _parallel(self, build: Callable[[int], Value], module: nn.Module) -> list[Value]:
        """Evaluate `build(part)`, which calls `module`, for each part."""
        compute = serialized_eval(build, module)
        return run_parallel([partial(compute, part) for part in range(len(self._shares))])
