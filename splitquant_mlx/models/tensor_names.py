"""Give the tensors of a checkpoint the names that mlx-lm's model has for them.

`sanitize` of mlx-lm's model knows the names that the architecture was published with. The same
weights are also saved under other prefixes: `_orig_mod.` by torch.compile, `module.` by data
parallel training, none by a base model without its head, `model.language_model.` by newer releases
of transformers. Where the names do not fit, each prefix in front of numbered layers is tried as the
one that the model has there.
"""

import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from splitquant_mlx.errors import CheckpointError, one_line, some
from splitquant_mlx.models.architecture import parameters

# modules that training wraps around others, wherever they stand in a name
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
    """Return a model, and the tensors named and laid out as it wants them.

    Args:
        path: the checkpoint, for messages.
        tensors: of its files, by the files' names.
        build: makes mlx-lm's model; `sanitize` may change a model, so each naming has its own.

    Raises:
        CheckpointError: when no naming gives the model its tensors, all of them and no other.
    """
    # a buffer that follows from config.json, which older releases of transformers stored
    tensors = {n: tensor for n, tensor in tensors.items() if not n.endswith(ROTARY)}
    attempts = []
    for renamed in _namings(tensors, parameters(build())):
        model = build()
        fitted, problem = _sanitize(model, renamed)
        wanted = parameters(model)
        fitted = {n: w for n, w in fitted.items() if n in wanted or not _is_zero_bias(n, w)}
        differing = wanted.keys() ^ fitted.keys()
        if not differing:
            return model, fitted
        attempts.append((len(differing), len(attempts), wanted, fitted, problem))
    _, _, wanted, fitted, problem = min(attempts)
    raise CheckpointError(f"{path}: {_explain(tensors, wanted, fitted, problem)}")


def _is_zero_bias(name: str, tensor: mx.array) -> bool:
    """Tell whether a tensor is a bias of zeros, which AutoGPTQ stored with every layer."""
    return name.endswith(".bias") and not tensor.any().item()


def _sanitize(model: nn.Module, tensors: dict[str, mx.array]) -> tuple[dict[str, mx.array], str]:
    """Return what mlx-lm makes of the tensors, or nothing and what went wrong."""
    sanitize: Any = getattr(model, "sanitize", dict)
    try:
        return sanitize(dict(tensors)), ""
    except Exception as exc:  # mlx-lm's sanitize indexes tensors by name and shape, unguarded
        return {}, f"{type(exc).__name__}: {one_line(exc)}"


def _namings(
    tensors: Mapping[str, mx.array], wanted: Mapping[str, mx.array]
) -> Iterator[dict[str, mx.array]]:
    """Yield the tensors under their own names, then under others that the model may have."""
    yield dict(tensors)
    bare = {WRAPPERS.sub("", name): tensor for name, tensor in tensors.items()}
    if len(bare) < len(tensors):  # two names became one
        return
    if bare.keys() != tensors.keys():
        yield bare
    prefixes = Counter(match[1] for name in wanted if (match := NUMBERED.match(name)))
    heads = {match[1] for name in wanted if (match := HEAD.fullmatch(name))}
    if not prefixes:
        return
    (new, _), *_ = prefixes.most_common(1)
    head = next(iter(heads), "")
    for old in dict.fromkeys(match[1] for name in bare if (match := NUMBERED.match(name))):
        # no prefix is what sanitize expects of some architectures that have one in mlx-lm, GPT-2
        # among them; `model.` is put by transformers before the parts that see and hear
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
    wanted: Mapping[str, mx.array],
    fitted: Mapping[str, mx.array],
    problem: str,
) -> str:
    """Say why the tensors are not those of the model."""
    if any(ADAPTER.search(name) for name in tensors):
        return "this is an adapter, not a whole model: fuse it into its base model first"
    if problem or not wanted.keys() & fitted.keys():
        detail = f" (mlx-lm: {problem})" if problem else ""
        return (
            f"the tensors are not named as mlx-lm knows them of this architecture: expected names "
            f"such as {some(wanted, 2)}, got {some(tensors, 2)}{detail}"
        )
    missing, extra = wanted.keys() - fitted.keys(), fitted.keys() - wanted.keys()
    if missing and not extra and all(SHARED.search(name) for name in missing):
        return (
            "the model was saved without the keys and values of layers that take those of others, "
            f"which mlx-lm's class has ({some(missing)}): convert the makers' own checkpoint"
        )
    if all(HEAD.fullmatch(name) for name in missing) and not extra:
        return (
            f"tensors are missing: {some(missing)}: the model was saved without its output head, "
            'and config.json does not say "tie_word_embeddings": true'
        )
    problem = f"are missing: {some(missing)}" if missing else ""
    problem = problem or f"have no place in this model: {some(extra)}"
    return (
        f"tensors {problem}: the files hold {len(tensors)} tensors, config.json describes a model "
        f"of {len(wanted)}: one of the two is another model's, or a part of it"
    )
