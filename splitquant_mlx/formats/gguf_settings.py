"""Read the settings of a GGUF file's metadata, which may be missing, or no number."""

from typing import Any

import numpy as np

from splitquant_mlx.errors import CheckpointError
from splitquant_mlx.formats.gguf_tokenizer import ELSEWHERE

MAX_SETTING = 1 << 40


def block_count(metadata: dict[str, Any]) -> int:
    """Return the number of a file's layers, those that predict further tokens among them."""
    return number(metadata, "block_count", int)


def count(metadata: dict[str, Any], name: str, most: int) -> int:
    """Return a whole number from 0, as where there is none, to `most`."""
    value = metadata.get(key_of(metadata, name), 0)
    if type(value) is not int or not 0 <= value <= most:
        key = key_of(metadata, name)
        raise CheckpointError(f"{key}: expected 0 to {most}, got {value!r:.80}; {ELSEWHERE}")
    return value


def key_of(metadata: dict[str, Any], name: str) -> str:
    """Return the key of a setting of the file's architecture."""
    return f"{metadata.get('general.architecture')}.{name}"


def number(metadata: dict[str, Any], name: str, kind: type, default: Any = None) -> Any:
    """Return a positive number; a float32 as its shortest decimal: 1e-05, not 9.99999974e-06."""
    key = key_of(metadata, name)
    value = collapsed(metadata.get(key, default))
    if type(value) not in (int, kind) or not 0 < value < MAX_SETTING:
        expected = f"a positive {kind.__name__} below {MAX_SETTING}"
        raise CheckpointError(f"{key}: expected {expected}, got {value!r:.80}; {ELSEWHERE}")
    return value if kind is int else float(str(np.float32(value)))


def setting(metadata: dict[str, Any], name: str, default: Any = None) -> Any:
    """Return a number, none or more, or a switch."""
    value = collapsed(metadata.get(key_of(metadata, name), default))
    if isinstance(value, bool) or value == 0:
        return value
    return number(metadata, name, int if isinstance(value, int) else float, default)


def collapsed(value: Any) -> Any:
    """Return the one number that all layers have, where there is one for each of them."""
    same = isinstance(value, list) and value and value.count(value[0]) == len(value)
    return value[0] if same else value
