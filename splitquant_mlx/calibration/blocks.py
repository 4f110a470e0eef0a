"""Run a model over texts block by block, and record the inputs of its layers.

A transformer of mlx-lm has a list `layers` of blocks. Each is called with the hidden states,
followed by other arguments (masks, caches). A first pass replaces the blocks with placeholders that
record these arguments and compute nothing. The blocks then run one after the other on all texts, so
that only one block's weights are in memory at a time.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, TypeVar

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_map

from splitquant_mlx.errors import CheckpointError, RecipeError
from splitquant_mlx.runtime.cores import evaluate_arrays, run_rounds, serialized_eval

CPU_BATCH_TOKENS, GPU_BATCH_TOKENS = 1024, 2048  # on a CPU: per core
LOGITS = 1 << 24  # in memory at a time
Value = TypeVar("Value")


@dataclass(eq=False)
class Pass:
    """Hidden states of a set of texts at some depth of a model.

    Attributes:
        model: one of mlx-lm's.
        blocks: the model's blocks; `release` frees the weights of one.
        states: inputs of the next block, one array (texts, length, hidden) per batch.
        calls: calls[block][batch], the remaining arguments of the block.
    """

    model: nn.Module
    blocks: list[Any]
    states: list[mx.array]
    calls: list[list[tuple[tuple[Any, ...], dict[str, Any]]]]

    @property
    def prefixes(self) -> list[str]:
        """Return the prefix of each block's parameter paths, such as "model.layers.0."."""
        return _prefixes(self.model, self.blocks)

    def run(self, index: int, batch: int, state: mx.array) -> mx.array:
        """Return the output of block `index` for the `state` of a batch, unevaluated."""
        args, kwargs = self.calls[index][batch]
        return self.blocks[index](state, *args, **kwargs)

    def rounds(self, index: int, build: Callable[[int], Value]) -> Iterator[list[Value]]:
        """Evaluate `build(batch)` for each batch; yields the results in order.

        On a CPU the batches of a round are computed in parallel, one per core.

        Args:
            index: of the block that `build` calls.
            build: returns unevaluated arrays for a batch number. Calls do not overlap, as they may
                replace modules of the block.
        """
        mx.eval(self.states)
        compute = serialized_eval(build, self.blocks[index])
        return run_rounds([partial(compute, batch) for batch in range(len(self.states))])

    def watched(self, index: int, watch: Callable[[], Value]) -> Iterator[list[Value]]:
        """Run all texts through block `index`; yields the results of `watch`, called per batch.

        Raises:
            CheckpointError: when the block's output is not finite.
        """

        def build(batch: int) -> tuple[mx.array, mx.array, Value]:
            state = self.run(index, batch, self.states[batch])
            return state, mx.isfinite(state).all(), watch()

        done = 0
        for results in self.rounds(index, build):
            for state, finite, _ in results:
                if not finite.item():
                    raise CheckpointError(
                        f"{self.prefixes[index][:-1]} computes NaN or infinite values on the "
                        "calibration text: expected finite ones: its weights are damaged"
                    )
                self.states[done] = state
                done += 1
            yield [watched for _, _, watched in results]

    def advance(self, index: int) -> None:
        """Run all texts through block `index`."""
        for _ in self.watched(index, lambda: None):
            pass

    def release(self, index: int) -> None:
        """Free the weights of a block; it cannot run again before `restore`."""
        block = self.blocks[index]
        block.update(tree_map(lambda array: mx.array(0), block.parameters()))

    def restore(self, model: nn.Module) -> None:
        """Replace the model with a newly loaded copy."""
        self.model, self.blocks = model, _blocks(model)

    def finish(self, state: mx.array) -> mx.array:
        """Return the logits for the output of the last block, unevaluated."""
        with _replaced(self.blocks, lambda *call: state):
            return self.model(mx.zeros(state.shape[:2], mx.int32))

    def pieces(self, state: mx.array) -> list[mx.array]:
        """Divide the output of the last block by texts, with at most `LOGITS` logits per piece."""
        texts = max(1, LOGITS // self.finish(state[:1]).size)
        return [state[start : start + texts] for start in range(0, len(state), texts)]


def in_block_order(model: nn.Module, names: Iterable[str]) -> list[str]:
    """Return parameter names in the order in which a calibration reaches them: outer ones last.

    Raises:
        RecipeError: when the model is not built of blocks that can be called one by one.
    """
    prefixes = _prefixes(model, _blocks(model))

    def block(name: str) -> int:
        found = (index for index, prefix in enumerate(prefixes) if name.startswith(prefix))
        return next(found, len(prefixes))

    return sorted(names, key=block)


def _prefixes(model: nn.Module, blocks: list[Any]) -> list[str]:
    names = {id(module): path for path, module in model.named_modules()}
    return [f"{names[id(block)]}." for block in blocks]


def strip_prefix(prefix: str, by_path: Mapping[str, Value]) -> dict[str, Value]:
    """Return the entries whose path begins with `prefix`, by the rest of the path."""
    return {
        path.removeprefix(prefix): value
        for path, value in by_path.items()
        if path.startswith(prefix)
    }


def start_pass(
    load: Callable[[], nn.Module], tokens: np.ndarray, batch_tokens: int | None = None
) -> Pass:
    """Embed `tokens` (texts, length), and record the arguments of each block.

    Args:
        load: loads the model lazily; called twice, which frees the embedding.
        tokens: (texts, length).
        batch_tokens: tokens per batch; the default depends on the device.

    Raises:
        RecipeError: when the model is not built of blocks that can be called one by one.
    """
    run = start_pass_in_memory(load(), tokens, batch_tokens)
    mx.eval(run.states, run.calls)
    run.restore(load())
    return run


def start_pass_in_memory(
    model: nn.Module, tokens: np.ndarray, batch_tokens: int | None = None
) -> Pass:
    """Embed `tokens` and record the arguments of each block; the model stays in memory."""
    blocks = _blocks(model)
    calls: list[list[Any]] = [[] for _ in blocks]
    states: list[mx.array] = []

    def record(index: int, state: mx.array, args: tuple[Any, ...], kwargs: Any) -> mx.array:
        calls[index].append((args, kwargs))
        if index == 0:
            states.append(state)
        return state

    default = CPU_BATCH_TOKENS if mx.default_device() == mx.cpu else GPU_BATCH_TOKENS
    texts = max(1, (batch_tokens or default) // tokens.shape[1])
    try:
        with _replaced(blocks, record):
            for start in range(0, len(tokens), texts):
                model(mx.array(tokens[start : start + texts]))
    except Exception as exc:  # other architectures may raise anything
        raise RecipeError(_unsupported(model)) from exc
    if any(len(recorded) != len(states) for recorded in calls):
        raise RecipeError(_unsupported(model))
    return Pass(model=model, blocks=blocks, states=states, calls=calls)


def _blocks(model: nn.Module) -> list[Any]:
    """Return the model's own list of blocks, for changes in place."""
    layers = list(getattr(model, "layers", []))
    for module in model.modules():
        blocks = module.get("layers")
        if isinstance(blocks, list) and blocks and [*map(id, blocks)] == [*map(id, layers)]:
            return blocks
    raise RecipeError(_unsupported(model))


class _Placeholder:
    """Replacement of a block that keeps the block's attributes."""

    def __init__(self, block: Any, call: Callable[[mx.array, Any, Any], mx.array]):
        self.block = block
        self.call = call

    def __call__(self, state: mx.array, *args: Any, **kwargs: Any) -> mx.array:
        return self.call(state, args, kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.block, name)


@contextmanager
def _replaced(blocks: list[Any], call: Callable[..., mx.array]) -> Iterator[None]:
    """Call `call(index, state, args, kwargs)` in place of every block."""
    real = list(blocks)
    blocks[:] = [_Placeholder(block, partial(call, index)) for index, block in enumerate(real)]
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
    """Input of a layer in one call.

    Attributes:
        rows: (..., in); for a stack of experts one row per token and expert.
        argument: the array that the layer was called with.
        routes: (...) the expert of each row; None for a plain layer.
        experts: number of experts; 1 for a plain layer.
    """

    rows: mx.array
    argument: mx.array
    routes: mx.array | None = None
    experts: int = 1


class Tap:
    """Wrapper of a layer that records its input; see `collect_inputs`.

    Attributes:
        layer: the wrapped layer.
        inputs: input of the last call; None before the first.
        output_shape: output shape of the last call.
        shift: added to the output, to differentiate with respect to it; None adds nothing.
    """

    def __init__(self, layer: Any):
        self.layer = layer
        self.inputs: Inputs | None = None
        self.output_shape: tuple[int, ...] = ()
        self.shift: mx.array | None = None

    def __call__(self, x: mx.array, *args: Any, **kwargs: Any) -> mx.array:
        """Call the layer."""
        if is_expert_stack(self.layer):
            routes: mx.array = args[0] if args else kwargs["indices"]
            # mlx-lm's input is (..., 1, in), broadcast over the experts of a token
            rows = mx.broadcast_to(x.squeeze(-2), (*routes.shape, x.shape[-1]))
            self.inputs = Inputs(rows, x, routes, len(self.layer["weight"]))
        else:
            self.inputs = Inputs(x, x)
        y = self.layer(x, *args, **kwargs)
        self.output_shape = y.shape
        return y if self.shift is None else y + self.shift


def collect_inputs(taps: Mapping[str, Tap]) -> dict[str, Inputs]:
    """Return the recorded inputs by path, and clear them.

    Raises:
        RecipeError: when a layer was not called.
    """
    collected: dict[str, Inputs] = {}
    for path, tap in taps.items():
        if tap.inputs is None:
            raise unreached(path)
        collected[path], tap.inputs = tap.inputs, None
    return collected


def unreached(path: str) -> RecipeError:
    """Return the error for a layer that no calibration text reaches."""
    return RecipeError(
        f"no calibration text reaches {path}: use longer texts (--sequence-length) "
        f'or leave the layer unquantized with --exclude "*{path.rpartition(".")[0]}.*"'
    )


def is_expert_stack(module: Any) -> bool:
    """Return whether a module is a stack of expert matrices, called with expert indices."""
    from mlx_lm.models.switch_layers import SwitchLinear

    return isinstance(module, SwitchLinear)


class EmbeddingTap(Tap):
    """Wrapper of an embedding that is also the output head."""

    def __call__(self, x: mx.array, *args: Any, **kwargs: Any) -> mx.array:
        """Look up tokens."""
        return self.layer(x)

    def as_linear(self, x: mx.array) -> mx.array:
        """Return logits."""
        self.inputs = Inputs(x, x)
        return self.layer.as_linear(x)


@contextmanager
def tapped(
    module: nn.Module, paths: list[str], *, evaluate: bool = True
) -> Iterator[dict[str, Tap]]:
    """Replace layers of `module` with taps inside the `with` block.

    Args:
        module: a block, or a model.
        paths: of the layers.
        evaluate: evaluate their arrays, so that every thread can read them. Not needed where only
            their inputs are computed, in one thread.
    """
    layers = dict(module.named_modules())
    taps: dict[str, Tap] = {
        path: (EmbeddingTap if isinstance(layers[path], nn.Embedding) else Tap)(layers[path])
        for path in paths
    }
    for path in paths if evaluate else ():
        evaluate_arrays(layers[path])
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
