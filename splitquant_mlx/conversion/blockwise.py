"""Learn block by block, by gradient steps, how a model's linear layers are to be quantized.

A block's layers are replaced by ones that round in the forward pass, and take the rounding for the
identity in the backward pass. Adam then lowers the squared difference of the block's output from
the original block's, on the same inputs. What is trained:

- "omniquant" (Shao et al., arXiv:2308.13137): clipping strengths. The ends of a group's range are
  its largest and smallest weight times the logistic function of a parameter. Its channel scales
  are left out: where they fold into the weights alone, from `up_proj` to `down_proj`, a block of a
  tiny Llama at 2 bits kept 1.2 times the error that it kept without, after as many steps.
- "efficientqat" (Chen et al., arXiv:2407.11062), its first phase: the weights as well, in steps of
  their group's grid. Its second phase is `refine`, roughly.

Each block is fed what the original's block is fed, so that blocks do not depend on one another.
"""

from collections.abc import Callable, Iterator, Mapping

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
from mlx.utils import tree_unflatten

from splitquant_mlx.calibration.blocks import Pass, below, start_pass
from splitquant_mlx.calibration.statistics import InputStatistics, Statistic, outer_statistics
from splitquant_mlx.conversion.plan import LayerPlan
from splitquant_mlx.errors import RecipeError, one_line

CLIP_RATE, SHIFT_RATE = 0.1, 0.005  # of Adam, falling to nothing
OPEN = 4.0  # where the logistic function is 0.98
BATCH_TOKENS = 512


def learn_blocks(
    load: Callable[[], nn.Module],
    tokens: np.ndarray,
    layers: Mapping[str, LayerPlan],
    outer: Mapping[str, Statistic],
) -> Iterator[InputStatistics]:
    """Run a model block by block, and yield what was learned of the layers of each.

    Args:
        load: loads the unquantized model lazily.
        tokens: (texts, length) that it is run on.
        layers: plans of the linear layers to learn, by path.
        outer: statistics of the layers that are in no block, as for `iterate_blocks`.

    Yields:
        In place of the mean of a statistic of each layer, (out, in + 2 * in / group_size) float32:
        weights to round, then scales, then biases.

    Raises:
        RecipeError: when the model is not built of blocks that can be called one by one, or a
            block has no gradients.
    """
    run = start_pass(load, tokens, BATCH_TOKENS)
    for index, prefix in enumerate(run.prefixes):
        own = below(prefix, layers)
        states = list(run.states)
        run.advance(index)
        try:
            learned = _learn(run, index, states, own) if own else {}
        except Exception as exc:  # a block without gradients raises whatever it meets
            raise RecipeError(
                f"{prefix[:-1]} cannot be learned, {type(exc).__name__}: {one_line(exc)}: use "
                "--method gptq"
            ) from exc
        run.release(index)
        found = {f"{prefix}{path}": array for path, array in learned.items()}
        yield InputStatistics(prefix=prefix, means=found, rare={})
    yield outer_statistics(run, outer, tokens.size)


class LearnedLinear(nn.Module):
    """Stand in for a linear layer while it is learned how to quantize it.

    Attributes:
        high, low: clipping strengths, (out, groups, 1).
        shift: of the weights, (out, groups, group_size), steps of the grid; where it is trained.
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

    def grid(self) -> tuple[mx.array, mx.array, mx.array]:
        """Return weights to round (out, groups, group_size), scales and biases (out, groups, 1)."""
        w = self._w
        low = mx.minimum(w.min(-1, keepdims=True), 0) * mx.sigmoid(self.low)
        high = mx.maximum(w.max(-1, keepdims=True), 0) * mx.sigmoid(self.high)
        scales = mx.maximum((high - low) / self._top, 1e-7)
        if "shift" in self:
            w = w + mx.stop_gradient(scales) * self.shift
        return w, scales, low

    def __call__(self, x: mx.array) -> mx.array:
        """Return x (..., in) times the transpose of the rounded weights, plus the bias."""
        w, scales, biases = self.grid()
        steps = mx.clip((w - biases) / scales, 0, self._top)
        codes = steps + mx.stop_gradient(mx.round(steps) - steps)
        y = x @ (codes * scales + biases).reshape(len(w), -1).T
        return y if self._bias is None else y + self._bias


def _learn(
    run: Pass, index: int, states: list[mx.array], layers: Mapping[str, LayerPlan]
) -> dict[str, mx.array]:
    """Learn the layers of block `index`, whose inputs are `states` and outputs `run.states`."""
    block = run.blocks[index]
    modules = dict(block.named_modules())
    learned = {path: LearnedLinear(modules[path], layer) for path, layer in layers.items()}
    block.freeze()
    block.update_modules(tree_unflatten(list(learned.items())))
    passes = next(iter(layers.values())).sweeps
    schedules = [optim.cosine_decay(r, passes * len(states)) for r in (SHIFT_RATE, CLIP_RATE)]
    optimizer = optim.MultiOptimizer(
        [optim.Adam(schedule) for schedule in schedules], [lambda path, _: path.endswith("shift")]
    )

    def loss(batch: int) -> mx.array:
        difference = run.run(index, batch, states[batch]) - run.states[batch]
        return mx.square(difference.astype(mx.float32)).mean()

    gradient = nn.value_and_grad(block, loss)
    for step in range(passes * len(states)):
        optimizer.update(block, gradient(step % len(states))[1])
        mx.eval(block.trainable_parameters(), optimizer.state)
    found = {}
    for path, layer in learned.items():
        grid = layer.grid()
        found[path] = mx.concatenate([part.reshape(len(part), -1) for part in grid], axis=1)
    mx.eval(found)
    return found
