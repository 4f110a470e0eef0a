"""Train the scales and biases of a quantized model to match the original's predictions.

Codes q are fixed. A group's weights s q + b change by s (v + u (q - c) / c), where c is half the
largest code: v shifts the grid by v steps, u stretches it by u steps at either end, for any number
of bits. u and v start at zero and are trained by Adam (Kingma and Ba, 2015) to minimize the KL
divergence from the original's predictions. mlx-lm's DWQ trains scales and biases in the same way on
texts of a data set; here the original wrote the texts, other ones than those of the calibration.
Some are held out, to measure whether training helped.

On SmolLM2-135M, auto at 3.5, 4.5 and 5.5 bits/weight, divergence after over before:

    texts x passes, learning rate    held-out own text     WikiText-2
    256 x 1, 1e-3                    0.79  0.86  0.88      0.87  0.95  0.98
    1,024 x 1, 1e-3                  0.74  0.82  0.85      0.83  0.94  0.96
    1,024 x 1, 2e-3 (5.5: 5e-4)      0.73  0.82  0.86      0.82  0.93  0.97
    256 x 4, 1e-3 (4.5) or 1.5e-3          0.85                0.86  0.94

So more texts help more than more passes; at 5.5 bits, 2e-3 gives 0.96 on WikiText-2, too. Batches
of 16 texts give 0.87 and 0.97 there after a quarter of the steps. Worse, at 3 bits and on fewer
texts: half the learning rate with the norms trained as well, a seventh of the tokens replaced at
random, and codes trained with straight-through gradients.
"""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
from mlx.utils import tree_flatten, tree_unflatten

from splitquant_mlx.calibration.predictions import Predictions
from splitquant_mlx.calibration.saved_state import SavedState
from splitquant_mlx.conversion.refine_step import Step
from splitquant_mlx.errors import RecipeError
from splitquant_mlx.models.dense import for_scoring
from splitquant_mlx.models.trainable import TrainableLinear, TrainableSwitchLinear
from splitquant_mlx.progress import REFINING, Advance, Progress
from splitquant_mlx.recipe import Calibration

BATCH_TEXTS = 4
HELD_OUT = 16  # one text in 16 is held out
TEXTS_PER_SAMPLE, MOST_TRAINED = 8, 1024  # training texts per calibration text, and at most
LEARNING_RATE = 2e-3
SAVE_S = 30.0  # between two saves


@dataclass(frozen=True, kw_only=True)
class Refined:
    """Result of the training.

    Attributes:
        tensors: scales and biases by name, float32; empty if training did not help.
        before: mean KL divergence from the original over held-out texts, nats per token.
        after: the same after training.
    """

    before: float
    after: float
    tensors: Mapping[str, mx.array] = field(default_factory=dict)


def training_texts(calibration: Calibration) -> Calibration:
    """Return the settings of the training texts: more than those of the calibration, and others."""
    texts = min(TEXTS_PER_SAMPLE * calibration.texts_for(), MOST_TRAINED)
    return replace(calibration, num_samples=texts, seed=calibration.seed + 1)


def require_texts(tokens: np.ndarray) -> None:
    """Raise RecipeError when `tokens` (texts, length) are too few texts to train on."""
    if len(tokens) < 2 * BATCH_TEXTS:
        raise RecipeError(
            f"refinement: expected {2 * BATCH_TEXTS} texts or more to train on, got {len(tokens)}: "
            "increase --num-samples"
        )


def refine(
    model: nn.Module,
    predictions: Predictions,
    tokens: np.ndarray,
    *,
    seed: int = 0,
    progress: Progress,
    saved_state: SavedState,
) -> Refined:
    """Train all quantized linear layers of `model`, which is modified.

    Args:
        model: one of mlx-lm's, with layers in affine quantization.
        predictions: of the original model for `tokens`.
        tokens: (texts, length), int32. One text in `HELD_OUT` is held out, the others are used for
            training once.
        seed: of the order of texts.
        progress: progress reporter.
        saved_state: state of an interrupted call, to resume from.

    Raises:
        RecipeError: when there is no layer to train.
    """
    layers = _make_trainable(model)
    if not layers:
        raise RecipeError("there is no quantized linear layer to refine")
    held_out, batches = _batches(len(tokens), seed)
    optimizer = optim.Adam(_schedule(len(batches)), betas=[0.9, 0.99], eps=1e-12)
    optimizer.init(model.trainable_parameters())

    def start(texts: np.ndarray) -> Step:
        expected = Predictions(*(array[mx.array(texts)] for array in predictions))
        return Step(model, tokens[texts], expected)

    with progress.task(REFINING, len(batches) + 2 * len(held_out)) as advance:
        before = _mean(start, held_out, advance)
        first, saved_s = _resume(saved_state, model, optimizer), time.monotonic()
        if first:
            progress.note(f"Resuming: {first} of {len(batches)} steps done")
            advance(first)
        for number in range(first, len(batches)):
            optimizer.update(model, start(batches[number]).gradients())
            mx.eval(model.trainable_parameters(), optimizer.state)
            advance(1)
            if time.monotonic() - saved_s > SAVE_S:
                _save(saved_state, model, optimizer, number + 1)
                saved_s = time.monotonic()
        after = _mean(start, held_out, advance)
    if not after < before:
        return Refined(before=before, after=before)
    tensors = {}
    for path, layer in layers.items():
        tensors[f"{path}.scales"], tensors[f"{path}.biases"] = layer.trained()
    mx.eval(tensors)
    return Refined(before=before, after=after, tensors=tensors)


def _mean(
    start: Callable[[np.ndarray], Step], batches: list[np.ndarray], advance: Advance
) -> float:
    """Return the mean divergence over all texts of `batches`."""
    total = 0.0
    for texts in batches:
        total += start(texts).divergence() * len(texts)
        advance(1)
    return total / sum(map(len, batches))


def _save(saved_state: SavedState, model: nn.Module, optimizer: Any, steps: int) -> None:
    """Save the trained parameters and the optimizer's state after `steps` steps."""
    trees: Any = model.trainable_parameters(), optimizer.state
    arrays: list[Any] = [array for tree in trees for _, array in tree_flatten(tree)]
    saved_state.save(f"step-{steps}", arrays)
    before = saved_state.load_json()
    saved_state.save_json(steps)
    saved_state.delete(f"step-{before}")


def _resume(saved_state: SavedState, model: nn.Module, optimizer: Any) -> int:
    """Restore the last save; returns the number of steps done."""
    steps = saved_state.load_json()
    arrays = saved_state.load(f"step-{steps}")
    if not isinstance(steps, int) or arrays is None:
        return 0
    names = [name for name, _ in tree_flatten(model.trainable_parameters())]
    model.update(tree_unflatten(list(zip(names, arrays, strict=False))))
    states = [name for name, _ in tree_flatten(optimizer.state)]
    optimizer.state = tree_unflatten(list(zip(states, arrays[len(names) :], strict=True)))
    return steps


def _make_trainable(model: nn.Module) -> dict[str, TrainableLinear]:
    """Replace quantized layers with trainable ones; all else is frozen and float32."""
    from mlx_lm.models.switch_layers import QuantizedSwitchLinear

    model.set_dtype(mx.float32)
    kinds = {nn.QuantizedLinear: TrainableLinear, QuantizedSwitchLinear: TrainableSwitchLinear}
    layers = {}
    for path, module in model.named_modules():
        if type(module) in kinds and module.mode == "affine":
            layers[path] = kinds[type(module)](module)
            module.pop("weight")  # free its memory
    model.update_modules(tree_unflatten(list(layers.items())))
    for_scoring(model).freeze()
    for layer in layers.values():
        layer.unfreeze()
    return layers


def _batches(texts: int, seed: int) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Return batches of held-out texts and of training texts, as indices."""
    held_out = np.arange(texts) % HELD_OUT == 0
    order = np.random.default_rng(seed).permutation(np.flatnonzero(~held_out))
    measured, training = (
        [numbers[i : i + BATCH_TEXTS] for i in range(0, len(numbers), BATCH_TEXTS)]
        for numbers in (np.flatnonzero(held_out), order)
    )
    return measured, training


def _schedule(steps: int) -> Callable[[mx.array], mx.array]:
    """Linear warm-up over a tenth of the steps, and linear decay to 0 over the rest."""
    rise = max(1, steps // 10)
    return optim.join_schedules(
        [
            optim.linear_schedule(LEARNING_RATE / rise, LEARNING_RATE, rise),
            optim.linear_schedule(LEARNING_RATE, 0.0, max(1, steps - rise)),
        ],
        [rise],
    )
