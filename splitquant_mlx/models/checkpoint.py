"""Open a Hugging Face checkpoint directory: config, checked tensor headers, lazy weights.

`open_checkpoint` reads no weights. It builds mlx-lm's own model of the architecture (whose arrays
stay unevaluated) to learn the names and shapes that must be there, so every architecture that
mlx-lm loads is read the same way, and a checkpoint that does not fit is refused before any work.
"""

import json
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from splitquant_mlx.errors import CheckpointError, one_line
from splitquant_mlx.formats.safetensors import TensorHeader, read_header
from splitquant_mlx.models.architecture import build_model, parameters
from splitquant_mlx.models.config import check_config, read_config, refuse_special_file
from splitquant_mlx.models.config_forms import check_function, normalize

FLOATS = {"F16": mx.float16, "BF16": mx.bfloat16, "F32": mx.float32}
SUFFIX = ".safetensors"
SHARD = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.safetensors")
QUANTIZED = ("quantization", "quantization_config", "splitquant")
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
            it is quantized already, holds only pickled weights, a shard is missing or corrupt, or
            tensors are missing, extra, or of the wrong shape or dtype.
    """
    config = read_config(path)
    for table in (config, config.get("text_config")):
        if isinstance(table, dict) and any(table.get(key) is not None for key in QUANTIZED):
            raise CheckpointError(
                f"{path} is quantized already: convert the original model instead"
            )
    if config.get("model_file") is not None:
        raise CheckpointError(
            f"{path}: config.json asks to run {config['model_file']!r} from the checkpoint, which "
            "convert never does: use a model whose architecture mlx-lm has"
        )
    headers = read_headers(path)
    stamps = {header.file: stamp(header.file) for header in headers.values()}
    check_config(path, config, len(headers))
    for name, header in headers.items():
        if header.dtype not in FLOATS and not header.dtype.startswith(("I", "U", "BOOL")):
            raise CheckpointError(
                f"{header.file}: tensor {name!r} has dtype {header.dtype}, wanted one of "
                f"{', '.join(FLOATS)}: cast the checkpoint to one of them first"
            )
    config = normalize(path, config)
    model = build_model(path, config)
    warnings = tuple(check_function(path, model, config))
    weights = _load_lazily(path, headers, model)
    _check_parameters(path, model, weights)
    source_bytes = sum(header.nbytes for header in headers.values())
    return Checkpoint(path, config, model, weights, source_bytes, stamps, warnings)


def read_headers(path: Path) -> dict[str, TensorHeader]:
    """Return the checked headers of every tensor of a checkpoint directory."""
    headers: dict[str, TensorHeader] = {}
    for file in _shard_files(path):
        for name, header in read_header(file).items():
            if name in headers:
                raise CheckpointError(
                    f"{path}: tensor {name!r} is in both {headers[name].file.name} and {file.name}"
                )
            headers[name] = header
    return headers


def check_unchanged(checkpoint: Checkpoint) -> None:
    """Raise CheckpointError when a file is not what it was when the checkpoint was opened."""
    for file, before in checkpoint.stamps.items():
        if not file.exists() or stamp(file) != before:
            raise CheckpointError(f"{file} changed while it was read: convert the model again")


def stamp(file: Path) -> Stamp:
    """Return what tells that a file changed: its size, and the times of its last changes, ns.

    The second time is the system's own, which no program can set back.
    """
    status = file.stat()
    return status.st_size, status.st_mtime_ns, status.st_ctime_ns


def _shard_files(path: Path) -> list[Path]:
    index_file = path / "model.safetensors.index.json"
    names = _indexed(index_file) if index_file.exists() else _unindexed(path)
    if not names:
        if pickles := sorted(file.name for file in path.glob("*.bin")):
            raise CheckpointError(
                f"{path} has only pickled weights ({pickles[0]}), which can run code when loaded "
                "and are never read: convert them to safetensors first"
            )
        raise CheckpointError(f"{path} is not a model directory: it has no .safetensors file")
    for name in sorted(names):
        file = path / name
        if os.path.lexists(file) and not file.is_file():
            raise CheckpointError(f"{file} is not a file: download it again")
        if not file.is_file():
            raise CheckpointError(f"{path}: shard {name} is missing: download it again")
    return [path / name for name in sorted(names)]


def _indexed(index_file: Path) -> set[str]:
    refuse_special_file(index_file)
    try:
        names = set(json.loads(index_file.read_text(encoding="utf-8"))["weight_map"].values())
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as exc:
        raise CheckpointError(
            f"{index_file} is not a valid index: {type(exc).__name__}: {one_line(exc)}: download "
            "it again"
        ) from exc
    for name in names:
        if not (isinstance(name, str) and Path(name).name == name and name.endswith(SUFFIX)):
            raise CheckpointError(
                f"{index_file}: {name!r} is not a {SUFFIX} file of this directory: download the "
                "index again"
            )
    if not names:
        raise CheckpointError(f"{index_file} names no file: download it again")
    return names


def _unindexed(path: Path) -> set[str]:
    found = {file.name for file in path.glob(f"*{SUFFIX}") if not file.name.startswith(".")}
    names = {name for name in found if name.startswith("model")} or {
        name for name in found if not name.startswith(("adapter", "consolidated"))
    }
    for name in list(names):
        if match := SHARD.fullmatch(name):
            stem, _, count = match.groups()
            numbers = range(1, min(int(count), 10_000) + 1)
            names |= {f"{stem}-{n:05d}-of-{count}{SUFFIX}" for n in numbers}
    return names


def _load_lazily(
    path: Path, headers: dict[str, TensorHeader], model: nn.Module
) -> dict[str, mx.array]:
    weights: dict[str, mx.array] = {}
    for file in sorted({header.file for header in headers.values()}):
        try:
            weights.update(mx.load(str(file)))  # type: ignore[arg-type]
        except Exception as exc:  # a file that changed or became unreadable under us
            raise CheckpointError(f"{file} cannot be read: {one_line(exc)}") from exc
    sanitize = getattr(model, "sanitize", None)
    try:
        return sanitize(weights) if sanitize else weights
    except Exception as exc:  # mlx-lm's sanitize indexes tensors by name and shape, unguarded
        raise CheckpointError(
            f"{path}: the tensors do not fit a {getattr(model, 'model_type', '')} model: "
            f"{type(exc).__name__}: {one_line(exc)}"
        ) from exc


def _check_parameters(path: Path, model: nn.Module, weights: dict[str, mx.array]) -> None:
    wanted = parameters(model)
    for kind, names in (
        ("are missing", wanted.keys() - weights.keys()),
        ("have no place in this model", weights.keys() - wanted.keys()),
    ):
        if names:
            listed = sorted(names)
            more = f" and {len(listed) - 3} more" if len(listed) > 3 else ""
            raise CheckpointError(
                f"{path}: tensors {kind}: {', '.join(listed[:3])}{more}: config.json is another "
                "model's, or this is an adapter or a part of a model"
            )
    for name, array in weights.items():
        if array.shape != wanted[name].shape:
            raise CheckpointError(
                f"{path}: tensor {name!r} has shape {list(array.shape)}, config.json wants "
                f"{list(wanted[name].shape)}: one of the two is from another model"
            )
        if not array.size:
            raise CheckpointError(
                f"{path}: tensor {name!r} has shape {list(array.shape)}, which holds nothing"
            )
        is_float = mx.issubdtype(wanted[name].dtype, mx.floating)
        if is_float and array.dtype not in FLOATS.values():
            raise CheckpointError(
                f"{path}: tensor {name!r} has dtype {str(array.dtype).rpartition('.')[2]}, wanted "
                f"one of {', '.join(FLOATS)}: this is a quantized or a damaged checkpoint"
            )
