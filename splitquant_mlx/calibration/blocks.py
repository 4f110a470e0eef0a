"""Run a model over texts block by block, and watch the inputs of its layers.

A transformer of mlx-lm has a list `layers` of blocks, each called with the hidden states first and
whatever else it needs (masks, caches) after. With the blocks replaced by stand-ins that note what
they are called with, one pass tells what each block needs, without computing it; then the blocks
are called one after the other on all texts. Only one block's weights are in memory at a time, and
each layer of a block is seen while its weights are there.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, TypeVar

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_map

from splitquant_mlx.errors import RecipeError
from splitquant_mlx.runtime.cores import evaluated, in_rounds, settle

CPU_BATCH_TOKENS, GPU_BATCH_TOKENS = 1024, 2048  # each core of a CPU has a batch
LOGITS = 1 << 24  # in memory together
Value = TypeVar("Value")


@dataclass(eq=False)
class Pass:
    """Texts on their way through a model.

    Attributes:
        blocks: the model's blocks; `release` frees the weights of one.
        states: hidden states before the next block, one array (texts, length, hidden) a batch.
        calls: calls[block][batch], the other arguments of the block.
    """

    model: nn.Module
    blocks: list[Any]
    states: list[mx.array]
    calls: list[list[tuple[tuple[Any, ...], dict[str, Any]]]]

    @property
    def prefixes(self) -> list[str]:
        """Return what the paths of each block's parameters begin with, as in "model.layers.0."."""
        names = {id(module): path for path, module in self.model.named_modules()}
        return [f"{names[id(block)]}." for block in self.blocks]

    def run(self, index: int, batch: int, state: mx.array) -> mx.array:
        """Return what block `index` makes of the `state` of a batch; not evaluated yet."""
        args, kwargs = self.calls[index][batch]
        return self.blocks[index](state, *args, **kwargs)

    def rounds(self, index: int, build: Callable[[int], Value]) -> Iterator[list[Value]]:
        """Compute something with block `index` and each batch; yields what is found, in order.

        On a CPU the batches of a round are computed side by side, one on each core.

        Args:
            index: of the block.
            build: returns arrays for the number of a batch, unevaluated; called once at a time, as
                the block may be changed for the time of a call.
        """
        mx.eval(self.states)
        compute = evaluated(build, self.blocks[index])
        return in_rounds([partial(compute, batch) for batch in range(len(self.states))])

    def watched(self, index: int, watch: Callable[[], Value]) -> Iterator[list[Value]]:
        """Take all texts through block `index`, and yield what `watch` finds after each batch."""

        def build(batch: int) -> tuple[mx.array, Value]:
            return self.run(index, batch, self.states[batch]), watch()

        done = 0
        for found in self.rounds(index, build):
            for state, _ in found:
                self.states[done] = state
                done += 1
            yield [seen for _, seen in found]

    def advance(self, index: int) -> None:
        """Take all texts through block `index`."""
        for _ in self.watched(index, lambda: None):
            pass

    def release(self, index: int) -> None:
        """Free the weights of a block, which cannot be run again before `restore`."""
        block = self.blocks[index]
        block.update(tree_map(lambda array: mx.array(0), block.parameters()))

    def restore(self, model: nn.Module) -> None:
        """Take the same model, loaded anew, in the place of the one here."""
        self.model, self.blocks = model, _blocks(model)

    def finish(self, state: mx.array) -> mx.array:
        """Return the model's output for a state after the last block; not evaluated yet."""
        with _replaced(self.blocks, lambda *call: state):
            return self.model(mx.zeros(state.shape[:2], mx.int32))

    def pieces(self, state: mx.array) -> list[mx.array]:
        """Return a state after the last block by texts, with at most `LOGITS` logits each."""
        texts = max(1, LOGITS // self.finish(state[:1]).size)
        return [state[start : start + texts] for start in range(0, len(state), texts)]


def below(prefix: str, by_path: Mapping[str, Value]) -> dict[str, Value]:
    """Return what lies below a prefix, by the rest of its path."""
    return {
        path.removeprefix(prefix): value
        for path, value in by_path.items()
        if path.startswith(prefix)
    }


def start_pass(
    load: Callable[[], nn.Module], tokens: np.ndarray, batch_tokens: int | None = None
) -> Pass:
    """Begin to take `tokens` (texts, length) through a model, about `batch_tokens` at a time.

    Args:
        load: loads the model lazily; called twice, so that what tokens were looked up in is freed.
        tokens: (texts, length).
        batch_tokens: that go through a block together; by default as many as suit the device.

    Raises:
        RecipeError: when the model is not built of blocks that can be called one by one.
    """
    run = begin(load(), tokens, batch_tokens)
    mx.eval(run.states, run.calls)
    run.restore(load())
    return run


def begin(model: nn.Module, tokens: np.ndarray, batch_tokens: int | None = None) -> Pass:
    """Begin to take `tokens` through a model that is in memory; see `start_pass`."""
    blocks = _blocks(model)
    calls: list[list[Any]] = [[] for _ in blocks]
    states: list[mx.array] = []

    def note(index: int, state: mx.array, args: tuple[Any, ...], kwargs: Any) -> mx.array:
        calls[index].append((args, kwargs))
        if index == 0:
            states.append(state)
        return state

    suited = CPU_BATCH_TOKENS if mx.default_device() == mx.cpu else GPU_BATCH_TOKENS
    texts = max(1, (batch_tokens or suited) // tokens.shape[1])
    try:
        with _replaced(blocks, note):
            for start in range(0, len(tokens), texts):
                model(mx.array(tokens[start : start + texts]))
    except Exception as exc:  # a model that is built otherwise raises whatever it meets
        raise RecipeError(_unsupported(model)) from exc
    if any(len(noted) != len(states) for noted in calls):
        raise RecipeError(_unsupported(model))
    return Pass(model=model, blocks=blocks, states=states, calls=calls)


def _blocks(model: nn.Module) -> list[Any]:
    """Return the list of blocks that the model itself goes through, to be changed in place."""
    wanted = list(getattr(model, "layers", []))
    for module in model.modules():
        found = module.get("layers")
        if isinstance(found, list) and found and [*map(id, found)] == [*map(id, wanted)]:
            return found
    raise RecipeError(_unsupported(model))


class _StandIn:
    """Answer for a block: the model may ask it for more than to be called."""

    def __init__(self, block: Any, answer: Callable[[mx.array, Any, Any], mx.array]):
        self.block = block
        self.answer = answer

    def __call__(self, state: mx.array, *args: Any, **kwargs: Any) -> mx.array:
        return self.answer(state, args, kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.block, name)


@contextmanager
def _replaced(blocks: list[Any], answer: Callable[..., mx.array]) -> Iterator[None]:
    """Have `answer(index, state, args, kwargs)` called in place of every block."""
    real = list(blocks)
    blocks[:] = [_StandIn(block, partial(answer, index)) for index, block in enumerate(real)]
    try:
        yield
    finally:
        blocks[:] = real


def _unsupported(model: nn.Module) -> str:
    return (
        f"a {getattr(model, 'model_type', type(model).__name__)} model cannot be calibrated: it is "
        "not a plain list of blocks: use --method rtn or splitquant"
    )


class Inputs(NamedTuple):
    """What a layer was called with.

    Attributes:
        rows: (..., in).
        given: what the layer itself was called with; `rows` but for a stack of experts.
        routes: of a stack of experts, the expert of each of the rows, (...); else None.
        experts: of the stack, their number.
    """

    rows: mx.array
    given: mx.array
    routes: mx.array | None = None
    experts: int = 1


class Tap:
    """Stand in for a layer, and keep what it is called with until it is taken.

    Attributes:
        layer: the real one.
        inputs: of the last call; None before.
        output_shape: of the last call.
        shift: added to the output, for gradients with respect to it; None adds nothing.
    """

    def __init__(self, layer: Any):
        self.layer = layer
        self.inputs: Inputs | None = None
        self.output_shape: tuple[int, ...] = ()
        self.shift: mx.array | None = None

    def __call__(self, x: mx.array, *args: Any, **kwargs: Any) -> mx.array:
        """Do as the layer does."""
        if is_expert_stack(self.layer):
            routes: mx.array = args[0] if args else kwargs["indices"]
            # a row for each expert that a token goes to; mlx-lm calls with (..., 1, in)
            rows = mx.broadcast_to(x.squeeze(-2), (*routes.shape, x.shape[-1]))
            self.inputs = Inputs(rows, x, routes, len(self.layer["weight"]))
        else:
            self.inputs = Inputs(x, x)
        y = self.layer(x, *args, **kwargs)
        self.output_shape = y.shape
        return y if self.shift is None else y + self.shift


def taken(taps: Mapping[str, Tap]) -> dict[str, Inputs]:
    """Return what layers were called with last, by path, and have their taps forget it.

    Raises:
        RecipeError: when a layer was not called.
    """
    found: dict[str, Inputs] = {}
    for path, tap in taps.items():
        if tap.inputs is None:
            raise unreached(path)
        found[path], tap.inputs = tap.inputs, None
    return found


def unreached(path: str) -> RecipeError:
    """Return what to say where no text of a calibration reaches a layer."""
    return RecipeError(
        f"the texts of the calibration do not reach {path}: give longer ones with "
        f'--sequence-length, or leave it out with --exclude "*{path.rpartition(".")[0]}.*"'
    )


def is_expert_stack(module: Any) -> bool:
    """Return whether a module is a stack of expert matrices, called with the experts to use."""
    from mlx_lm.models.switch_layers import SwitchLinear

    return isinstance(module, SwitchLinear)


class EmbeddingTap(Tap):
    """Stand in for an embedding that is the output head too."""

    def __call__(self, x: mx.array, *args: Any, **kwargs: Any) -> mx.array:
        """Look tokens up."""
        return self.layer(x)

    def as_linear(self, x: mx.array) -> mx.array:
        """Return logits."""
        self.inputs = Inputs(x, x)
        return self.layer.as_linear(x)


@contextmanager
def tapped(module: nn.Module, paths: list[str]) -> Iterator[dict[str, Tap]]:
    """Put taps in the place of layers of `module` for the time of the block."""
    layers = dict(module.named_modules())
    taps: dict[str, Tap] = {
        path: (EmbeddingTap if isinstance(layers[path], nn.Embedding) else Tap)(layers[path])
        for path in paths
    }
    for path in paths:
        settle(layers[path])
    _put(module, taps)
    try:
        yield taps
    finally:
        _put(module, {path: layers[path] for path in paths})


def _put(module: nn.Module, children: dict[str, Any]) -> None:
    for path, child in children.items():
        *parents, leaf = path.split(".")
        node: Any = module
        for name in parents:
            node = node[_key(node, name)]
        node[_key(node, leaf)] = child


def _key(node: Any, name: str) -> Any:
    return int(name) if isinstance(node, list) else name
