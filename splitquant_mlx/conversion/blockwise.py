"""Learn the quantization of linear layers block by block, by gradient descent.

The layers of a block are replaced by layers that round in the forward pass, with a straight-through
estimator in the backward pass. Adam then lowers the squared difference between the outputs of this
block and of the original block on the same inputs. Trained parameters:

- "omniquant" (Shao et al., arXiv:2308.13137): clipping strengths. The ends of a group's range are
  its largest and smallest weight times the logistic function of a parameter. Channel scales are
  omitted: where they can be folded into the weights, from `up_proj` to `down_proj`, they raised the
  error of a block of a tiny Llama at 2 bits by a factor of 1.2 for the same number of steps.
- "efficientqat" (Chen et al., arXiv:2407.11062), its first phase: also the weights, in steps of
  the quantization grid. The second phase is similar to `refine`.

Each block gets the inputs of the original block, so blocks are independent.
"""

from collections.abc import Callable, Iterator, Mapping

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
from mlx.utils import tree_unflatten

from splitquant_mlx.calibration.blocks import Pass, start_pass, strip_prefix
from splitquant_mlx.calibration.statistics import InputStatistics, Learned, outer_statistics
from splitquant_mlx.calibration.sums import Statistic
from splitquant_mlx.conversion.plan import LayerPlan
from splitquant_mlx.errors import RecipeError, one_line

CLIP_RATE, SHIFT_RATE = 0.1, 0.005  # initial learning rates
OPEN = 4.0  # the logistic function is 0.98 here
BATCH_TOKENS = 512


def learn_blocks(
    load: Callable[[], nn.Module],
    tokens: np.ndarray,
    layers: Mapping[str, LayerPlan],
    outer: Mapping[str, Statistic],
    sweeps: int,
) -> Iterator[InputStatistics]:
    """Run a model block by block and yield what is learned for the layers of each block.

    Args:
        load: loads the unquantized model lazily.
        tokens: (texts, length), the inputs.
        layers: plans of the linear layers to learn, by path.
        outer: statistics for layers outside blocks, as for `iterate_blocks`.
        sweeps: passes over the inputs.

    Yields:
        For each layer `Learned`, in place of the mean of a statistic.

    Raises:
        RecipeError: the blocks of the model cannot be called separately, or one has no gradient.
    """
    run = start_pass(load, tokens, BATCH_TOKENS)
    for index, prefix in enumerate(run.prefixes):
        block_layers = strip_prefix(prefix, layers)
        states = list(run.states)
        run.advance(index)
        try:
            learned = _learn(run, index, states, block_layers, sweeps) if block_layers else {}
        except Exception as exc:  # the class depends on the operation without a gradient
            raise RecipeError(
                f"{prefix[:-1]} cannot be learned, {type(exc).__name__}: {one_line(exc)}: use "
                "--method gptq"
            ) from exc
        run.release(index)
        means = {f"{prefix}{path}": result for path, result in learned.items()}
        yield InputStatistics(prefix=prefix, means=means, rare={})
    yield outer_statistics(run, outer, tokens.size)


class LearnedLinear(nn.Module):
    """Linear layer with fake quantization, whose quantization parameters are trained.

    Attributes:
        high, low: clipping strengths, (out, groups, 1).
        shift: change of the weights, (out, groups, group_size), in steps of the grid; with
            "efficientqat" only.
    """

    def __init__(self, linear: nn.Linear, layer: LayerPlan):
        super().__init__()
        w = linear.weight.astype(mx.float32)
        self._w = w.reshape(len(w), -1, layer.group_size)
        self._bias = linear.get("bias")
        self._top = 2**layer.bits - 1
        self.high = mx.full((*self._w.shape[:2], 1), OPEN)
        self.low = mx.full((*self._w.shape[:2], 1), OPEN)
        if layer.quantizer == "efficientqat":
            self.shift = mx.zeros(self._w.shape)

    def grid(self) -> Learned:
        """Return weights to round, scales and biases."""
        w = self._w
        low = mx.minimum(w.min(-1, keepdims=True), 0) * mx.sigmoid(self.low)
        high = mx.maximum(w.max(-1, keepdims=True), 0) * mx.sigmoid(self.high)
        scales = mx.maximum((high - low) / self._top, 1e-7)
        if "shift" in self:
            w = w + mx.stop_gradient(scales) * self.shift
        return Learned(w, scales, low)

    def __call__(self, x: mx.array) -> mx.array:
        """Map x (..., in) to (..., out) with the rounded weights."""
        w, scales, biases = self.grid()
        steps = mx.clip((w - biases) / scales, 0, self._top)
        codes = steps + mx.stop_gradient(mx.round(steps) - steps)
        y = x @ (codes * scales + biases).reshape(len(w), -1).T
        return y if self._bias is None else y + self._bias


def _learn(
    run: Pass, index: int, states: list[mx.array], layers: Mapping[str, LayerPlan], sweeps: int
) -> dict[str, Learned]:
    """Learn the layers of block `index`, whose inputs are `states` and outputs `run.states`."""
    block = run.blocks[index]
    modules = dict(block.named_modules())
    learned = {path: LearnedLinear(modules[path], layer) for path, layer in layers.items()}
    block.freeze()
    block.update_modules(tree_unflatten(list(learned.items())))
    steps = sweeps * len(states)
    schedules = [optim.cosine_decay(rate, steps) for rate in (SHIFT_RATE, CLIP_RATE)]
    optimizer = optim.MultiOptimizer(
        [optim.Adam(schedule) for schedule in schedules], [lambda path, _: path.endswith("shift")]
    )

    def loss(batch: int) -> mx.array:
        difference = run.run(index, batch, states[batch]) - run.states[batch]
        return mx.square(difference.astype(mx.float32)).mean()

    gradient = nn.value_and_grad(block, loss)
    for step in range(steps):
        optimizer.update(block, gradient(step % len(states))[1])
        mx.eval(block.trainable_parameters(), optimizer.state)
    results = {path: layer.grid() for path, layer in learned.items()}
    mx.eval(results)
    return results
