"""Open a Hugging Face checkpoint directory: config, checked tensor headers, lazy weights.

`open_checkpoint` reads no weights. It builds mlx-lm's own model of the architecture (whose arrays
stay unevaluated) to learn the names and shapes that must be there, so every architecture that
mlx-lm loads is read the same way, and a checkpoint that does not fit is refused before any work.
"""

import dataclasses
import json
import os
import re
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from splitquant_mlx.errors import CheckpointError, one_line
from splitquant_mlx.formats.safetensors import TensorHeader, read_header
from splitquant_mlx.runtime.compatibility import check_names

FLOATS = {"F16": mx.float16, "BF16": mx.bfloat16, "F32": mx.float32}
SUFFIX = ".safetensors"
SHARD = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.safetensors")
MODEL_TYPE = re.compile(r"[\w-]+")
QUANTIZED = ("quantization", "quantization_config", "splitquant")
SIZES = (
    "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "vocab_size", "head_dim",
)  # fmt: skip
# the numbers an architecture loops over when it is built
COUNTS = re.compile(r"(?:\w+_)?(?:num|n)_(?:\w+_)?(layers?|experts)")
MAX_EXPERTS = 10_000
MAX_NESTING = 50
# what is read whole; the largest tokenizers in use are of some 30 MB
TEXTS = (".json", ".jinja", ".txt", ".model", ".tiktoken")
MAX_TEXT_BYTES = 1 << 28
Stamp = tuple[int, int, int]


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
        stamps: of every file that is read, to notice that it changed meanwhile; see `stamp`.
    """

    path: Path
    config: dict[str, Any]
    model: nn.Module
    weights: dict[str, mx.array]
    source_bytes: int
    stamps: dict[Path, Stamp]


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
    model = build_model(path, config)
    weights = _load_lazily(path, headers, model)
    _check_parameters(path, model, weights)
    source_bytes = sum(header.nbytes for header in headers.values())
    return Checkpoint(path, config, model, weights, source_bytes, stamps)


def read_config(path: Path) -> dict[str, Any]:
    """Read config.json. Raises CheckpointError when there is none or it is not usable."""
    _check_files(path)
    file = path / "config.json"
    _refuse_special_file(file)
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


def find_classes(path: Path, config: dict[str, Any]) -> tuple[Any, Any]:
    """Return mlx-lm's classes for `config`: the model and its arguments.

    Raises:
        CheckpointError: when mlx-lm has no such architecture, or it wants a number for something
            else that config.json holds.
        VersionError: when the installed mlx-lm is too old or too new.
    """
    check_names("mlx_lm.utils")
    from mlx_lm.utils import _get_classes

    try:
        if not MODEL_TYPE.fullmatch(config["model_type"]):  # it becomes part of a module's name
            raise ValueError("no name of an architecture")
        model_class, args_class = _get_classes(config)
    except (ValueError, AttributeError, SystemExit) as exc:  # an optional package may be missing
        raise CheckpointError(
            f"{path}: unknown architecture {config['model_type']!r:.60}: this mlx-lm has no model "
            "of that name; a newer mlx-lm may (pip install -U mlx-lm)"
        ) from exc
    _check_numbers(path, config, args_class)
    return model_class, args_class


def build_model(path: Path, config: dict[str, Any]) -> nn.Module:
    """Build mlx-lm's model for `config` with unevaluated parameters."""
    model_class, args_class = find_classes(path, config)
    try:
        model = model_class(args_class.from_dict(config))
        settle_random_state()
        return model
    except Exception as exc:  # mlx-lm's models raise whatever their arithmetic meets
        sizes = ", ".join(f"{key} {str(config[key])[:20]}" for key in SIZES if key in config)
        raise CheckpointError(
            f"{path}: config.json does not describe a {config['model_type']!r} model: "
            f"{type(exc).__name__}: {one_line(exc)} (it has {sizes or 'no size'})"
        ) from exc


def settle_random_state() -> None:
    """Evaluate what drawing random parameters that nobody read has left in mlx's random state.

    It is a chain of key splits that grows with every model, and never shrinks, in a process that
    draws no other random numbers (measured: 33 kB for a model of two layers).
    """
    mx.eval(mx.random.state)


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


def parameters(model: nn.Module) -> dict[str, mx.array]:
    """Return the parameters of a model by name, in model order."""
    return dict(tree_flatten(model.parameters()))  # type: ignore[arg-type]


def check_config(path: Path, config: dict[str, Any], tensors: int) -> None:
    """Refuse what no model has, before a loop of a thousand million layers is entered.

    Args:
        path: the checkpoint, for messages.
        config: its config.json.
        tensors: how many its files hold.

    Raises:
        CheckpointError: when a size is no number, or the layers are more than the tensors.
    """
    architectures = config.get("architectures") or []
    if not isinstance(architectures, list) or not all(isinstance(a, str) for a in architectures):
        raise CheckpointError(f"{path}: config.json: architectures is no list of names")
    if not isinstance(config.get("text_config"), (dict, type(None))):
        raise CheckpointError(f"{path}: config.json: text_config is no table")
    tables: list[tuple[Any, int]] = [(config, 0)]
    while tables:
        table, depth = tables.pop()
        if depth > MAX_NESTING:
            raise CheckpointError(f"{path}: config.json nests more than {MAX_NESTING} deep")
        values = table.values() if isinstance(table, dict) else table
        tables += [(value, depth + 1) for value in values if isinstance(value, (dict, list))]
        for key, value in table.items() if isinstance(table, dict) else ():
            if key in SIZES and isinstance(value, (str, int, float)):
                if type(value) is not int or value < 0:
                    raise CheckpointError(
                        f"{path}: config.json: {key} is {value!r}, wanted a whole number"
                    )
            counted = COUNTS.fullmatch(key)
            if counted and isinstance(value, int):
                limit = max(tensors, MAX_EXPERTS if counted[1] == "experts" else 0)
                if value > limit:
                    raise CheckpointError(
                        f"{path}: config.json has {key} {value}, the files hold only {tensors} "
                        "tensors: one of the two is from another model"
                    )


def _check_numbers(path: Path, config: dict[str, Any], args_class: type) -> None:
    """Refuse what is no number where the architecture wants one; most would fail in the chat."""
    fields = dataclasses.fields(args_class) if dataclasses.is_dataclass(args_class) else ()
    for field in fields:
        value = config.get(field.name)
        number = field.type in (int, float, "int", "float")
        if number and isinstance(value, (str, list, dict)):
            raise CheckpointError(
                f"{path}: config.json: {field.name} is {value!r:.80}, wanted a number"
            )


def _check_files(path: Path) -> None:
    """Refuse pipes and devices, which never end, and giants: mlx-lm and transformers read them."""
    try:
        files = sorted(path.iterdir())
    except OSError:
        return  # to read config.json says what is wrong
    for file in files:
        try:
            status = file.stat()
        except OSError:
            continue  # a broken link, which is missed where it is wanted
        if not stat.S_ISREG(status.st_mode) and not stat.S_ISDIR(status.st_mode):
            raise CheckpointError(f"{file} is not a file: download it again")
        if file.suffix in TEXTS and status.st_size > MAX_TEXT_BYTES:
            raise CheckpointError(
                f"{file} has {status.st_size} bytes, wanted at most {MAX_TEXT_BYTES}: download it "
                "again, or move it elsewhere if it is not the model's"
            )


def _refuse_special_file(file: Path) -> None:
    """Raise CheckpointError for a directory, or a pipe, which would be waited for for ever."""
    if file.exists() and not file.is_file():
        raise CheckpointError(f"{file} is not a file: download it again")


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
    _refuse_special_file(index_file)
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
