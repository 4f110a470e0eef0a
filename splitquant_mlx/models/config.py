"""Read config.json and refuse impossible values before a model is built from it."""

import json
import math
import re
import stat
from pathlib import Path
from typing import Any

from splitquant_mlx.errors import CheckpointError

SIZES = (
    "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "vocab_size", "head_dim",
)  # fmt: skip
# counts that model constructors loop over
COUNTS = re.compile(r"(?:\w+_)?(?:num|n)_(?:\w+_)?(layers?|experts)")
MAX_EXPERTS = 10_000
NUMBERED = re.compile(r"(?:\w+_)?(?:num|n)_\w+")
# range of magnitudes; products with numbers outside of it are zero or infinite in float32
SMALLEST, GREATEST = 1e-20, 1e20
# JSON has no infinity; transformers 5 writes {"__float__": "Infinity"}, which other programs do not
# read, so the largest float32 number replaces it
LARGEST = 3.4028234663852886e38
FLOAT, NOT_FINITE = "__float__", ("Infinity", "-Infinity", "NaN")
MAX_NESTING = 50
# files that are read into memory; the largest tokenizers in use have about 30 MB
TEXTS = (".json", ".jinja", ".txt", ".model", ".tiktoken")
MAX_TEXT_BYTES = 1 << 28


def to_json(config: dict[str, Any]) -> str:
    """Return the text of a config.json; infinities become +-LARGEST."""
    return json.dumps(_encode_floats(config), indent=4, sort_keys=True, allow_nan=False) + "\n"


def _decode_float(table: dict[str, Any]) -> Any:
    return float(table[FLOAT]) if list(table) == [FLOAT] and table[FLOAT] in NOT_FINITE else table


def _encode_floats(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _encode_floats(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_encode_floats(item) for item in value]
    if isinstance(value, float) and math.isnan(value):
        return {FLOAT: "NaN"}
    if isinstance(value, float):
        return max(-LARGEST, min(LARGEST, value))
    return value


def read_config(path: Path) -> dict[str, Any]:
    """Read config.json. Raises CheckpointError when it is missing or invalid."""
    _check_files(path)
    file = path / "config.json"
    refuse_special_file(file)
    try:
        config = json.loads(file.read_text(encoding="utf-8"), object_hook=_decode_float)
    except FileNotFoundError as exc:
        raise CheckpointError(
            f"{path} is not a model directory: it has no config.json (expected: config.json, "
            "*.safetensors and tokenizer files)"
        ) from exc
    except OSError as exc:
        raise CheckpointError(f"{file}: {exc.strerror or exc}") from exc
    except (ValueError, RecursionError) as exc:
        raise CheckpointError(f"{file} is not valid JSON: {exc}") from exc
    if not isinstance(config, dict) or not isinstance(config.get("model_type"), str):
        raise CheckpointError(f"{file}: expected a table with a model_type, such as 'llama'")
    return config


def text_settings(config: dict[str, Any]) -> dict[str, Any]:
    """Return the language model's settings: `text_config` in multimodal models, else `config`."""
    text = config.get("text_config")
    return text if isinstance(text, dict) else config


def settings_tables(config: dict[str, Any]) -> list[dict[str, Any]]:
    """Return a config.json and, in multimodal models, its `text_config`."""
    text = text_settings(config)
    return [config] if text is config else [config, text]


def check_config(path: Path, config: dict[str, Any], tensors: int) -> None:
    """Refuse impossible settings, such as a billion layers, before a model is built.

    Args:
        path: the checkpoint, for messages.
        config: its config.json.
        tensors: number of stored tensors.

    Raises:
        CheckpointError: when a size is not a number, or there are more layers than tensors.
    """
    architectures = config.get("architectures") or []
    if not isinstance(architectures, list) or not all(isinstance(a, str) for a in architectures):
        raise CheckpointError(f"{path}: config.json: architectures is not a list of names")
    text = config.get("text_config")
    if not isinstance(text, (dict, type(None))):
        raise CheckpointError(f"{path}: config.json: text_config is not an object")
    if text and not isinstance(text.get("model_type"), (str, type(None))):
        raise CheckpointError(f"{path}: config.json: text_config.model_type is not a name")
    for key in ("torch_dtype", "dtype"):
        for value in (table.get(key) for table in settings_tables(config)):
            if not isinstance(value, (str, type(None))):
                raise CheckpointError(
                    f"{path}: config.json: {key}: expected a name such as 'bfloat16', got "
                    f"{value!r:.60}"
                )
    tables: list[tuple[str, Any, int]] = [("", config, 0)]
    while tables:
        name, table, depth = tables.pop()
        if depth > MAX_NESTING:
            raise CheckpointError(
                f"{path}: config.json is nested more than {MAX_NESTING} levels deep"
            )
        _check_layer_types(path, table)
        entries = table.items() if isinstance(table, dict) else [(name, item) for item in table]
        for key, value in entries:
            if isinstance(value, (dict, list)):
                tables.append((key, value, depth + 1))
            elif expected := _expected(key, value, in_list=isinstance(table, list)):
                raise CheckpointError(
                    f"{path}: config.json: {key}: expected {expected}, got {value!r:.80}"
                )
            counted = COUNTS.fullmatch(key)
            if counted and isinstance(value, int):
                limit = max(tensors, MAX_EXPERTS if counted[1] == "experts" else 0)
                if value > limit:
                    raise CheckpointError(
                        f"{path}: config.json has {key} {value}, but the files only have {tensors} "
                        "tensors: one of the two is from another model"
                    )


def _expected(key: str, value: Any, *, in_list: bool) -> str:
    """Return the expected kind of value if an entry does not have it, else ""."""
    is_number = type(value) in (int, float)
    if key == "tie_word_embeddings" and type(value) is not bool:
        return "true or false"
    if key in SIZES and isinstance(value, (str, int, float)):
        if type(value) is not int or value < 0 or (key == "head_dim" and not value):
            return f"an integer, {1 if key == 'head_dim' else 0} or more"
    if isinstance(value, float) and not math.isfinite(value):
        return "" if in_list and math.isinf(value) else "a finite number"
    if is_number and NUMBERED.fullmatch(key) and value < 0:
        return "a number of 0 or more"
    if is_number and value and not SMALLEST <= abs(value) <= GREATEST and abs(value) != LARGEST:
        return f"a number from {SMALLEST:g} to {GREATEST:g}"
    return ""


def _check_layer_types(path: Path, table: Any) -> None:
    """Refuse `layer_types` with fewer entries than layers."""
    types, layers = (
        table.get(key) if isinstance(table, dict) else None
        for key in ("layer_types", "num_hidden_layers")
    )
    if isinstance(types, list) and type(layers) is int and len(types) < layers:
        raise CheckpointError(
            f"{path}: config.json: expected {layers} layer_types, one per layer, got {len(types)}"
        )


def _check_files(path: Path) -> None:
    """Refuse pipes, devices and huge files, which mlx-lm and transformers would read."""
    try:
        files = sorted(path.iterdir())
    except OSError:
        return  # reading config.json reports the error
    for file in files:
        try:
            status = file.stat()
        except OSError:
            continue  # a broken link; reported if the file is needed
        if not stat.S_ISREG(status.st_mode) and not stat.S_ISDIR(status.st_mode):
            raise CheckpointError(f"{file} is not a file: download it again")
        if file.suffix in TEXTS and status.st_size > MAX_TEXT_BYTES:
            raise CheckpointError(
                f"{file}: expected at most {MAX_TEXT_BYTES} bytes, got {status.st_size}: download "
                "it again, or move it elsewhere if it is not part of the model"
            )


def refuse_special_file(file: Path) -> None:
    """Raise CheckpointError for a directory, a pipe or a device, which may block forever."""
    if file.exists() and not file.is_file():
        raise CheckpointError(f"{file} is not a file: download it again")
