"""Predict how far a model moves from itself when one of its layers is quantized.

A small error D = W - W_hat of one layer changes its output by D x, and the model's log-probability
of a token drawn from the model by about g . D x, with g the gradient of that log-probability with
respect to the output. The KL divergence, to second order, is half the mean square of that change:
the Fisher information, for which the token has to be drawn from the model's own distribution
(Martens, arXiv:1412.1193, section 9.2). Roundings of different output rows are independent of each
other, so the terms between rows vanish in the mean, and a sample of rows tells the rest:

    KL ~ 1/2 sum_r mean_t (g_tr (D x_t)_r)^2     nats a token

gptq compensates rounding errors within a row, from which some layers gain more than others: a fifth
of the divergence is left in SmolLM2-135M's o_proj, two fifths in its down_proj. The gain is
measured for one option of each layer, half on tokens that it is compensated on and half on others:
with the former alone it is too large, with the latter too small, as a conversion sees eight times
as many. Where the head is the embedding, too, compensation leaves less of the head's divergence
(0.46 in SmolLM2-135M) and raises the errors of the rows that are looked up (1.4).

At the output head the distribution itself is at hand, and the sum over rows is weighted by
p (1 - p) instead. An embedding that is looked up adds what its rows' errors do at the input. Both
look at rows as often as they are used: those of rare tokens are longer, in SmolLM2-135M with 1.8
times the squared error of those of a text.

On SmolLM2-135M and 2,048 tokens of WikiText-2, predicted and found: all layers gptq 4-bit 0.070 and
0.077 nats, rtn 4-bit 0.30 and 0.38, where the second order is no longer enough.

Errors also send tokens to other experts, by jumps that gradients do not see. Of three mixtures of
about a million parameters, 8 experts of which 2 are active (Qwen3, Mixtral, Qwen2 with a shared
one), auto at 4.5 bits/weight, on text of their own: predicted 0.0026, 0.00087 and 0.00078; found
with each token kept at the original's experts 0.0029, 0.00071 and 0.00083, without that 0.0092,
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

from splitquant_mlx.calibration.blocks import Pass, Tap, below, start_pass, taken, tapped, unreached
from splitquant_mlx.calibration.layer_divergence import (
    Option,
    as_rows,
    compensated,
    divergences,
    embedding_divergences,
    layer_divergences,
    over_alike,
    some_rows,
    stack_divergences,
    used_rows,
)
from splitquant_mlx.calibration.unfinished import Unfinished
from splitquant_mlx.progress import Advance, Progress
from splitquant_mlx.runtime.cores import evaluated, in_rounds, side_by_side

Options = Mapping[str, Sequence[Option]]
METHOD = 7  # counts changes of what is predicted, for caches of it


def predict_divergence(
    load: Callable[[], nn.Module],
    tokens: np.ndarray,
    options: Options,
    *,
    seed: int,
    progress: Progress,
    unfinished: Unfinished,
) -> dict[str, dict[Option, float]]:
    """Return the predicted KL divergence, nats a token, of each layer alone at each option.

    One block's weights are in memory at a time; the states between blocks are in a file each.

    Args:
        load: loads one of mlx-lm's models, unquantized and unread.
        tokens: (texts, length) to predict on.
        options: by the path of a linear layer, head or embedding.
        seed: of the tokens drawn for the gradients.
        progress: progress reporter.
        unfinished: where an interrupted call left off, this one goes on; it is emptied at the end.

    Raises:
        RecipeError: when the model is not built of blocks that can be called one by one.
    """
    run = start_pass(load, tokens)
    prefixes = run.prefixes
    outer = [path for path in options if not path.startswith(tuple(prefixes))]
    steps = 2 * len(prefixes) + 1
    with progress.task("Measuring sensitivities", steps) as advance:
        if (way := _resumed(unfinished)) is None:
            _go_forward(run, unfinished, advance)
            way = _head_sensitivity(run, outer, options, seed)
            _save(unfinished, way)
            advance(1)
        else:
            progress.note(f"Resuming: {steps - way.left} of {steps} steps done")
            advance(steps - way.left)
        found, gradients = way.found, way.gradients
        run.restore(load())
        for index in reversed(range(way.left)):
            run.states = unfinished.arrays(f"states-{index}") or []
            prefix = prefixes[index]
            own = below(prefix, options)
            predicted, gradients = _block_sensitivities(run, index, own, gradients, advance)
            run.release(index)
            found.update({prefix + path: values for path, values in predicted.items()})
            _save(unfinished, way._replace(gradients=gradients, left=index))
        for path in outer:
            if isinstance(dict(run.model.named_modules())[path], nn.Embedding):
                rows = used_rows(block_weight(run.model, path), tokens)
                looked_up = embedding_divergences(rows, options[path], gradients)
                raised = way.raised if found[path] else 1.0
                for option, value in looked_up.items():
                    found[path][option] = found[path].get(option, 0.0) + raised * value
    unfinished.remove()
    if left_out := next((path for path in options if not found[path]), None):
        raise unreached(left_out)
    return {path: found[path] for path in options}


def _go_forward(run: Pass, unfinished: Unfinished, advance: Advance) -> None:
    """Take all texts through all blocks, and keep the states before each."""
    for index in range(len(run.blocks)):
        kept = unfinished.arrays(f"states-{index}")
        if kept is None or index == 0:
            unfinished.keep(f"states-{index}", run.states)
        else:
            run.states = kept
        if unfinished.arrays(f"states-{index + 1}") is None:
            run.advance(index)
        run.release(index)
        advance(1)


def to_json(found: Mapping[str, Mapping[Option, float]]) -> Any:
    """Return what was predicted as JSON values."""
    return {path: [[*option, kl] for option, kl in of.items()] for path, of in found.items()}


def from_json(listed: Any) -> dict[str, dict[Option, float]]:
    """Undo `to_json`. Raises TypeError or ValueError for anything else."""
    return {path: {(bits, size): kl for bits, size, kl in of} for path, of in dict(listed).items()}


class _Way(NamedTuple):
    """How far the way back through the blocks was gone.

    Attributes:
        found: divergences so far.
        raised: what compensating a tied head's errors does to the squared errors of its rows.
        gradients: before the block that was gone through last, a batch each.
        left: blocks that are left.
    """

    found: dict[str, dict[Option, float]]
    raised: float
    gradients: list[mx.array]
    left: int


def _save(unfinished: Unfinished, way: _Way) -> None:
    unfinished.keep(f"gradients-{way.left}", way.gradients)
    unfinished.note({"left": way.left, "raised": way.raised, "found": to_json(way.found)})
    unfinished.drop(f"gradients-{way.left + 1}")
    unfinished.drop(f"states-{way.left}")


def _resumed(unfinished: Unfinished) -> _Way | None:
    with suppress(TypeError, ValueError, KeyError):
        noted = unfinished.findings()
        found, left = from_json(noted["found"]), int(noted["left"])
        if gradients := unfinished.arrays(f"gradients-{left}"):
            return _Way(found, float(noted["raised"]), gradients, left)
    return None


def _block_sensitivities(
    run: Pass, index: int, options: Options, gradients: list[mx.array], advance: Advance
) -> tuple[dict[str, dict[Option, float]], list[mx.array]]:
    """Go back through a block: its layers' divergences, and the gradients at its input.

    `advance` comes to 1: half of it for the gradients, half for the layers.
    """
    block = run.blocks[index]
    fed: dict[str, list[mx.array]] = {path: [] for path in options}
    back: dict[str, list[mx.array]] = {path: [] for path in options}
    routes: dict[str, list[np.ndarray]] = {}
    before = []
    mx.eval(gradients)  # which may be in a file
    with tapped(block, list(options)) as taps:
        for steps in run.rounds(index, partial(_step_back, run, index, taps, gradients)):
            for step in steps:
                before.append(step.into)
                for path, x, g in zip(options, step.fed, step.shifted, strict=True):
                    fed[path].append(x)
                    back[path].append(g)
                for path, chosen in step.routes.items():
                    routes.setdefault(path, []).append(np.array(chosen).reshape(-1))
                advance(0.5 / len(gradients))
    tokens = sum(state.shape[0] * state.shape[1] for state in run.states)
    modules = dict(block.named_modules())

    def of_layer(path: str) -> dict[Option, float]:
        x, g = (mx.concatenate([*map(as_rows, of.pop(path))]) for of in (fed, back))
        w = modules[path]["weight"]  # of a stack, which is not widened all at once
        if path in routes:
            experts = np.concatenate(routes[path])
            return stack_divergences(w, x, g, experts, options[path], tokens)
        return layer_divergences(w.astype(mx.float32), x, g, options[path])

    # the largest first, or a core would wait for it at the end
    paths = sorted(options, key=lambda path: -modules[path]["weight"].size)
    found = dict(zip(paths, side_by_side([partial(of_layer, path) for path in paths]), strict=True))
    advance(0.5)
    return found, before


class _StepBack(NamedTuple):
    """A batch on its way back through a block.

    Attributes:
        into: gradients at the input of the block.
        fed: inputs of each layer.
        shifted: gradients at `some_rows` of the output of each layer.
        routes: of stacks of experts, by path.
    """

    into: mx.array
    fed: list[mx.array]
    shifted: list[mx.array]
    routes: dict[str, mx.array]


def _step_back(
    run: Pass, index: int, taps: Mapping[str, Tap], gradients: list[mx.array], batch: int
) -> _StepBack:
    """Return the gradients in block `index` for a batch; not evaluated yet."""
    state = run.states[batch]

    def forward(state: mx.array, *shifts: mx.array) -> list[mx.array]:
        for tap, shift in zip(taps.values(), shifts, strict=True):
            tap.shift = shift
        output = run.run(index, batch, state)
        return [output, *(seen.rows for seen in taken(taps).values())]

    for tap in taps.values():
        tap.shift = None
    run.run(index, batch, state)  # for the shapes, and where tokens are routed to
    shifts = [mx.zeros(tap.output_shape, state.dtype) for tap in taps.values()]
    seen = taken(taps)
    # the shifts are asked for their gradients; the inputs come out, but are not asked for
    unasked = [mx.zeros_like(inputs.rows) for inputs in seen.values()]
    outputs, (into, *shifted) = mx.vjp(forward, [state, *shifts], [gradients[batch], *unasked])
    routes = {path: x.routes for path, x in seen.items() if x.routes is not None}
    return _StepBack(into, outputs[1:], [some_rows(g, -1) for g in shifted], routes)


def _head_sensitivity(run: Pass, outer: list[str], options: Options, seed: int) -> _Way:
    """Draw tokens; return the divergences of the head's layer and the gradients before the head."""
    gradients, fed, spread, drawn_tokens = [], [], [], []
    raised = 1.0
    modules = dict(run.model.named_modules())
    linear = [path for path in outer if isinstance(modules[path], nn.Linear)]
    heads = (linear or outer)[:1]  # an embedding is the head where there is no other
    key = mx.random.key(seed)
    mx.eval(run.finish(run.states[0][:1, :1]))  # reads what comes after the blocks
    with tapped(run.model, heads) as taps:

        def log_probability(state: mx.array, key: mx.array) -> tuple[mx.array, mx.array, Any, Any]:
            logits = run.finish(state).astype(mx.float32)
            drawn = mx.random.categorical(mx.stop_gradient(logits), key=key)
            log_p = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
            chosen = mx.take_along_axis(log_p, drawn[..., None], axis=-1).sum()
            p = mx.exp(mx.stop_gradient(log_p))
            fed = [seen.rows for seen in taken(taps).values()]
            return chosen, (1 - mx.square(p).sum(-1)).mean(), fed, drawn

        differentiate = evaluated(mx.value_and_grad(log_probability))
        for state in run.states:
            pieces = run.pieces(state)
            key, *keys = mx.random.split(key, len(pieces) + 1)
            mx.eval(pieces, keys)
            works = [partial(differentiate, *own) for own in zip(pieces, keys, strict=True)]
            of_state = []
            for found, gradient in chain.from_iterable(in_rounds(works)):
                of_state.append(gradient)
                spread += [found[1].item()] * len(gradient)
                fed += [as_rows(x) for x in found[2]]
                drawn_tokens.append(np.array(found[3]).ravel())
            gradients.append(mx.concatenate(of_state))
    predicted: dict[str, dict[Option, float]] = {path: {} for path in outer}
    for path in heads:
        x, weight = mx.concatenate(fed), sum(spread) / len(spread) / 2
        rows = used_rows(block_weight(run.model, path), np.concatenate(drawn_tokens))
        middle = options[path][len(options[path]) // 2]
        left, error = compensated(rows, x, mx.ones((len(x), 1)), middle)
        if error is not None:
            raised = over_alike(rows, error, middle)
        weight *= left
        predicted[path] = divergences(
            rows,
            mx.square(x).mean(0),
            options[path],
            lambda error, x=x, weight=weight: weight * mx.square(x @ error.T).mean(),
        )
    return _Way(predicted, raised, gradients, len(run.blocks))


def block_weight(module: nn.Module, path: str) -> mx.array:
    """Return the weight of a layer in float32."""
    return dict(module.named_modules())[path]["weight"].astype(mx.float32)
