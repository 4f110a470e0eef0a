"""Shard a lazily loaded model among the ranks of a group.

The models define how: mlx-lm's `shard` gives each rank some of the heads and of the inner width of
every layer, its `pipeline` gives each some of the layers. Split layers support `shard`; see
`split_model_file.Sharded`.
"""

from pathlib import Path
from types import TracebackType
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from splitquant_mlx.errors import RecipeError, one_line
from splitquant_mlx.models.config import settings_tables
from splitquant_mlx.runtime.ranks import Group


def divide(
    model: nn.Module, config: dict[str, Any], group: Group, *, pipeline: bool, path: Path
) -> None:
    """Reduce `model`, whose parameters are unread, to the part that this rank computes.

    Args:
        model: an mlx-lm model.
        config: its config.json.
        group: the ranks.
        pipeline: assign whole layers to each rank, instead of a part of every layer.
        path: the checkpoint, for messages.

    Raises:
        RecipeError: when mlx-lm cannot shard this model this way, or among that many ranks.
    """
    size = group.size()
    refusal = f"{path} cannot be divided among {size} ranks"
    inner: Any = getattr(model, "model", None)
    method = getattr(inner, "pipeline", None) if pipeline else getattr(model, "shard", None)
    if method is None:
        how = "in a pipeline" if pipeline else "by shard"
        raise RecipeError(f"{refusal}: mlx-lm has no way to divide a {config['model_type']} {how}")
    if not pipeline:
        _check_heads(config, size, refusal)
    paths = {id(module): name for name, module in model.named_modules()}
    try:
        method(group)
        model(mx.array([[0]]))  # checks the shapes, without evaluation
    except Exception as exc:  # of any class, also AssertionError
        why = _layer_in(exc.__traceback__, paths) or f"{type(exc).__name__}: {one_line(exc)}"
        raise RecipeError(f"{refusal}: {why}") from exc


def _check_heads(config: dict[str, Any], size: int, refusal: str) -> None:
    """Refuse numbers of heads that mlx-lm would round down; some models repeat KV heads."""
    for table in settings_tables(config):
        for name in ("num_attention_heads", "num_key_value_heads"):
            count = table.get(name)
            repeats = name == "num_key_value_heads" and count and not size % count
            if isinstance(count, int) and count % size and not repeats:
                raise RecipeError(f"{refusal}: {size} does not divide its {count} {name}")


def _layer_in(trace: TracebackType | None, paths: dict[int, str]) -> str:
    """Describe the layer whose sharding failed, which is `module` in a frame of mlx; else ""."""
    while trace is not None:
        layer: Any = trace.tb_frame.f_locals.get("module")
        if id(layer) in paths and "weight" in layer:
            outputs, inputs = layer.weight.shape[-2:]
            groups, advice = "", "use another number of ranks"
            if "scales" in layer:
                inputs = inputs * 32 // layer.bits // getattr(layer, "clusters", 1)
                groups = f" in groups of {layer.group_size}"
                advice += ", or convert it with a smaller group size"
            sizes = f"{inputs} inputs{groups}, {outputs} outputs"
            return f"{paths[id(layer)]} ({sizes}) does not divide: {advice}"
        trace = trace.tb_next
    return ""
