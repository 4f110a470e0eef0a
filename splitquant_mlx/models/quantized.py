"""Read a checkpoint's quantization settings, and dequantize its weights."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx

from splitquant_mlx.errors import CheckpointError
from splitquant_mlx.formats.dequantize import dequantize_tensors
from splitquant_mlx.formats.safetensors import TensorHeader
from splitquant_mlx.models.config import settings_tables, text_settings

KEYS = ("quantization", "quantization_config", "compression_config")
# methods whose packed weights mlx-lm computes with; others are dequantized when loaded
PACKED = ("mlx", "mxfp4", "mxfp8", "awq", "bitnet", "modelopt")
# other files with settings, and their methods
SETTINGS_FILES = {"hf_quant_config.json": "modelopt", "quantize_config.json": "gptq"}
DTYPES = {"float16": mx.float16, "bfloat16": mx.bfloat16, "float32": mx.float32}


def quantization_table(path: Path, config: dict[str, Any]) -> dict[str, Any]:
    """Return a checkpoint's quantization settings with `quant_method`; empty if not quantized.

    Raises:
        CheckpointError: when the settings are not an object.
    """
    if isinstance(config.get("splitquant"), dict):
        return {"quant_method": "splitquant"}
    tables = settings_tables(config)
    settings = next((table[k] for table in tables for k in KEYS if table.get(k) is not None), None)
    if settings is None:
        return _settings_file(path)
    if not isinstance(settings, dict):
        raise CheckpointError(
            f"{path}: config.json: quantization: expected an object, got {settings!r:.80}"
        )
    return {"quant_method": "mlx", **settings}


def _settings_file(path: Path) -> dict[str, Any]:
    for name, method in SETTINGS_FILES.items():
        file = path / name
        if file.exists():
            try:
                settings = json.loads(file.read_text(encoding="utf-8"))
            except (OSError, ValueError, RecursionError) as exc:
                raise CheckpointError(f"{file} is not valid JSON: {exc}") from exc
            return {"quant_method": method, **(settings if isinstance(settings, dict) else {})}
    return {}


def runs_packed(table: Mapping[str, Any]) -> bool:
    """Return whether mlx-lm computes with the packed weights of a checkpoint."""
    method, layout = table.get("quant_method"), str(table.get("format"))
    packed = method in (*PACKED, "splitquant")
    return packed or (method == "compressed-tensors" and layout.startswith(("mxfp4", "nvfp4")))


def without_quantization(config: dict[str, Any]) -> dict[str, Any]:
    """Return config.json without quantization settings."""
    result = {key: value for key, value in config.items() if key not in KEYS}
    if (text := text_settings(config)) is not config:
        result["text_config"] = without_quantization(text)
    return result


def dequantize_checkpoint(
    path: Path,
    config: dict[str, Any],
    headers: Mapping[str, TensorHeader],
    tensors: dict[str, mx.array],
) -> tuple[dict[str, mx.array], list[str]]:
    """Return the tensors of a checkpoint, dequantized lazily if quantized, and warnings.

    Raises:
        CheckpointError: when its quantization is not supported.
    """
    table = quantization_table(path, config)
    if not table:
        return tensors, []
    method = str(table["quant_method"])
    names = [t.get(key) for t in settings_tables(config) for key in ("torch_dtype", "dtype")]
    dtype = next((DTYPES[name] for name in names if name in DTYPES), mx.bfloat16)
    fp8 = {name for name, header in headers.items() if header.dtype == "F8_E4M3"}
    try:
        weights = dequantize_tensors(tensors, table, fp8, dtype)
    except (CheckpointError, ValueError, TypeError, IndexError) as exc:
        raise CheckpointError(f"{path}: cannot be dequantized: {exc}") from exc
    note = (
        f"the original is quantized ({method}): its weights are dequantized and quantized again; a "
        "16-bit original, if there is one, gives better results"
    )
    return weights, [note]
