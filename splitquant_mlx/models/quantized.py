"""What a checkpoint says of its quantization, and its weights without it."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx

from splitquant_mlx.errors import CheckpointError
from splitquant_mlx.formats.dequantize import dequantize_tensors
from splitquant_mlx.formats.safetensors import TensorHeader

KEYS = ("quantization", "quantization_config", "compression_config")
# what mlx-lm computes with packed; all else is dequantized when it is loaded
PACKED = ("mlx", "mxfp4", "mxfp8", "awq", "bitnet", "modelopt")
# where the settings are when config.json has none, and of what
BESIDE = {"hf_quant_config.json": "modelopt", "quantize_config.json": "gptq"}
DTYPES = {"float16": mx.float16, "bfloat16": mx.bfloat16, "float32": mx.float32}


def quantization_table(path: Path, config: Mapping[str, Any]) -> dict[str, Any]:
    """Return how a checkpoint is quantized, its method as `quant_method`; empty if it is not.

    Raises:
        CheckpointError: when the settings are no table.
    """
    if isinstance(config.get("splitquant"), dict):
        return {"quant_method": "splitquant"}
    text_config = config.get("text_config")
    tables = [config, *([text_config] if isinstance(text_config, dict) else [])]
    found = next((table[k] for table in tables for k in KEYS if table.get(k) is not None), None)
    files = {path / name: method for name, method in BESIDE.items()} if found is None else {}
    if beside := next((file for file in files if file.exists()), None):
        try:
            found = json.loads(beside.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as exc:
            raise CheckpointError(f"{beside} is not valid JSON: {exc}") from exc
        return {"quant_method": files[beside], **(found if isinstance(found, dict) else {})}
    if found is None:
        return {}
    if not isinstance(found, dict):
        raise CheckpointError(
            f"{path}: config.json: expected a table quantization, got {found!r:.80}"
        )
    return {"quant_method": "mlx", **found}


def runs_packed(table: Mapping[str, Any]) -> bool:
    """Tell whether mlx-lm computes with the packed weights of a checkpoint."""
    method, layout = table.get("quant_method"), str(table.get("format"))
    packed = method in (*PACKED, "splitquant")
    return packed or (method == "compressed-tensors" and layout.startswith(("mxfp4", "nvfp4")))


def without_quantization(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return config.json without what it says of a quantization."""
    return {
        key: without_quantization(value)
        if key == "text_config" and isinstance(value, dict)
        else value
        for key, value in config.items()
        if key not in KEYS
    }


def unpacked(
    path: Path,
    config: Mapping[str, Any],
    headers: Mapping[str, TensorHeader],
    tensors: dict[str, mx.array],
) -> tuple[dict[str, mx.array], list[str]]:
    """Return the tensors of a checkpoint in floating point, unread, and what to tell the user.

    Raises:
        CheckpointError: when it is quantized in a way that cannot be undone here.
    """
    table = quantization_table(path, config)
    if not table:
        return tensors, []
    method = str(table["quant_method"])
    text_config = config.get("text_config")
    names = [config.get("torch_dtype"), config.get("dtype")]
    names += [text_config.get(key) for key in ("torch_dtype", "dtype")] if text_config else []
    dtype = next((DTYPES[name] for name in names if name in DTYPES), mx.bfloat16)
    fp8 = {name for name, header in headers.items() if header.dtype == "F8_E4M3"}
    try:
        found = dequantize_tensors(tensors, table, fp8, dtype)
    except (CheckpointError, ValueError, TypeError, IndexError) as exc:
        raise CheckpointError(f"{path}: the quantization cannot be undone: {exc}") from exc
    note = (
        f"the original is quantized itself ({method}): its weights are dequantized and quantized "
        "anew; a 16-bit original, where there is one, gives a better result"
    )
    return found, [note]
