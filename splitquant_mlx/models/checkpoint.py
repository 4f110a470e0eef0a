"""Open a Hugging Face checkpoint directory: config, checked tensor headers, lazy weights.

`open_checkpoint` reads no weights. It builds mlx-lm's own model of the architecture (whose arrays
stay unevaluated) to learn the names and shapes that must be there, so every architecture that
mlx-lm loads is read the same way, and a checkpoint that does not fit is refused before any work.
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
from splitquant_mlx.formats.safetensors import TensorHeader
from splitquant_mlx.models.architecture import build_model, parameters
from splitquant_mlx.models.config import check_config, read_config
from splitquant_mlx.models.config_forms import normalize
from splitquant_mlx.models.expert_stacks import separate_experts
from splitquant_mlx.models.folded import fold_multipliers, raise_corrections
from splitquant_mlx.models.function import check_function
from splitquant_mlx.models.left_out import check_left_out, left_out, settle_head
from splitquant_mlx.models.quantized import quantization_table, unpacked, without_quantization
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
    """Hold an opened checkpoint.

    Attributes:
        path: the directory.
        config: config.json, with the keys of both forms; see `config_forms`.
        model: mlx-lm's model of it, its parameters not evaluated and not the checkpoint's.
        weights: parameter name -> lazy array, named and laid out as the model wants them. Pop
            what you read: an array that was evaluated stays in memory as long as it is held.
        source_bytes: size of all tensors in the files.
        stamps: of every file that is read, to notice that it changed meanwhile; see `stamp`.
        warnings: how mlx-lm's model differs from transformers' on some texts, one sentence each.
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
        CheckpointError: when it is not a model directory, its architecture is unknown to mlx-lm,
            it is quantized in an unknown way, holds only pickled weights, a shard is missing or
            corrupt, or tensors are missing, extra, or of the wrong shape or dtype.
    """
    config = read_config(path)
    if isinstance(config.get("splitquant"), dict):
        raise CheckpointError(f"{path} is quantized already: convert the original model instead")
    if config.get("model_file") is not None:
        raise CheckpointError(
            f"{path}: config.json asks to run {config['model_file']!r} from the checkpoint, which "
            "convert never does: use a model whose architecture mlx-lm has"
        )
    stored = read_headers(path)
    headers = {n: h for n, h in stored.items() if not is_copy(n, h.file.name, stored)}
    stamps = {header.file: stamp(header.file) for header in headers.values()}
    check_config(path, config, len(headers))
    fp8 = ("F8_E4M3",) if quantization_table(path, config) else ()
    for name, header in headers.items():
        if header.dtype not in (*NUMPY_DTYPES, *fp8):
            raise CheckpointError(
                f"{header.file}: tensor {name!r} has dtype {header.dtype}, expected one of "
                f"{', '.join(FLOATS)}: cast the checkpoint to one of them first"
            )
    quantized = config
    config = normalize(path, settle_head(without_quantization(config), headers))
    stored, notes = unpacked(path, quantized, headers, _load_lazily(headers))
    kind = config["model_type"]
    tensors = fold_multipliers(path, separate_experts(rename(stored, kind), kind), config)
    tensors = raise_corrections(tensors, config)
    model, weights = fit_names(path, tensors, lambda: build_model(path, config))
    notes = [*notes, *check_function(path, model, config)]
    _check_parameters(path, model, weights)
    layers = len(getattr(model, "layers", ()))
    notes += check_left_out(path, left_out(stored, weights), headers, layers, kind)
    if any(header.dtype == "F64" for header in headers.values()):
        config |= {k: "float32" for k in ("torch_dtype", "dtype") if config.get(k) == "float64"}
    source_bytes = sum(header.nbytes for header in headers.values())
    return Checkpoint(path, config, model, weights, source_bytes, stamps, tuple(notes))


def check_unchanged(checkpoint: Checkpoint) -> None:
    """Raise CheckpointError when a file is not what it was when the checkpoint was opened."""
    for file, before in checkpoint.stamps.items():
        if not file.exists() or stamp(file) != before:
            raise CheckpointError(f"{file} changed while it was read: convert the model again")


def stamp(file: Path) -> Stamp:
    """Return what tells that a file changed: its size, and the times of its last changes, ns.

    The second time is the system's own, which no program can set back.

    Raises:
        CheckpointError: when the file cannot be read.
    """
    try:
        status = file.stat()
    except OSError as exc:
        raise CheckpointError(f"{file} cannot be read: {exc.strerror}") from exc
    return status.st_size, status.st_mtime_ns, status.st_ctime_ns


def _load_lazily(headers: Mapping[str, TensorHeader]) -> dict[str, mx.array]:
    """Return the tensors of the files, unread; float64, which mlx does not load, as float32."""
    files: dict[Path, dict[str, TensorHeader]] = {}
    for name, header in headers.items():
        files.setdefault(header.file, {})[name] = header
    tensors: dict[str, mx.array] = {}
    for file, held in sorted(files.items()):
        try:
            if any(header.dtype == "F64" for header in held.values()):
                tensors |= {name: _read(header) for name, header in held.items()}
            else:
                tensors |= mx.load(str(file))  # type: ignore[arg-type]
        except Exception as exc:  # a file that changed or became unreadable under us
            raise CheckpointError(f"{file} cannot be read: {one_line(exc)}") from exc
    return tensors


def _read(header: TensorHeader) -> mx.array:
    """Read a tensor of a file that mlx cannot load."""
    dtype, shape = NUMPY_DTYPES[header.dtype], header.shape
    if 0 in shape:  # which no memory map has
        return mx.zeros(shape)
    w = np.memmap(header.file, dtype, mode="r", offset=header.offset, shape=shape)
    if header.dtype == "F64":
        with np.errstate(over="ignore"):  # infinite values are named when they are converted
            return mx.array(w.astype(np.float32))
    return mx.array(w).view(mx.bfloat16) if header.dtype == "BF16" else mx.array(w)


def _check_parameters(path: Path, model: nn.Module, weights: dict[str, mx.array]) -> None:
    wanted = parameters(model)
    for name, array in weights.items():
        if array.shape != wanted[name].shape:
            raise CheckpointError(
                f"{path}: tensor {name!r}: expected shape {list(wanted[name].shape)}, by "
                f"config.json, got {list(array.shape)}: one of the two is from another model"
            )
        if not array.size:
            raise CheckpointError(
                f"{path}: tensor {name!r} has shape {list(array.shape)}, which holds nothing"
            )
        is_float = mx.issubdtype(wanted[name].dtype, mx.floating)
        if is_float and array.dtype not in FLOATS.values():
            raise CheckpointError(
                f"{path}: tensor {name!r}: expected dtype {', '.join(FLOATS)}, got "
                f"{str(array.dtype).rpartition('.')[2]}: this is a quantized or "
                "a damaged checkpoint"
            )
