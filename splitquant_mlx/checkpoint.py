"""Open a Hugging Face checkpoint directory: config, checked tensor headers, lazy weights.

`open_checkpoint` reads no weights. It builds mlx-lm's own model of the architecture (whose arrays
stay unevaluated) to learn the names and shapes that must be there, so every architecture that
mlx-lm loads is read the same way, and a checkpoint that does not fit is refused before any work.
"""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from splitquant_mlx.errors import CheckpointError
from splitquant_mlx.headers import TensorHeader, read_header

FLOATS = {"F16": mx.float16, "BF16": mx.bfloat16, "F32": mx.float32}
SHARD = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.safetensors")


@dataclass(frozen=True)
class Checkpoint:
    """Hold an opened checkpoint.

    Attributes:
        path: the directory.
        config: config.json.
        model: mlx-lm's model of it, its parameters not evaluated and not the checkpoint's.
        weights: parameter name -> lazy array, named and laid out as the model wants them. Pop
            what you read: an array that was evaluated stays in memory as long as it is held.
        source_bytes: size of all tensors in the files.
    """

    path: Path
    config: dict[str, Any]
    model: nn.Module
    weights: dict[str, mx.array]
    source_bytes: int


def open_checkpoint(path: Path) -> Checkpoint:
    """Open a directory of config.json and safetensors files.

    Raises:
        CheckpointError: when it is not a model directory, its architecture is unknown to mlx-lm,
            it is quantized already, holds only pickled weights, a shard is missing or corrupt, or
            tensors are missing, extra, or of the wrong shape or dtype.
    """
    config = read_config(path)
    if "quantization" in config or "quantization_config" in config or "splitquant" in config:
        raise CheckpointError(f"{path} is quantized already: convert the original model instead")
    if config.get("model_file"):
        raise CheckpointError(
            f"{path}: config.json asks to run {config['model_file']!r} from the checkpoint, which "
            "convert never does: use a model whose architecture mlx-lm has"
        )
    headers = read_headers(path)
    layers = config.get("num_hidden_layers")
    if isinstance(layers, int) and layers > len(headers):
        raise CheckpointError(
            f"{path}: config.json has num_hidden_layers {layers}, the files hold only "
            f"{len(headers)} tensors: one of the two is from another model"
        )
    for name, header in headers.items():
        if header.dtype not in FLOATS and not header.dtype.startswith(("I", "U", "BOOL")):
            raise CheckpointError(
                f"{header.file}: tensor {name!r} has dtype {header.dtype}, wanted one of "
                f"{', '.join(FLOATS)}: cast the checkpoint to one of them first"
            )
    model = build_model(path, config)
    weights = _load_lazily(path, headers, model)
    _check_parameters(path, model, weights)
    source_bytes = sum(header.nbytes for header in headers.values())
    return Checkpoint(path, config, model, weights, source_bytes)


def read_config(path: Path) -> dict[str, Any]:
    """Read config.json. Raises CheckpointError when there is none or it is not usable."""
    file = path / "config.json"
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError as exc:
        raise CheckpointError(
            f"{path} is not a model directory: it has no config.json (wanted: config.json, "
            "*.safetensors and tokenizer files)"
        ) from exc
    except OSError as exc:
        raise CheckpointError(f"{file}: {exc.strerror or exc}") from exc
    except (ValueError, RecursionError) as exc:
        raise CheckpointError(f"{file} is not valid JSON: {exc}") from exc
    if not isinstance(config, dict) or not isinstance(config.get("model_type"), str):
        raise CheckpointError(f"{file}: wanted a table with a model_type, such as 'llama'")
    return config


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


def build_model(path: Path, config: dict[str, Any]) -> nn.Module:
    """Build mlx-lm's model for `config` with unevaluated parameters."""
    from mlx_lm.utils import _get_classes

    try:
        model_class, args_class = _get_classes(config)
    except ValueError as exc:
        raise CheckpointError(
            f"{path}: unknown architecture {config['model_type']!r}: this mlx-lm has no model of "
            "that name; a newer mlx-lm may (pip install -U mlx-lm)"
        ) from exc
    try:
        return model_class(args_class.from_dict(config))
    except Exception as exc:  # mlx-lm's models raise whatever their arithmetic meets
        raise CheckpointError(
            f"{path}: config.json does not describe a {config['model_type']!r} model: "
            f"{type(exc).__name__}: {_one_line(exc)}"
        ) from exc


def _shard_files(path: Path) -> list[Path]:
    index_file = path / "model.safetensors.index.json"
    if index_file.exists():
        try:
            names = set(json.loads(index_file.read_text(encoding="utf-8"))["weight_map"].values())
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as exc:
            raise CheckpointError(f"{index_file} is not a valid index: {_one_line(exc)}") from exc
        for name in names:
            if not isinstance(name, str) or Path(name).name != name:
                raise CheckpointError(f"{index_file}: {name!r} is not a file of this directory")
    else:
        found = {file.name for file in path.glob("*.safetensors") if file.is_file()}
        names = {name for name in found if name.startswith("model")} or {
            name for name in found if not name.startswith(("adapter", "consolidated"))
        }
        for name in list(names):
            if match := SHARD.fullmatch(name):
                stem, _, count = match.groups()
                numbers = range(1, min(int(count), 10_000) + 1)
                names |= {f"{stem}-{n:05d}-of-{count}.safetensors" for n in numbers}
    if not names:
        if pickles := sorted(file.name for file in path.glob("*.bin")):
            raise CheckpointError(
                f"{path} has only pickled weights ({pickles[0]}), which can run code when loaded "
                "and are never read: convert them to safetensors first"
            )
        raise CheckpointError(f"{path} is not a model directory: it has no .safetensors file")
    for name in sorted(names):
        if not (path / name).is_file():
            raise CheckpointError(f"{path}: shard {name} is missing: download it again")
    return [path / name for name in sorted(names)]


def _load_lazily(
    path: Path, headers: dict[str, TensorHeader], model: nn.Module
) -> dict[str, mx.array]:
    weights: dict[str, mx.array] = {}
    try:
        for file in sorted({header.file for header in headers.values()}):
            weights.update(mx.load(str(file)))  # type: ignore[arg-type]
        sanitize = getattr(model, "sanitize", None)
        return sanitize(weights) if sanitize else weights
    except Exception as exc:  # mlx-lm's sanitize indexes tensors by name and shape, unguarded
        raise CheckpointError(
            f"{path}: the tensors do not fit a {getattr(model, 'model_type', '')} model: "
            f"{type(exc).__name__}: {_one_line(exc)}"
        ) from exc


def _check_parameters(path: Path, model: nn.Module, weights: dict[str, mx.array]) -> None:
    wanted = {name: array.shape for name, array in tree_flatten(model.parameters())}
    for kind, names in (
        ("are missing", wanted.keys() - weights.keys()),
        ("have no place in this model", weights.keys() - wanted.keys()),
    ):
        if names:
            listed = sorted(names)
            more = f" and {len(listed) - 3} more" if len(listed) > 3 else ""
            raise CheckpointError(f"{path}: tensors {kind}: {', '.join(listed[:3])}{more}")
    for name, array in weights.items():
        if array.shape != wanted[name]:
            raise CheckpointError(
                f"{path}: tensor {name!r} has shape {list(array.shape)}, config.json wants "
                f"{list(wanted[name])}"
            )
        if name.endswith("weight") and array.dtype not in FLOATS.values():
            raise CheckpointError(
                f"{path}: tensor {name!r} has dtype {array.dtype}, wanted a float"
            )


def _one_line(exc: BaseException) -> str:
    return " ".join(str(exc).split())
