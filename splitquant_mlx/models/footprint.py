"""Estimate the memory of a running model from the headers of its files."""

import math
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from splitquant_mlx.errors import RecipeError
from splitquant_mlx.models.config import read_config, settings_tables, text_settings
from splitquant_mlx.models.shards import read_headers
from splitquant_mlx.runtime.memory import check_memory

PROGRAM_BYTES = 300e6  # Python and its libraries
WIDENED = ("F16", "BF16")  # converted to float32 on the CPU
CONTEXT_TOKENS = 4096  # length of the KV cache, if the model's limit is not lower


def weight_bytes(path: Path) -> int:
    """Return the stored size of a model's tensors, bytes.

    Raises:
        CheckpointError: when `path` is not a usable model directory or .gguf file.
    """
    return path.stat().st_size if path.is_file() else sum(_sizes(path, widened=False))


def running_bytes(path: Path) -> int:
    """Estimate the memory for generating text with a model directory or .gguf file, bytes.

    The sum of the weights on the device, a KV cache of up to 4,096 tokens, and the program.

    Raises:
        CheckpointError: when `path` is not a usable model directory or .gguf file.
    """
    on_cpu = mx.default_device() == mx.cpu
    if path.is_file():
        return int(sum(tensor_sizes(path).values()) * (4 if on_cpu else 2) + PROGRAM_BYTES)
    config = read_config(path)
    return int(sum(_sizes(path, widened=on_cpu)) + _cache_bytes(config, on_cpu) + PROGRAM_BYTES)


def check_running(path: Path, work: str) -> str:
    """Refuse to load a model that does not fit in memory; see `check_memory`.

    Raises:
        MemoryTooSmallError: when it does not fit, with what would.
        CheckpointError: when `path` is not a usable model.
    """
    needed = running_bytes(path)
    advice = "choose a smaller model, or fewer bits/weight"
    if _is_dense(path):
        four_bit = (sum(tensor_sizes(path).values()) * 4.5 / 8 + PROGRAM_BYTES) / 1e9
        advice = f"converted to 4.5 bits/weight it needs about {four_bit:.1f} GB"
    return check_memory(needed, work, advice)


def tensor_sizes(path: Path) -> dict[str, int]:
    """Return the number of entries of each tensor of a model directory or .gguf file."""
    if path.is_dir():
        return {name: math.prod(header.shape) for name, header in read_headers(path).items()}
    from splitquant_mlx.formats.gguf import open_gguf

    return {name: math.prod(tensor.shape) for name, tensor in open_gguf(path).tensors.items()}


def _is_dense(path: Path) -> bool:
    """Return whether `path` is a directory of a model that is not quantized."""
    if path.is_file():
        return False
    config = read_config(path)
    return not any(config.get(key) for key in ("quantization", "quantization_config", "splitquant"))


def context_limit(config: dict[str, Any]) -> int | None:
    """Return a model's maximum context in tokens; None if its config does not say."""
    for table in settings_tables(config):
        for key in ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length"):
            if type(limit := table.get(key)) is int and limit > 0:
                return limit
    return None


def context_length(model: nn.Module) -> int | None:
    """Return a loaded model's maximum context in tokens; None if its settings do not say."""
    return context_limit(getattr(getattr(model, "args", None), "__dict__", {}))


def check_context(name: str, tokens: int, limit: int | None) -> None:
    """Raise RecipeError when setting `name` exceeds a model's maximum context."""
    if limit is not None and tokens > limit:
        raise RecipeError(
            f"expected at most {limit}, the model's maximum context (max_position_embeddings), "
            f"got {tokens}",
            field=name,
        )


def context_bytes(model: nn.Module, tokens: int) -> float:
    """Return the size of the 16-bit caches of a context, bytes.

    The model is called with one token, without evaluation, for the shapes of its caches.

    Args:
        model: an mlx-lm model; its parameters are not read.
        tokens: length of the context.
    """
    from mlx_lm.models.cache import make_prompt_cache

    caches = make_prompt_cache(model)
    model(mx.zeros((1, 1), mx.int32), cache=caches)
    return 2.0 * sum(_cached_entries(cache, tokens) for cache in caches)


def _cached_entries(cache: Any, tokens: int) -> int:
    """Return the number of entries of `cache`, which has one token, after `tokens`."""
    if hasattr(cache, "caches"):
        return sum(_cached_entries(part, tokens) for part in cache.caches)
    arrays = [leaf for _, leaf in tree_flatten(cache.state) if isinstance(leaf, mx.array)]
    if not hasattr(cache, "offset"):  # a state of fixed size
        return sum(array.size for array in arrays)
    # (1, heads, positions, width), allocated for more than one position
    entries = sum(array.size // array.shape[2] for array in arrays)
    return entries * min(tokens, getattr(cache, "max_size", None) or tokens)


def _sizes(path: Path, *, widened: bool) -> list[int]:
    return [
        header.nbytes * (2 if widened and header.dtype in WIDENED else 1)
        for header in read_headers(path).values()
    ]


def _cache_bytes(config: dict[str, Any], on_cpu: bool) -> float:
    """Return the size of a KV cache of CONTEXT_TOKENS for standard attention, bytes."""
    table = text_settings(config)
    try:
        heads = int(table.get("num_key_value_heads") or table["num_attention_heads"])
        width = table.get("head_dim") or table["hidden_size"] / table["num_attention_heads"]
        layers = int(table["num_hidden_layers"])
    except (KeyError, TypeError, ValueError, ZeroDivisionError):
        return 0
    tokens = min(context_limit(config) or CONTEXT_TOKENS, CONTEXT_TOKENS)
    return 2 * layers * heads * float(width) * tokens * (4 if on_cpu else 2)
