"""Check the rotary embeddings of an mlx-lm model against config.json.

Classes differ in the keys that they read and how they use them, so the layers of the model are
measured: rotating a vector at position 1 gives the angle and length of each pair. The expected
values follow transformers' modeling_rope_utils.
"""

import math
import re
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from splitquant_mlx.errors import CheckpointError

ROTARY = re.compile(r"rope|rotary", re.IGNORECASE)
LAYER = re.compile(r"layers\.(\d+)\.")
TOLERANCE = 1e-3
# settings that must be of usual magnitude, else frequencies overflow or vanish in float32
NUMBERS = {
    "rope_theta", "factor", "attention_factor", "partial_rotary_factor", "short_factor",
    "long_factor", "short_mscale", "long_mscale", "beta_fast", "beta_slow", "low_freq_factor",
    "high_freq_factor", "original_max_position_embeddings",
}  # fmt: skip
MIN_NUMBER, MAX_NUMBER = 1e-6, 1e12
Table = dict[str, Any]


def check_numbers(path: Path, tables: dict[str, Table]) -> None:
    """Refuse settings that are not numbers of usual magnitude; `tables` as in `check_rotary`.

    Raises:
        CheckpointError: when there is one.
    """
    for table in tables.values():
        for key in NUMBERS & table.keys():
            values = table[key] if isinstance(table[key], list) else [table[key]]
            if not all(type(x) in (int, float) and MIN_NUMBER <= x <= MAX_NUMBER for x in values):
                raise CheckpointError(
                    f"{path}: config.json: rotary embeddings: {key}: expected a number from "
                    f"{MIN_NUMBER} to {MAX_NUMBER:g}, got {table[key]!r:.60}"
                )


def check_rotary(
    path: Path, model: nn.Module, tables: dict[str, Table], config: Table
) -> list[str]:
    """Compare every rotary embedding of `model` with the settings.

    Args:
        path: the checkpoint, for messages.
        model: mlx-lm's model.
        tables: settings by layer type, or with key '' for all layers; see
            `config_forms.rope_parameters`.
        config: the settings of the language model in config.json, with all keys.

    Returns:
        Differences that affect texts of some lengths only, one sentence each.

    Raises:
        CheckpointError: when one rotates differently, or its rope_type is unknown.
    """
    architecture = type(model).__module__.rpartition(".")[2]
    kinds = config.get("layer_types") or ()
    notes: set[str] = set()
    modules = {
        name: module
        for name, module in model.named_modules()
        if ROTARY.search(type(module).__name__) and not re.search("vision|visual|audio", name)
    }
    _check_layers(path, modules, config)
    if not modules and (scaled := {table["rope_type"] for table in tables.values()} - {"default"}):
        raise CheckpointError(
            f"{path}: config.json has rotary embeddings {', '.join(scaled)}, but mlx-lm's "
            f"{architecture} has plain ones: its output would be wrong"
        )
    for name, module in modules.items():
        layer = LAYER.search(name)
        kind = "" if "" in tables else kinds[int(layer[1])] if layer and kinds else None
        table = tables.get(kind) if kind is not None else None
        if not table or "rope_theta" not in table:
            continue
        if note := _check_module(path, architecture, name, module, table, config):
            notes.add(note)
    return sorted(notes)


def _check_module(
    path: Path, architecture: str, name: str, module: nn.Module, table: Table, config: Table
) -> str | None:
    """Compare one rotary embedding with its settings; see `check_rotary`.

    Returns:
        The difference, if it affects texts of some lengths only.
    """
    actual = _measure(module)
    try:
        dims = len(actual) * 2
        expected = _expected(table, dims, config)
    except (KeyError, TypeError, ValueError, ArithmeticError) as exc:
        raise CheckpointError(
            f"{path}: config.json: rotary embeddings {table}: {type(exc).__name__}: {exc}"
        ) from exc
    rounded = {**table, "truncate": True}
    if table.get("truncate") is False and _close(actual, _expected(rounded, dims, config)[0]):
        return (
            "mlx-lm rounds the range of YaRN's frequencies to whole pairs, the original does "
            f"not ({_difference(actual, expected[0])}): this affects every mlx checkpoint of it"
        )
    if _close(actual, expected[0]):
        return None
    if len(expected) == 1 or not _close(actual, expected[1]):
        raise CheckpointError(
            f"{path}: config.json has rotary embeddings {table}, but mlx-lm's "
            f"{architecture} rotates differently ({_difference(actual, expected[0])} in "
            f"{name}): its output would be wrong"
        )
    original = table["original_max_position_embeddings"]
    return (
        "mlx-lm uses longrope's long factors at every length, the original uses the short "
        f"ones up to {original} tokens: such texts give different results"
    )


def _check_layers(path: Path, modules: dict[str, nn.Module], config: Table) -> None:
    """Refuse a model that does not rotate in exactly the layers of no_rope_layers."""
    rotated = {int(layer[1]) for name in modules if (layer := LAYER.search(name))}
    flags = config.get("no_rope_layers")  # despite its name, 1 where a layer rotates
    if not rotated or not isinstance(flags, list):
        return
    if differing := rotated ^ {n for n, flag in enumerate(flags) if flag}:
        raise CheckpointError(
            f"{path}: config.json has no_rope_layers {flags}, mlx-lm differs in layers "
            f"{sorted(differing)}: its output would be wrong"
        )


def _measure(module: nn.Module) -> np.ndarray:
    """Return the rotation of each pair at position 1, as complex numbers (pairs,).

    The angle is the frequency in radians per token, the length the scale of the vector.
    """
    sizes = (getattr(module, name, None) for name in ("dims", "dim"))
    dims = next((size for size in sizes if isinstance(size, int)), 0) or 2 * module["_freqs"].size
    pairs = np.arange(dims // 2)
    one = module(mx.eye(dims)[:1].reshape(1, 1, 1, dims), offset=1)
    first, second = pairs, pairs + dims // 2
    if one[0, 0, 0, 1].item():  # pairs are consecutive entries
        first, second = 2 * pairs, 2 * pairs + 1
    x = np.zeros(dims, np.float32)
    x[first] = 1
    y = np.array(module(mx.array(x).reshape(1, 1, 1, dims), offset=1)).reshape(dims)
    return y[first] + 1j * y[second]


def _expected(table: Table, dims: int, config: Table) -> list[np.ndarray]:
    """Return the rotations that the settings specify, as `_measure` does.

    Args:
        table: rope_type, rope_theta and the settings of the type.
        dims: number of rotated dimensions of a head.
        config: the settings of the language model.

    Returns:
        One array; for longrope two, for short and for long texts.

    Raises:
        KeyError, TypeError, ValueError: a setting is missing or unknown.
    """
    kind, base = table["rope_type"], table["rope_theta"]
    width = config.get("head_dim") or 0
    if width and kind != "proportional":
        if int(width * table.get("partial_rotary_factor", 1.0)) // 2 != dims // 2:
            raise ValueError(f"mlx-lm rotates {dims} of {width} dimensions")
    frequencies = base ** -(np.arange(0, dims, 2) / dims)
    if kind in ("default", "mrope", "dynamic"):  # dynamic differs on long texts only
        return [_rotation(frequencies)]
    if kind == "linear":
        return [_rotation(frequencies / table["factor"])]
    if kind == "llama3":
        return [_rotation(_llama3(frequencies, table))]
    if kind == "yarn":
        return [_rotation(_yarn(frequencies, table), _yarn_factor(table))]
    if kind == "longrope":
        return _longrope(frequencies, table, config)
    if kind == "proportional":
        rotated = int(table.get("partial_rotary_factor", 1.0) * dims // 2)
        still = np.arange(dims // 2) >= rotated
        return [_rotation(np.where(still, 0, frequencies / table.get("factor", 1.0)))]
    raise ValueError(f"unknown rope_type {kind!r}")


def _rotation(frequencies: np.ndarray, factor: float = 1.0) -> np.ndarray:
    return factor * np.exp(1j * frequencies)


def _llama3(frequencies: np.ndarray, table: Table) -> np.ndarray:
    low, high = table["low_freq_factor"], table["high_freq_factor"]
    turns = table["original_max_position_embeddings"] * frequencies / (2 * np.pi)
    smooth = np.clip((turns - low) / (high - low), 0, 1)
    return (1 - smooth) * frequencies / table["factor"] + smooth * frequencies


def _yarn(frequencies: np.ndarray, table: Table) -> np.ndarray:
    dims, base = 2 * len(frequencies), table["rope_theta"]

    def dimension(rotations: float) -> float:
        length = table["original_max_position_embeddings"] / (rotations * 2 * math.pi)
        return dims * math.log(length) / (2 * math.log(base))

    low, high = dimension(table.get("beta_fast") or 32), dimension(table.get("beta_slow") or 1)
    if table.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dims - 1)
    ramp = np.clip((np.arange(dims // 2) - low) / ((high - low) or 0.001), 0, 1)
    return frequencies / table["factor"] * ramp + frequencies * (1 - ramp)


def _yarn_factor(table: Table) -> float:
    def scale(mscale: float) -> float:
        return 0.1 * mscale * math.log(table["factor"]) + 1 if table["factor"] > 1 else 1.0

    if table.get("attention_factor") is not None:
        return table["attention_factor"]
    if table.get("mscale") and table.get("mscale_all_dim"):
        return scale(table["mscale"]) / scale(table["mscale_all_dim"])
    return scale(1)


def _longrope(frequencies: np.ndarray, table: Table, config: Table) -> list[np.ndarray]:
    original = table["original_max_position_embeddings"]
    factor = table.get("factor") or config["max_position_embeddings"] / original
    length = table.get("attention_factor")
    if length is None:
        length = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0
    lists = (np.asarray(table[key], float) for key in ("short_factor", "long_factor"))
    return [_rotation(frequencies / factors, length) for factors in lists]


def _close(actual: np.ndarray, expected: np.ndarray) -> bool:
    return actual.shape == expected.shape and _error(actual, expected) < TOLERANCE


def _error(actual: np.ndarray, expected: np.ndarray) -> float:
    """Return the largest relative difference of frequencies (or factors)."""
    angles = np.abs(np.angle(actual) - np.angle(expected)) / np.maximum(
        np.abs(np.angle(expected)), 1e-7
    )
    return max(angles.max(), np.abs(np.abs(actual) / np.abs(expected) - 1).max())


def _difference(actual: np.ndarray, expected: np.ndarray) -> str:
    return f"frequencies off by up to {_error(actual, expected):.1%}"
