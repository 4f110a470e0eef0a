"""Predict the KL divergence that quantizing a single layer causes.

A small error D = W - W_hat of one layer changes its output by D x, and the model's log-probability
of a token drawn from the model by about g . D x, with g the gradient of that log-probability with
respect to the output. The KL divergence, to second order, is half the mean square of that change:
the Fisher information, for which the token has to be drawn from the model's own distribution
(Martens, arXiv:1412.1193, section 9.2). Roundings of different output rows are independent of each
other, so the terms between rows vanish in the mean, and a sample of rows tells the rest:

    KL ~ 1/2 sum_r mean_t (g_tr (D x_t)_r)^2     nats per token

gptq compensates rounding errors within a row. The gain depends on the layer: a fifth of the
divergence remains in SmolLM2-135M's o_proj, two fifths in its down_proj. It is measured at one
option of each layer, half on the tokens that gptq used and half on others: the former alone
overestimate it, the latter underestimate it, as a conversion uses eight times as many tokens. On
text of another kind it is smaller, so that layers count `TRANSFER` times.

At the output head the distribution itself is known, and the sum over rows is weighted by p (1 - p)
instead. An embedding adds the divergence that errors of its looked-up rows cause at the input; if
it is also the head, gptq sets the directions of these errors, so that they are not independent of
the gradients. Both sample rows as often as a text uses them: those of rare tokens are longer, in
SmolLM2-135M with 1.8 times the squared error.

In a few texts in a hundred the model is so sensitive that the gradients at one token, often the
first, are a thousand times as long as elsewhere, and the second order says nothing about a real
error. Of 256 texts that SmolLM2-135M wrote, 8 had 87 % of the mean square at its first block. The
largest of a thousand gradients is therefore clipped.

Predicted without `TRANSFER` and measured, for gptq with 4 bits on 32 texts that SmolLM2-135M wrote:
layers 0.088 and 0.091 nats, head 0.017 and 0.016, lookups 0.021 and 0.019. For rtn with 4 bits, on
2,048 tokens of WikiText-2, 0.30 and 0.38: there the second order no longer suffices.

Errors also route tokens to other experts, which gradients do not show. For three mixtures of about
a million parameters with 8 experts, 2 of them active (Qwen3, Mixtral, Qwen2 with a shared one),
auto at 4.5 bits/weight, on their own text: predicted without `TRANSFER` 0.0026, 0.00087 and
0.00078; measured with the original's routing 0.0029, 0.00071 and 0.00083, with their own 0.0092,
0.0024 and 0.0021. From 10 to 20 % of tokens change an expert.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from itertools import chain
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from splitquant_mlx.calibration.blocks import (
    Pass,
    Tap,
    collect_inputs,
    start_pass,
    strip_prefix,
    tapped,
    unreached,
)
from splitquant_mlx.calibration.layer_divergence import (
    Option,
    as_rows,
    clip_outliers,
    divergences,
    embedding_divergences,
    layer_divergences,
    measure,
    middle_of,
    sample_positions,
    some_rows,
    stack_divergences,
)
from splitquant_mlx.calibration.saved_state import SavedState
from splitquant_mlx.progress import MEASURING, Advance, Progress
from splitquant_mlx.runtime.cores import run_parallel, run_rounds, serialized_eval

Options = Mapping[str, Sequence[Option]]
METHOD = 9  # version of the prediction, for its cache


def predict_divergence(
    load: Callable[[], nn.Module],
    tokens: np.ndarray,
    options: Options,
    *,
    seed: int,
    progress: Progress,
    saved_state: SavedState,
) -> dict[str, dict[Option, float]]:
    """Return the predicted KL divergence, nats per token, of each layer alone at each option.

    One block's weights are in memory at a time; the states between blocks are in files.

    Args:
        load: loads one of mlx-lm's models, unquantized, lazily.
        tokens: texts (texts, length) to predict on.
        options: bits and group sizes, by the path of a linear layer, head or embedding.
        seed: of the tokens sampled for the gradients.
        progress: progress reporter.
        saved_state: state of an interrupted call, to resume from; removed at the end.

    Raises:
        RecipeError: when the model is not built of blocks that can be called one by one.
    """
    run = start_pass(load, tokens)
    prefixes = run.prefixes
    outer = [path for path in options if not path.startswith(tuple(prefixes))]
    steps = 2 * len(prefixes) + 1
    mx.eval(looked_up := _joined(run.states)[sample_positions(tokens.size)])
    with progress.task(MEASURING, steps) as advance:
        if (state := _load_state(saved_state)) is None:
            _forward(run, saved_state, advance)
            state = _head_sensitivity(run, outer, options, seed, tokens)
            saved_state.save("embedding-error", state.embedding_error)
            _save_state(saved_state, state)
            advance(1)
        else:
            progress.note(f"Resuming: {steps - state.blocks} of {steps} steps done")
            advance(steps - state.blocks)
        predicted, gradients = state.predicted, state.gradients
        run.restore(load())
        for index in reversed(range(state.blocks)):
            run.states = saved_state.load(f"states-{index}") or []
            prefix = prefixes[index]
            of_block, gradients = _block_sensitivities(
                run, index, strip_prefix(prefix, options), gradients, advance
            )
            run.release(index)
            predicted.update({prefix + path: values for path, values in of_block.items()})
            _save_state(saved_state, state._replace(gradients=gradients, blocks=index))
        for path in outer:
            module = dict(run.model.named_modules())[path]
            if isinstance(module, nn.Embedding):
                error = state.embedding_error if predicted[path] else []
                lookup = _lookup(_rows(module, tokens), looked_up, gradients, options[path], error)
                predicted[path] = {o: kl + predicted[path].get(o, 0.0) for o, kl in lookup.items()}
    saved_state.remove()
    if missing := next((path for path in options if not predicted[path]), None):
        raise unreached(missing)
    return {path: predicted[path] for path in options}


def _forward(run: Pass, saved_state: SavedState, advance: Advance) -> None:
    """Run all texts through all blocks, and save the input states of each block."""
    for index in range(len(run.blocks)):
        saved = saved_state.load(f"states-{index}")
        if saved is None or index == 0:
            saved_state.save(f"states-{index}", run.states)
        else:
            run.states = saved
        if saved_state.load(f"states-{index + 1}") is None:
            run.advance(index)
        run.release(index)
        advance(1)


def to_json(predicted: Mapping[str, Mapping[Option, float]]) -> Any:
    """Return predicted divergences as JSON values."""
    return {path: [[*option, kl] for option, kl in of.items()] for path, of in predicted.items()}


def from_json(values: Any) -> dict[str, dict[Option, float]]:
    """Undo `to_json`. Raises TypeError or ValueError for anything else."""
    return {path: {(bits, size): kl for bits, size, kl in of} for path, of in dict(values).items()}


class _State(NamedTuple):
    """State of the backward pass.

    Attributes:
        predicted: divergences so far.
        embedding_error: gptq's error of a head's rows at `sample_positions`; none if too few.
        gradients: at the input of the last block visited, per batch.
        blocks: number of blocks not visited yet.
    """

    predicted: dict[str, dict[Option, float]]
    embedding_error: list[mx.array]
    gradients: list[mx.array]
    blocks: int


def _save_state(saved_state: SavedState, state: _State) -> None:
    saved_state.save(f"gradients-{state.blocks}", state.gradients)
    saved_state.save_json({"blocks": state.blocks, "predicted": to_json(state.predicted)})
    saved_state.delete(f"gradients-{state.blocks + 1}")
    saved_state.delete(f"states-{state.blocks}")


def _load_state(saved_state: SavedState) -> _State | None:
    with suppress(TypeError, ValueError, KeyError):
        values = saved_state.load_json()
        predicted, blocks = from_json(values["predicted"]), int(values["blocks"])
        if gradients := saved_state.load(f"gradients-{blocks}"):
            error = saved_state.load("embedding-error") or []
            return _State(predicted, error, gradients, blocks)
    return None


def _block_sensitivities(
    run: Pass, index: int, options: Options, gradients: list[mx.array], advance: Advance
) -> tuple[dict[str, dict[Option, float]], list[mx.array]]:
    """Return the divergences of a block's layers, and the gradients at its input.

    `advance` is called for 1 step in all: half for the gradients, half for the layers.
    """
    block = run.blocks[index]
    inputs: dict[str, list[mx.array]] = {path: [] for path in options}
    output_gradients: dict[str, list[mx.array]] = {path: [] for path in options}
    routes: dict[str, list[np.ndarray]] = {}
    input_gradients = []
    mx.eval(gradients)  # may be in a file
    with tapped(block, list(options)) as taps:
        for steps in run.rounds(index, partial(_backward, run, index, taps, gradients)):
            for step in steps:
                input_gradients.append(step.gradient)
                for path, x, g in zip(options, step.inputs, step.output_gradients, strict=True):
                    inputs[path].append(x)
                    output_gradients[path].append(g)
                for path, chosen in step.routes.items():
                    routes.setdefault(path, []).append(np.array(chosen).reshape(-1))
                advance(0.5 / len(gradients))
    tokens = sum(state.shape[0] * state.shape[1] for state in run.states)
    modules = dict(block.named_modules())

    def of_layer(path: str) -> dict[Option, float]:
        x, g = _joined(inputs.pop(path)), clip_outliers(_joined(output_gradients.pop(path)))
        w = modules[path]["weight"]  # a stack is converted to float32 expert by expert
        if path in routes:
            experts = np.concatenate(routes[path])
            return stack_divergences(w, x, g, experts, options[path], tokens)
        return layer_divergences(w.astype(mx.float32), x, g, options[path])

    # the largest first, so that no core waits for it at the end
    paths = sorted(options, key=lambda path: -modules[path]["weight"].size)
    results = run_parallel([partial(of_layer, path) for path in paths])
    advance(0.5)
    return dict(zip(paths, results, strict=True)), input_gradients


class _Backward(NamedTuple):
    """Result of a block's backward pass for a batch.

    Attributes:
        gradient: at the input of the block.
        inputs: of each layer.
        output_gradients: at `some_rows` of the output of each layer.
        routes: experts of each row, by path of a stack.
    """

    gradient: mx.array
    inputs: list[mx.array]
    output_gradients: list[mx.array]
    routes: dict[str, mx.array]


def _backward(
    run: Pass, index: int, taps: Mapping[str, Tap], gradients: list[mx.array], batch: int
) -> _Backward:
    """Differentiate block `index` for a batch; the result is unevaluated."""
    state = run.states[batch]

    def forward(state: mx.array, *shifts: mx.array) -> list[mx.array]:
        for tap, shift in zip(taps.values(), shifts, strict=True):
            tap.shift = shift
        output = run.run(index, batch, state)
        return [output, *(inputs.rows for inputs in collect_inputs(taps).values())]

    for tap in taps.values():
        tap.shift = None
    run.run(index, batch, state)  # for the shapes and routes
    shifts = [mx.zeros(tap.output_shape, state.dtype) for tap in taps.values()]
    recorded = collect_inputs(taps)
    # layer inputs are outputs of `forward`, too, with a cotangent of zero
    zeros = [mx.zeros_like(inputs.rows) for inputs in recorded.values()]
    outputs, (gradient, *shifted) = mx.vjp(forward, [state, *shifts], [gradients[batch], *zeros])
    routes = {path: x.routes for path, x in recorded.items() if x.routes is not None}
    return _Backward(gradient, outputs[1:], [some_rows(g, -1) for g in shifted], routes)


def _head_sensitivity(
    run: Pass, outer: list[str], options: Options, seed: int, tokens: np.ndarray
) -> _State:
    """Sample tokens; return the head's divergences and the gradients at the head's input."""
    gradients, inputs, variances = [], [], []
    embedding_error: list[mx.array] = []
    modules = dict(run.model.named_modules())
    linear = [path for path in outer if isinstance(modules[path], nn.Linear)]
    heads = (linear or outer)[:1]  # an embedding is the head where there is no other
    key = mx.random.key(seed)
    mx.eval(run.finish(run.states[0][:1, :1]))  # loads the weights after the blocks
    with tapped(run.model, heads) as taps:

        def of_sampled(state: mx.array, key: mx.array) -> tuple[mx.array, mx.array, list[mx.array]]:
            """Return a sum whose gradient is that of the sampled tokens' log-probabilities."""
            logits = run.finish(state).astype(mx.float32)
            p = mx.softmax(mx.stop_gradient(logits), axis=-1)
            sampled = _sample(p, key)
            chosen = mx.take_along_axis(logits, sampled[..., None], axis=-1).sum()
            rows = [inputs.rows for inputs in collect_inputs(taps).values()]
            return chosen - (p * logits).sum(), (1 - mx.square(p).sum(-1)).mean(), rows

        differentiate = serialized_eval(mx.value_and_grad(of_sampled))
        for state in run.states:
            pieces = run.pieces(state)
            key, *keys = mx.random.split(key, len(pieces) + 1)
            mx.eval(pieces, keys)
            calls = [partial(differentiate, *pair) for pair in zip(pieces, keys, strict=True)]
            of_state = []
            for (_, variance, rows), gradient in chain.from_iterable(run_rounds(calls)):
                of_state.append(gradient)
                variances += [variance.item()] * len(gradient)
                inputs += [as_rows(x) for x in rows]
            gradients.append(mx.concatenate(of_state))
    predicted: dict[str, dict[Option, float]] = {path: {} for path in outer}
    for path in heads:
        x, weight = mx.concatenate(inputs), sum(variances) / len(variances) / 2
        rows = _rows(modules[path], tokens)  # as often as a text uses them
        measured = measure(rows, x, mx.ones((len(x), 1)), middle_of(options[path]))
        embedding_error = [] if measured.error is None else [measured.error]
        weight *= measured.lower / (measured.fitted or 1.0)
        predicted[path] = divergences(
            rows,
            mx.square(x).mean(0),
            options[path],
            lambda error, x=x, weight=weight: weight * mx.square(x @ error.T).mean(),
        )
    return _State(predicted, embedding_error, gradients, len(run.blocks))


def _lookup(
    rows: mx.array,
    looked_up: mx.array,
    gradients: list[mx.array],
    options: Sequence[Option],
    error: list[mx.array],
) -> dict[Option, float]:
    """Return the divergence of an embedding's `rows` as they are looked up, scaled as by Gemma."""
    scale = (looked_up * rows).sum() / mx.square(rows).sum()
    return embedding_divergences(rows, scale * _joined(gradients), options, *error)


def _joined(batches: list[mx.array]) -> mx.array:
    """Return arrays (..., width) of all batches as float32 rows (n, width)."""
    return mx.concatenate([*map(as_rows, batches)])


def _sample(p: mx.array, key: mx.array) -> mx.array:
    """Sample from probabilities (..., vocabulary) by their sums, with one random number for each.

    On a CPU mlx's categorical takes several times as long: it draws one per token of the
    vocabulary.
    """
    sums = mx.cumsum(p, axis=-1)
    points = mx.random.uniform(shape=p.shape[:-1], key=key)[..., None] * sums[..., -1:]
    return mx.minimum((sums <= points).sum(-1), p.shape[-1] - 1)


def _rows(module: nn.Module, tokens: np.ndarray) -> mx.array:
    """Return a weight's rows of the tokens at `sample_positions`, float32."""
    sampled = tokens.ravel()[sample_positions(tokens.size)]
    return module["weight"][mx.array(sampled)].astype(mx.float32)
