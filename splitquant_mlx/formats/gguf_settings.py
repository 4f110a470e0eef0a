"""Read and check the architecture settings in a GGUF file's metadata."""

from typing import Any

import numpy as np

from splitquant_mlx.errors import CheckpointError
from splitquant_mlx.formats.gguf_tokenizer import ELSEWHERE

MAX_SETTING = 1 << 40


def block_count(metadata: dict[str, Any]) -> int:
    """Return the number of layers, including those for multi-token prediction."""
    return number(metadata, "block_count", int)


def count(metadata: dict[str, Any], name: str, maximum: int) -> int:
    """Return an integer from 0, the default, to `maximum`."""
    key = key_of(metadata, name)
    value = metadata.get(key, 0)
    if type(value) is not int or not 0 <= value <= maximum:
        raise CheckpointError(f"{key}: expected 0 to {maximum}, got {value!r:.80}; {ELSEWHERE}")
    return value


def key_of(metadata: dict[str, Any], name: str) -> str:
    """Return the metadata key of a setting: its name prefixed by the architecture."""
    return f"{metadata.get('general.architecture')}.{name}"


def number(metadata: dict[str, Any], name: str, kind: type, default: Any = None) -> Any:
    """Return a positive number; a float32 as its shortest decimal (1e-05, not 9.99999974e-06)."""
    key = key_of(metadata, name)
    value = _collapse(metadata.get(key, default))
    if type(value) not in (int, kind) or not 0 < value < MAX_SETTING:
        expected = f"a positive {kind.__name__} below {MAX_SETTING}"
        raise CheckpointError(f"{key}: expected {expected}, got {value!r:.80}; {ELSEWHERE}")
    return value if kind is int else float(str(np.float32(value)))


def setting(metadata: dict[str, Any], name: str, default: Any = None) -> Any:
    """Return a number of 0 or more, or a bool."""
    value = _collapse(metadata.get(key_of(metadata, name), default))
    if isinstance(value, bool) or value == 0:
        return value
    return number(metadata, name, int if isinstance(value, int) else float, default)


def _collapse(value: Any) -> Any:
    """Return the common value of a list with one equal entry per layer, else `value`."""
    equal = isinstance(value, list) and value and value.count(value[0]) == len(value)
    return value[0] if equal else value
