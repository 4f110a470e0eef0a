"""Rename the tensors of a checkpoint to the parameter names of mlx-lm's model.

`sanitize` of mlx-lm's model handles the names that the architecture was published with. The same
weights are also saved under other prefixes: `_orig_mod.` by torch.compile, `module.` by data
parallel training, none by a base model without its head, `model.language_model.` by newer releases
of transformers. If the names do not match, each prefix of numbered layers is replaced by the
model's.
"""

import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from splitquant_mlx.errors import CheckpointError, abbreviate, one_line
from splitquant_mlx.models.architecture import parameters

# wrapper modules of training, anywhere in a name
WRAPPERS = re.compile(
    r"(?<![^.])(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.|^module\."
)
NUMBERED = re.compile(r"((?:[^.]+\.)*?)[^.]+\.\d+\.")  # prefix, container, number
HEAD = re.compile(r"((?:.*\.)?)lm_head\..+")
SHARED = re.compile(r"self_attn\.(k|v)_(proj|norm)\.")
ROTARY = "rotary_emb.inv_freq"
ADAPTER = re.compile(r"\.lora_[AB]\.|\.lora_[ab]$")


def fit_names(
    path: object, tensors: dict[str, mx.array], build: Callable[[], nn.Module]
) -> tuple[nn.Module, dict[str, mx.array]]:
    """Return a model, and the tensors in its names and layouts.

    Args:
        path: the checkpoint, for messages.
        tensors: the stored tensors, by their stored names.
        build: builds mlx-lm's model; called per attempt, since `sanitize` may change the model.

    Raises:
        CheckpointError: when no renaming gives exactly the model's parameters.
    """
    # a buffer computed from config.json, which older releases of transformers stored
    tensors = {n: tensor for n, tensor in tensors.items() if not n.endswith(ROTARY)}
    attempts = []
    for renamed in _namings(tensors, parameters(build())):
        model = build()
        fitted, problem = _sanitize(model, renamed)
        expected = parameters(model)
        fitted = {n: w for n, w in fitted.items() if n in expected or not _is_zero_bias(n, w)}
        differing = expected.keys() ^ fitted.keys()
        if not differing:
            return model, fitted
        attempts.append((len(differing), len(attempts), expected, fitted, problem))
    _, _, expected, fitted, problem = min(attempts)
    raise CheckpointError(f"{path}: {_explain(tensors, expected, fitted, problem)}")


def _is_zero_bias(name: str, tensor: mx.array) -> bool:
    """Return whether a tensor is a bias of zeros, which AutoGPTQ stores for every layer."""
    return name.endswith(".bias") and not tensor.any().item()


def _sanitize(model: nn.Module, tensors: dict[str, mx.array]) -> tuple[dict[str, mx.array], str]:
    """Return the result of mlx-lm's `sanitize`, or {} and the error."""
    sanitize: Any = getattr(model, "sanitize", dict)
    try:
        return sanitize(dict(tensors)), ""
    except Exception as exc:  # sanitize indexes tensors by name and shape without checks
        return {}, f"{type(exc).__name__}: {one_line(exc)}"


def _namings(
    tensors: Mapping[str, mx.array], expected: Mapping[str, mx.array]
) -> Iterator[dict[str, mx.array]]:
    """Yield the tensors under their stored names, then under names with other prefixes."""
    yield dict(tensors)
    bare = {WRAPPERS.sub("", name): tensor for name, tensor in tensors.items()}
    if len(bare) < len(tensors):  # two names became equal
        return
    if bare.keys() != tensors.keys():
        yield bare
    prefixes = Counter(match[1] for name in expected if (match := NUMBERED.match(name)))
    heads = {match[1] for name in expected if (match := HEAD.fullmatch(name))}
    if not prefixes:
        return
    (new, _), *_ = prefixes.most_common(1)
    head = next(iter(heads), "")
    for old in dict.fromkeys(match[1] for name in bare if (match := NUMBERED.match(name))):
        # some architectures with a prefix in mlx-lm expect none in sanitize, such as GPT-2;
        # transformers puts `model.` before vision and audio modules
        for prefix, outer in (("", ""), (new, ""), (new, "model.")):
            names = [_rename(name, old, prefix, head, outer) for name in bare]
            if len(set(names)) == len(names):
                yield dict(zip(names, bare.values(), strict=True))


def _rename(name: str, old: str, new: str, head: str, outer: str) -> str:
    if match := HEAD.fullmatch(name):
        return head + name.removeprefix(match[1])
    return new + name[len(old) :] if name.startswith(old) else name.removeprefix(outer)


def _explain(
    tensors: Mapping[str, mx.array],
    expected: Mapping[str, mx.array],
    fitted: Mapping[str, mx.array],
    problem: str,
) -> str:
    """Explain why the tensors do not match the model."""
    if any(ADAPTER.search(name) for name in tensors):
        return "this is an adapter, not a complete model: fuse it into its base model first"
    if problem or not expected.keys() & fitted.keys():
        detail = f" (mlx-lm: {problem})" if problem else ""
        return (
            f"the tensor names are not those of this architecture: expected names "
            f"such as {abbreviate(expected, 2)}, got {abbreviate(tensors, 2)}{detail}"
        )
    missing, extra = expected.keys() - fitted.keys(), fitted.keys() - expected.keys()
    if missing and not extra and all(SHARED.search(name) for name in missing):
        return (
            "the model was saved without the projections of layers that share keys and values, "
            f"which mlx-lm's class requires ({abbreviate(missing)}): convert the original "
            "checkpoint"
        )
    if all(HEAD.fullmatch(name) for name in missing) and not extra:
        return (
            f"missing tensors: {abbreviate(missing)}: the model was saved without its output head, "
            'and config.json does not say "tie_word_embeddings": true'
        )
    kind, names = ("missing", missing) if missing else ("extra", extra)
    return (
        f"{kind} tensors: {abbreviate(names)}: expected {len(expected)} tensors by config.json, "
        f"got {len(tensors)}: one of the two is from another model, or incomplete"
    )
