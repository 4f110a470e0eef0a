"""Open a Hugging Face checkpoint directory: config, checked tensor headers, lazy weights.

`open_checkpoint` reads no weights. It builds mlx-lm's model of the architecture (with unevaluated
arrays) for the expected names and shapes, so that every architecture of mlx-lm is handled the same
way, and a checkpoint that does not match is refused before any work.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from splitquant_mlx.errors import CheckpointError, one_line
from splitquant_mlx.formats.head_file import is_copy
from splitquant_mlx.formats.packed import dtype_name
from splitquant_mlx.formats.safetensors import TensorHeader
from splitquant_mlx.models.architecture import build_model, parameters
from splitquant_mlx.models.check_settings import check_settings
from splitquant_mlx.models.config import check_config, read_config
from splitquant_mlx.models.config_forms import normalize
from splitquant_mlx.models.expert_stacks import separate_experts
from splitquant_mlx.models.folded import fold_multipliers, shift_corrections
from splitquant_mlx.models.left_out import check_left_out, left_out, resolve_tied_head
from splitquant_mlx.models.quantized import (
    dequantize_checkpoint,
    quantization_table,
    without_quantization,
)
from splitquant_mlx.models.renamed import rename
from splitquant_mlx.models.shards import read_headers
from splitquant_mlx.models.tensor_names import fit_names

FLOATS = {"F16": mx.float16, "BF16": mx.bfloat16, "F32": mx.float32, "F64": mx.float32}
NUMPY_DTYPES = {
    "F16": "<f2", "BF16": "<u2", "F32": "<f4", "F64": "<f8", "BOOL": "?",
    "U8": "<u1", "I8": "<i1", "U16": "<u2", "I16": "<i2", "U32": "<u4", "I32": "<i4",
    "U64": "<u8", "I64": "<i8",
}  # fmt: skip
Stamp = tuple[int, int, int]


@dataclass(frozen=True)
class Checkpoint:
    """An opened checkpoint.

    Attributes:
        path: the directory.
        config: config.json, with the keys of both forms; see `config_forms`.
        model: mlx-lm's model, with unevaluated random parameters.
        weights: parameter name -> lazy array, in mlx-lm's names and layouts. Pop the arrays that
            are read, since an evaluated array stays in memory while it is referenced.
        source_bytes: size of all stored tensors, bytes.
        stamps: file -> stamp, to detect changes during a conversion; see `stamp`.
        warnings: differences between mlx-lm's model and transformers', one sentence each.
    """

    path: Path
    config: dict[str, Any]
    model: nn.Module
    weights: dict[str, mx.array]
    source_bytes: int
    stamps: dict[Path, Stamp]
    warnings: tuple[str, ...] = ()


def open_checkpoint(path: Path) -> Checkpoint:
    """Open a directory of config.json and safetensors files.

    Raises:
        CheckpointError: when it is not a model directory, mlx-lm does not have its architecture,
            its quantization is unknown, its weights are pickled, a shard is missing or corrupt,
            or tensors are missing, unexpected, or of the wrong shape or dtype.
    """
    config = read_config(path)
    if isinstance(config.get("splitquant"), dict):
        raise CheckpointError(f"{path} is quantized already: convert the original model instead")
    if config.get("model_file") is not None:
        raise CheckpointError(
            f"{path}: config.json asks to run {config['model_file']!r} from the checkpoint, "
            "which convert does not do: use a model whose architecture mlx-lm has"
        )
    stored = read_headers(path)
    headers = {n: h for n, h in stored.items() if not is_copy(n, h.file.name, stored)}
    stamps = {header.file: stamp(header.file) for header in headers.values()}
    check_config(path, config, len(headers))
    fp8 = ("F8_E4M3",) if quantization_table(path, config) else ()
    for name, header in headers.items():
        if header.dtype not in (*NUMPY_DTYPES, *fp8):
            raise CheckpointError(
                f"{header.file}: tensor {name!r}: expected dtype {', '.join(FLOATS)}, got "
                f"{header.dtype}: cast the checkpoint to one of them first"
            )
    quantized = config
    config = normalize(path, resolve_tied_head(without_quantization(config), headers))
    stored, notes = dequantize_checkpoint(path, quantized, headers, _load_lazily(headers))
    kind = config["model_type"]
    tensors = fold_multipliers(path, separate_experts(rename(stored, kind), kind), config)
    tensors = shift_corrections(tensors, config)
    model, weights = fit_names(path, tensors, lambda: build_model(path, config))
    notes = [*notes, *check_settings(path, model, config)]
    _check_parameters(path, model, weights)
    layers = len(getattr(model, "layers", ()))
    notes += check_left_out(path, left_out(stored, weights), headers, layers, kind)
    if any(header.dtype == "F64" for header in headers.values()):
        config |= {k: "float32" for k in ("torch_dtype", "dtype") if config.get(k) == "float64"}
    source_bytes = sum(header.nbytes for header in headers.values())
    return Checkpoint(path, config, model, weights, source_bytes, stamps, tuple(notes))


def check_unchanged(checkpoint: Checkpoint) -> None:
    """Raise CheckpointError when a file changed since the checkpoint was opened."""
    for file, before in checkpoint.stamps.items():
        if not file.exists() or stamp(file) != before:
            raise CheckpointError(f"{file} changed while it was read: convert the model again")


def stamp(file: Path) -> Stamp:
    """Return a file's size in bytes, and its times of modification and status change in ns.

    Programs cannot set the time of the status change.

    Raises:
        CheckpointError: when the file cannot be read.
    """
    try:
        status = file.stat()
    except OSError as exc:
        raise CheckpointError(f"{file} cannot be read: {exc.strerror}") from exc
    return status.st_size, status.st_mtime_ns, status.st_ctime_ns


def _load_lazily(headers: Mapping[str, TensorHeader]) -> dict[str, mx.array]:
    """Return the stored tensors, lazily; float64, which mlx does not load, as float32."""
    files: dict[Path, dict[str, TensorHeader]] = {}
    for name, header in headers.items():
        files.setdefault(header.file, {})[name] = header
    tensors: dict[str, mx.array] = {}
    for file, entries in sorted(files.items()):
        try:
            if any(header.dtype == "F64" for header in entries.values()):
                tensors |= {name: _read(header) for name, header in entries.items()}
            else:
                tensors |= mx.load(str(file))  # type: ignore[arg-type]
        except Exception as exc:  # the file changed or became unreadable
            raise CheckpointError(f"{file} cannot be read: {one_line(exc)}") from exc
    return tensors


def _read(header: TensorHeader) -> mx.array:
    """Read a tensor of a file that mlx cannot load."""
    dtype, shape = NUMPY_DTYPES[header.dtype], header.shape
    if 0 in shape:  # memory maps cannot be empty
        return mx.zeros(shape)
    w = np.memmap(header.file, dtype, mode="r", offset=header.offset, shape=shape)
    if header.dtype == "F64":
        with np.errstate(over="ignore"):  # the conversion reports infinite values
            return mx.array(w.astype(np.float32))
    return mx.array(w).view(mx.bfloat16) if header.dtype == "BF16" else mx.array(w)


def _check_parameters(path: Path, model: nn.Module, weights: dict[str, mx.array]) -> None:
    expected = parameters(model)
    for name, array in weights.items():
        if array.shape != expected[name].shape:
            raise CheckpointError(
                f"{path}: tensor {name!r}: expected shape {list(expected[name].shape)}, by "
                f"config.json, got {list(array.shape)}: one of the two is from another model"
            )
        if not array.size:
            raise CheckpointError(
                f"{path}: tensor {name!r} has no entries (shape {list(array.shape)})"
            )
        is_float = mx.issubdtype(expected[name].dtype, mx.floating)
        if is_float and array.dtype not in FLOATS.values():
            raise CheckpointError(
                f"{path}: tensor {name!r}: expected dtype {', '.join(FLOATS)}, got "
                f"{dtype_name(array.dtype)}: the checkpoint is quantized or corrupt"
            )
