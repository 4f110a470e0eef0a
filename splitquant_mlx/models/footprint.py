"""Estimate, from headers alone, the memory that a model takes while it runs."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from splitquant_mlx.errors import RecipeError
from splitquant_mlx.models.checkpoint import read_config, read_headers
from splitquant_mlx.models.config import text_settings
from splitquant_mlx.runtime.memory import check_memory

PROGRAM_BYTES = 300e6  # Python and its libraries
WIDENED = ("F16", "BF16")  # on the CPU, to float32
CONTEXT_TOKENS = 4096  # that a cache is counted for, or the model's own limit


def weight_bytes(path: Path) -> int:
    """Return the size of a model's tensors, as they are stored.

    Raises:
        CheckpointError: when `path` is no usable model directory or .gguf file.
    """
    return path.stat().st_size if path.is_file() else sum(_sizes(path, widened=False))


def running_bytes(path: Path) -> int:
    """Estimate the memory that a model directory or .gguf file takes to generate text.

    Weights as they are on the device, a KV cache of up to 4,096 tokens, and the program.

    Raises:
        CheckpointError: when `path` is no usable model directory or .gguf file.
    """
    on_cpu = mx.default_device() == mx.cpu
    if path.is_file():
        return int(sum(tensor_sizes(path).values()) * (4 if on_cpu else 2) + PROGRAM_BYTES)
    config = read_config(path)
    return int(sum(_sizes(path, widened=on_cpu)) + _cache_bytes(config, on_cpu) + PROGRAM_BYTES)


def check_running(path: Path, work: str) -> str:
    """Refuse to load a model that memory is too small for; see `check_memory`.

    Raises:
        MemoryTooSmallError: with what would fit.
        CheckpointError: when `path` is no usable model.
    """
    needed = running_bytes(path)
    advice = "choose a smaller model, or fewer bits/weight"
    if is_dense(path):
        four_bit = (sum(tensor_sizes(path).values()) * 4.5 / 8 + PROGRAM_BYTES) / 1e9
        advice = f"converted to 4.5 bits/weight it takes about {four_bit:.1f} GB"
    return check_memory(needed, work, advice)


def tensor_sizes(path: Path) -> dict[str, int]:
    """Return the entries of each tensor of a model directory or .gguf file, by name."""
    if path.is_dir():
        return {name: math.prod(header.shape) for name, header in read_headers(path).items()}
    from splitquant_mlx.formats.gguf import open_gguf

    return {name: math.prod(tensor.shape) for name, tensor in open_gguf(path).tensors.items()}


def is_dense(path: Path) -> bool:
    """Return whether a directory holds a model that is not quantized."""
    if path.is_file():
        return False
    config = read_config(path)
    return not any(config.get(key) for key in ("quantization", "quantization_config", "splitquant"))


def context_limit(config: Mapping[str, Any]) -> int | None:
    """Return how many tokens a model was made for; None where its config does not say."""
    text = config.get("text_config")
    for table in (config, text if isinstance(text, Mapping) else {}):
        for key in ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length"):
            if type(limit := table.get(key)) is int and limit > 0:
                return limit
    return None


def context_length(model: nn.Module) -> int | None:
    """Return how many tokens a loaded model was made for; None where its settings do not say."""
    return context_limit(getattr(getattr(model, "args", None), "__dict__", {}))


def check_context(name: str, asked: int, limit: int | None) -> None:
    """Raise RecipeError when setting `name` asks for more tokens than a model was made for."""
    if limit is not None and asked > limit:
        raise RecipeError(
            f"{name}: expected at most {limit}, what the model was made for "
            f"(max_position_embeddings), got {asked}"
        )


def context_bytes(model: nn.Module, tokens: int) -> float:
    """Return the size of the caches of a context, in 16 bits, on a machine with a GPU.

    The model is called with one token, and nothing is evaluated: the caches' shapes tell.

    Args:
        model: one of mlx-lm's; its parameters are not read.
        tokens: of the context.
    """
    from mlx_lm.models.cache import make_prompt_cache

    caches = make_prompt_cache(model)
    model(mx.zeros((1, 1), mx.int32), cache=caches)
    return 2.0 * sum(_cached_entries(cache, tokens) for cache in caches)


def _cached_entries(cache: Any, tokens: int) -> int:
    """Return the entries that a cache with one token has when it holds `tokens`."""
    if hasattr(cache, "caches"):
        return sum(_cached_entries(part, tokens) for part in cache.caches)
    arrays = [leaf for _, leaf in tree_flatten(cache.state) if isinstance(leaf, mx.array)]
    if not hasattr(cache, "offset"):  # a state of fixed size
        return sum(array.size for array in arrays)
    # (1, heads, positions, width), with room for more positions than one
    entries = sum(array.size // array.shape[2] for array in arrays)
    return entries * min(tokens, getattr(cache, "max_size", None) or tokens)


def _sizes(path: Path, *, widened: bool) -> list[int]:
    return [
        header.nbytes * (2 if widened and header.dtype in WIDENED else 1)
        for header in read_headers(path).values()
    ]


def _cache_bytes(config: dict[str, Any], on_cpu: bool) -> float:
    """Return the size of a KV cache of a usual length, as for a plain decoder."""
    table = text_settings(config)
    try:
        heads = int(table.get("num_key_value_heads") or table["num_attention_heads"])
        width = table.get("head_dim") or table["hidden_size"] / table["num_attention_heads"]
        layers = int(table["num_hidden_layers"])
    except (KeyError, TypeError, ValueError, ZeroDivisionError):
        return 0
    tokens = min(context_limit(config) or CONTEXT_TOKENS, CONTEXT_TOKENS)
    return 2 * layers * heads * float(width) * tokens * (4 if on_cpu else 2)
