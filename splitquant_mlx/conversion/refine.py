"""Train the scales and biases of a quantized model to predict what the original predicts.

Codes q stay as they are. A group's weights s q + b are moved by s (v + u (q - c) / c), where c is
the middle of all codes: v shifts them by steps of the grid, u stretches the grid by as many at
its ends, whatever the number of bits. u and v begin at zero and are trained by Adam (Kingma and Ba,
2015) to lower the Kullback-Leibler divergence from the original's predictions. mlx-lm's DWQ, too,
trains scales and biases against them, on the texts of a data set; here they are texts that the
original wrote itself, other ones than the layers were calibrated on. Some are held out, to tell
whether it helped.

On SmolLM2-135M, auto at 3.5, 4.5 and 5.5 bits/weight, what is left of the divergence:

    texts x passes, learning rate    held-out own text     WikiText-2
    256 x 1, 1e-3                    0.79  0.86  0.88      0.87  0.95  0.98
    1,024 x 1, 1e-3                  0.74  0.82  0.85      0.83  0.94  0.96
    1,024 x 1, 2e-3 (5.5: 5e-4)      0.73  0.82  0.86      0.82  0.93  0.97
    256 x 4, 1e-3 (4.5) or 1.5e-3          0.85                0.86  0.94

So other texts help more than further passes; at 5.5 bits, too, 2e-3 leaves 0.96 on WikiText-2.
Batches of 16 texts, there, leave 0.87 and 0.97 after a quarter of the steps. Worse were, at 3 bits
and on fewer texts, half the learning rate with the norms trained as well, a seventh of the tokens
replaced at random, and codes trained with straight-through gradients. On a CPU, two threads with a
stream each are no faster than one: their operations wait for each other.
"""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cache, partial
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
from mlx.utils import tree_flatten, tree_unflatten

from splitquant_mlx.calibration.blocks import Pass, begin
from splitquant_mlx.calibration.predictions import Predictions, kl_divergence
from splitquant_mlx.calibration.unfinished import Unfinished
from splitquant_mlx.errors import RecipeError
from splitquant_mlx.models.dense import for_scoring
from splitquant_mlx.models.expert_products import expert_products
from splitquant_mlx.progress import Advance, Progress
from splitquant_mlx.recipe import Calibration

BATCH_TEXTS = 4
HELD_OUT = 16  # one text in so many
TEXTS_PER_SAMPLE = 4  # for each one that layers are calibrated on
LEARNING_RATE = 2e-3
WIDE = 1 << 24  # weights that are dense at a time
SAVE_S = 30.0  # between two saves of what was trained


@dataclass(frozen=True, kw_only=True)
class Refined:
    """Result of the training.

    Attributes:
        tensors: scales and biases by their names, float32; none where training did not help.
        before: mean KL divergence from the original over texts not trained on, nats a token.
        after: the same after training.
    """

    before: float
    after: float
    tensors: Mapping[str, mx.array] = field(default_factory=dict)


def training_texts(calibration: Calibration) -> Calibration:
    """Return the settings of the texts to train on: more, and others, than to calibrate on."""
    texts = TEXTS_PER_SAMPLE * calibration.num_samples
    return replace(calibration, num_samples=texts, seed=calibration.seed + 1)


def require_texts(tokens: np.ndarray) -> None:
    """Raise RecipeError when `tokens` (texts, length) are too few texts to train on."""
    if len(tokens) < 2 * BATCH_TEXTS:
        raise RecipeError(
            f"refinement: expected {2 * BATCH_TEXTS} texts or more to train on, got {len(tokens)}: "
            "give a larger --num-samples"
        )


def refine(
    model: nn.Module,
    predictions: Predictions,
    tokens: np.ndarray,
    *,
    seed: int = 0,
    progress: Progress,
    unfinished: Unfinished,
) -> Refined:
    """Train all quantized linear layers of `model`, which is used up.

    Args:
        model: one of mlx-lm's, with layers in affine quantization.
        predictions: of what it was made of, for `tokens`.
        tokens: (texts, length), int32. One text in `HELD_OUT` is for the measurement alone, the
            others are gone through once.
        seed: of their order.
        progress: progress reporter.
        unfinished: where an interrupted call left off, this one goes on.

    Raises:
        RecipeError: when there is no layer to train.
    """
    layers = _make_trainable(model)
    if not layers:
        raise RecipeError("there is no quantized linear layer to refine")
    held_out, batches = _batches(len(tokens), seed)
    optimizer = optim.Adam(_schedule(len(batches)), betas=[0.9, 0.99], eps=1e-12)
    optimizer.init(model.trainable_parameters())

    def start(own: np.ndarray) -> tuple[Pass, Callable[[mx.array], Any]]:
        """Begin with a batch; also returns the divergence from what comes after all blocks."""
        run = begin(model, tokens[own], tokens[own].size)
        wanted = [array[mx.array(own)] for array in predictions]
        return run, lambda state: kl_divergence(run.finish(state), *wanted)

    with progress.task("Refining", len(batches) + 2 * len(held_out)) as advance:
        before = _mean(start, held_out, advance)
        first, saved_s = _resume(unfinished, model, optimizer), time.monotonic()
        if first:
            progress.note(f"Resuming: {first} of {len(batches)} steps done")
            advance(first)
        for number in range(first, len(batches)):
            optimizer.update(model, _gradients(*start(batches[number])))
            mx.eval(model.trainable_parameters(), optimizer.state)
            advance(1)
            if time.monotonic() - saved_s > SAVE_S:
                _save(unfinished, model, optimizer, number + 1)
                saved_s = time.monotonic()
        after = _mean(start, held_out, advance)
    if not after < before:
        return Refined(before=before, after=before)
    tensors = {}
    for path, layer in layers.items():
        tensors[f"{path}.scales"], tensors[f"{path}.biases"] = layer.trained()
    mx.eval(tensors)
    return Refined(before=before, after=after, tensors=tensors)


def _mean(start: Callable[[np.ndarray], Any], batches: list[np.ndarray], advance: Advance) -> float:
    """Return the mean divergence over all texts of `batches`."""
    total = 0.0
    for own in batches:
        run, divergence = start(own)
        total += np.array(divergence(_states(run)[-1])) * len(own)
        advance(1)
    return float(total / sum(map(len, batches)))


def _states(run: Pass) -> list[mx.array]:
    """Return the states of a batch before each block, and after the last."""
    states = [*run.states]
    for index in range(len(run.blocks)):
        states.append(run.run(index, 0, states[-1]))
        mx.eval(states[-1])
    return states


def _gradients(run: Pass, divergence: Callable[[mx.array], Any]) -> Any:
    """Return the divergence's gradients for all that is trained, as a tree.

    They go back block by block, which runs again for it: in one graph mlx makes room for many
    layers' wide gradients before it sums them up.
    """
    states, found = _states(run), {}
    trained = dict(tree_flatten(run.model.trainable_parameters()))

    def back(own: list[str], call: Callable[[mx.array], mx.array], cotangent: mx.array) -> mx.array:
        """Take `cotangent` of what `call` makes of the last state to the state, and leave that."""

        def forward(state: mx.array, *arrays: mx.array) -> list[mx.array]:
            run.model.update(tree_unflatten(list(zip(own, arrays, strict=True))))
            return [call(state)]

        primals = [states.pop(), *(trained[name] for name in own)]
        _, (into, *gradients) = mx.vjp(forward, primals, [cotangent])
        mx.eval(into, gradients)
        found.update(zip(own, gradients, strict=True))
        return into

    prefixes = run.prefixes
    outer = [name for name in trained if not name.startswith(tuple(prefixes))]
    cotangent = back(outer, divergence, mx.array(1.0))
    for index in reversed(range(len(prefixes))):
        own = [name for name in trained if name.startswith(prefixes[index])]
        cotangent = back(own, partial(run.run, index, 0), cotangent)
    run.model.update(tree_unflatten(list(trained.items())))
    return tree_unflatten(list(found.items()))


def _save(unfinished: Unfinished, model: nn.Module, optimizer: Any, steps: int) -> None:
    """Keep what is trained, and the optimizer's state, after so many steps."""
    trees: Any = model.trainable_parameters(), optimizer.state
    arrays: list[Any] = [array for tree in trees for _, array in tree_flatten(tree)]
    unfinished.keep(f"step-{steps}", arrays)
    before = unfinished.findings()
    unfinished.note(steps)
    unfinished.drop(f"step-{before}")


def _resume(unfinished: Unfinished, model: nn.Module, optimizer: Any) -> int:
    """Restore what was saved last; returns the steps done."""
    steps = unfinished.findings()
    arrays = unfinished.arrays(f"step-{steps}")
    if not isinstance(steps, int) or arrays is None:
        return 0
    names = [name for name, _ in tree_flatten(model.trainable_parameters())]
    model.update(tree_unflatten(list(zip(names, arrays, strict=False))))
    states = [name for name, _ in tree_flatten(optimizer.state)]
    optimizer.state = tree_unflatten(list(zip(states, arrays[len(names) :], strict=True)))
    return steps


class TrainableLinear(nn.Module):
    """Stand in for a quantized linear layer while its scales and biases are trained.

    Attributes:
        u, v: what is trained, (..., out, in / group_size), steps of the grid.
    """

    def __init__(self, layer: Any):
        super().__init__()
        self._packed, self._bias = layer.weight, layer.get("bias")
        self._scales = layer.scales.astype(mx.float32)
        self._biases = layer["biases"].astype(mx.float32)
        self._middle = (2**layer.bits - 1) / 2
        self._product, self._back = _product(layer.group_size, layer.bits)
        self.u = mx.zeros(self._scales.shape)
        self.v = mx.zeros(self._scales.shape)

    def trained(self) -> tuple[mx.array, mx.array]:
        """Return scales and biases (..., out, in / group_size), float32."""
        scales = self._scales * (1 + self.u / self._middle)
        return scales, self._biases + self._scales * (self.v - self.u)

    def __call__(self, x: mx.array) -> mx.array:
        """Return x (..., in) times the weight's transpose, and the layer's bias, if it has one."""
        rows = max(1, WIDE // x.shape[-1])
        starts = list(range(rows, len(self._packed), rows))
        pieces = (mx.split(array, starts) for array in (self._packed, *self.trained()))
        y = mx.concatenate([self._product(x, *own) for own in zip(*pieces, strict=True)], axis=-1)
        return y if self._bias is None else y + self._bias


class TrainableSwitchLinear(TrainableLinear):
    """Stand in for a quantized stack of experts, whose axis comes before the others."""

    def __call__(self, x: mx.array, indices: mx.array, sorted_indices: bool = False) -> mx.array:
        """Map x (..., 1, in) to (..., 1, out) by the experts `indices` (...)."""
        y = self._products(indices)(x, *self.trained())
        return y if self._bias is None else y + mx.expand_dims(self._bias[indices], -2)

    def _products(self, indices: mx.array) -> Any:
        """Return x, scales, biases -> products, which are computed one expert after the other."""

        def weighed(scales: mx.array, biases: mx.array, expert: int) -> list[mx.array]:
            return [self._packed[expert], scales[expert], biases[expert]]

        @mx.custom_function
        def products(x: mx.array, scales: mx.array, biases: mx.array) -> mx.array:
            x, scales, biases = map(_constant, (x, scales, biases))

            def multiply(rows: mx.array, expert: int) -> mx.array:
                return _constant(self._product(rows, *weighed(scales, biases, expert)))

            return expert_products(x, indices, multiply)

        @products.vjp
        def gradients(primals: Any, cotangent: mx.array, output: mx.array) -> tuple[mx.array, ...]:
            x, scales, biases = map(_constant, primals)
            width = x.shape[-1]
            rows = mx.broadcast_to(x, (*cotangent.shape[:-1], width))
            found = [list(mx.zeros_like(array)) for array in (scales, biases)]

            def back(rows: mx.array, expert: int) -> mx.array:
                own, out = mx.split(rows, [width], axis=-1)
                weight = weighed(scales, biases, expert)
                into, *trained = map(_constant, self._back(own, *weight, out))
                for of_all, of_expert in zip(found, trained, strict=True):
                    of_all[expert] = of_expert
                return into

            both = mx.concatenate([rows, _constant(cotangent)], axis=-1)
            into = expert_products(both, indices, back)
            shared = [axis for axis, size in enumerate(x.shape) if size != into.shape[axis]]
            return into.sum(shared, keepdims=True), *(mx.stack(of_all) for of_all in found)

        return products


def _constant(x: mx.array) -> mx.array:
    """Return the values of an array, with what they were made of let go.

    While gradients are taken, mlx keeps that of every array that is evaluated.
    """
    return mx.array(np.array(x))


@cache
def _product(group_size: int, bits: int) -> tuple[Any, Any]:
    """Return x, packed codes, scales, biases -> product, and the same, cotangent -> gradients.

    The product has gradients for all but the codes. The weight is made anew for them, so that no
    more than one piece's is in memory. mlx's own quantized product is slow on the CPU.
    """

    def dense(packed: mx.array, scales: mx.array, biases: mx.array) -> mx.array:
        return mx.dequantize(packed, scales, biases, group_size, bits)

    @mx.custom_function
    def product(x: mx.array, packed: mx.array, scales: mx.array, biases: mx.array) -> mx.array:
        return x @ dense(packed, scales, biases).T

    def back(
        x: mx.array, packed: mx.array, scales: mx.array, biases: mx.array, cotangent: mx.array
    ) -> tuple[mx.array, ...]:
        rows, out = (array.reshape(-1, array.shape[-1]) for array in (x, cotangent))
        of_weight = (out.T @ rows).reshape(*scales.shape, group_size)
        codes = dense(packed, mx.ones_like(scales), mx.zeros_like(biases)).reshape(of_weight.shape)
        w = (codes * scales[..., None] + biases[..., None]).reshape(len(packed), -1)
        return cotangent @ w, (of_weight * codes).sum(-1), of_weight.sum(-1)

    @product.vjp
    def gradients(primals: Any, cotangent: mx.array, output: mx.array) -> tuple[mx.array, ...]:
        x, packed, scales, biases = primals
        of_x, *trained = back(x, packed, scales, biases, cotangent)
        return of_x, mx.zeros_like(packed), *trained

    return product, back


def _make_trainable(model: nn.Module) -> dict[str, TrainableLinear]:
    """Put trainable layers in the place of quantized ones, with all else frozen and float32."""
    from mlx_lm.models.switch_layers import QuantizedSwitchLinear

    model.set_dtype(mx.float32)
    kinds = {nn.QuantizedLinear: TrainableLinear, QuantizedSwitchLinear: TrainableSwitchLinear}
    layers = {
        path: kinds[type(module)](module)
        for path, module in model.named_modules()
        if type(module) in kinds and module.mode == "affine"
    }
    model.update_modules(tree_unflatten(list(layers.items())))
    for_scoring(model).freeze()
    for layer in layers.values():
        layer.unfreeze()
    return layers


def _batches(texts: int, seed: int) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Return the numbers of the texts to measure on, and of those to train on, by batches."""
    held_out = np.arange(texts) % HELD_OUT == 0
    order = np.random.default_rng(seed).permutation(np.flatnonzero(~held_out))
    measured, trained = (
        [numbers[i : i + BATCH_TEXTS] for i in range(0, len(numbers), BATCH_TEXTS)]
        for numbers in (np.flatnonzero(held_out), order)
    )
    return measured, trained


def _schedule(steps: int) -> Callable[[mx.array], mx.array]:
    """Rise to the learning rate over a tenth of the steps, and fall to nothing over the rest."""
    rise = max(1, steps // 10)
    return optim.join_schedules(
        [
            optim.linear_schedule(LEARNING_RATE / rise, LEARNING_RATE, rise),
            optim.linear_schedule(LEARNING_RATE, 0.0, max(1, steps - rise)),
        ],
        [rise],
    )
