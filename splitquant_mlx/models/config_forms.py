"""Add the keys that mlx-lm's classes read to a config.json, and keep those that it has.

transformers 5 writes `rope_parameters`, `dtype`, `num_local_experts`, ... where mlx-lm's classes
read `rope_theta`, `rope_scaling`, `partial_rotary_factor`, `torch_dtype`, `num_experts` and use
defaults for missing keys. transformers' configuration class reads both forms and has the defaults
of the architecture, so its values are written in both forms: mlx-lm, mlx-vlm and transformers then
read the same model.
"""

import copy
import dataclasses
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

from splitquant_mlx.errors import CheckpointError
from splitquant_mlx.models.architecture import find_classes
from splitquant_mlx.models.config import SIZES, text_settings
from splitquant_mlx.models.derived_keys import derived_keys
from splitquant_mlx.models.reference import (
    NOT_SETTINGS,
    UNUSED,
    read_as_transformers,
    reference_config,
    text_reference,
)
from splitquant_mlx.models.rotary import check_numbers

ROPE_TYPES = {"su": "longrope", "deepseek_yarn": "yarn"}
# names of the RoPE base of windowed layers, in addition to the `rope_theta` of the others
LOCAL_BASES = ("rope_local_base_freq", "rope_local_theta", "swa_rope_theta")
GLOBAL_BASE = "rope_global_base_freq"  # mlx-vlm's name of the latter in classes with the first
# names of the same value in different classes
SYNONYMS = (
    ("rope_theta", "rotary_emb_base", "rope_freq_constant", "rope_embedding_base"),
    ("partial_rotary_factor", "rotary_pct"),
    ("torch_dtype", "dtype"),
    ("num_experts", "num_local_experts", "n_routed_experts"),
    ("sliding_window", "sliding_window_size"),
)
ROPE_KEYS = {"rope_parameters", "rope_scaling", *SYNONYMS[0], *SYNONYMS[1], *LOCAL_BASES}
NEVER_GUESSED = set(SIZES) - {"head_dim", "num_key_value_heads"}
# one of every N layers has full attention, the others have a window or no attention
PERIODS = ("sliding_window_pattern", "full_attention_interval")
# derived values of these keys replace those of config.json, which are in transformers' terms
DERIVED_KEYS = {
    "layer_types",
    "layers_block_type",
    "position_embedding_type",
    "sliding_window_size",
}
ROTATED = re.compile(r"(full|sliding|chunked)_attention")
MISSING = object()
Fields = dict[str, dataclasses.Field[Any]]


def normalize(path: Path, config: dict[str, Any]) -> dict[str, Any]:
    """Return config.json with the keys of both forms.

    Args:
        path: the checkpoint, for messages.
        config: its config.json, of either form.

    Raises:
        CheckpointError: when mlx-lm has no such architecture, its class cannot represent the layer
            types, or transformers' class refuses a setting.
    """
    model_class, args_class = find_classes(path, config)
    fields = settings_fields(sys.modules[model_class.__module__])
    reading = read_as_transformers(config)
    for key, value in reading.refused.items():
        if not re.fullmatch(UNUSED, key):
            raise CheckpointError(
                f"{path}: config.json has {key} {value!r:.60}, which transformers refuses"
            )
    reference = text_reference(reading.reference)
    _check_rope(path, reference)
    check_numbers(path, rope_parameters(text_settings(config), reference))
    both = _both_forms(path, config, reference, fields)
    # a multimodal class may also read a language model's setting outside of text_config
    text = both.get("text_config") or {}
    shared = {field.name for field in dataclasses.fields(args_class)} & text.keys()
    both |= {key: text[key] for key in shared if both.get(key) is None}
    both |= _published_forms(both)
    if reference is not None and reference_config(both) is None:
        raise CheckpointError(
            f"{path}: this {config['model_type']} config.json has no form that both mlx-lm and "
            "transformers read"
        )
    return both


def _both_forms(
    path: Path, config: dict[str, Any], reference: Any, fields: Fields
) -> dict[str, Any]:
    text = config.get("text_config")
    if not isinstance(text, dict):
        return _complete(path, config, reference, fields)
    reference = reference or reference_config(text)
    written = reference.to_diff_dict() if reference else {}
    written = {key: value for key, value in written.items() if key not in NOT_SETTINGS}
    return {**config, "text_config": _complete(path, {**written, **text}, reference, fields)}


def _published_forms(config: dict[str, Any]) -> dict[str, Any]:
    """Return keys of published checkpoints that mlx-vlm reads and transformers 5 renamed."""
    kind, vision, text = (config.get(key) for key in ("model_type", "vision_config", "text_config"))
    forms: dict[str, Any] = {}
    if kind in ("qwen2_vl", "qwen2_5_vl") and isinstance(text, dict):
        forms = {key: value for key, value in text.items() if key not in config}
    if not isinstance(vision, dict):
        return forms
    if kind == "llama4":
        base = (vision.get("rope_parameters") or {}).get("rope_theta", 10_000.0)
        return {"vision_config": {"rope_theta": base, "vision_feature_layer": -1, **vision}}
    if str(kind).startswith("qwen") and vision.get("model_type") == f"{kind}_vision":
        forms["vision_config"] = {**vision, "model_type": kind}
    return forms


def settings_fields(module: ModuleType) -> Fields:
    """Return the fields of the dataclasses of an mlx-lm module, by name."""
    classes = settings_classes(module)
    return {field.name: field for cls in classes for field in dataclasses.fields(cls)}


def settings_classes(module: ModuleType) -> list[Any]:
    """Return the dataclasses of an mlx-lm module, including those of modules that it imports.

    Multimodal modules import the module of their language model.
    """
    classes: list[Any] = []
    for value in vars(module).values():
        if isinstance(value, ModuleType) and value.__name__.startswith("mlx_lm.models."):
            classes += settings_classes(value)
        elif isinstance(value, type) and dataclasses.is_dataclass(value):
            classes.append(value)
    return classes


def _check_rope(path: Path, reference: Any) -> None:
    """Refuse rotary embeddings without a base, or without settings of some layer type."""
    tables = getattr(reference, "rope_parameters", None) or {}
    nested = {kind: table for kind, table in tables.items() if isinstance(table, dict)}
    kinds = {
        kind for kind in getattr(reference, "layer_types", None) or () if ROTATED.fullmatch(kind)
    }
    if nested and kinds - nested.keys():
        raise CheckpointError(
            f"{path}: config.json: rotary embeddings: expected settings of "
            f"{', '.join(sorted(kinds))}, got only {', '.join(sorted(nested))}"
        )
    for table in nested.values() if nested else [tables] * bool(tables):
        if table.get("rope_theta") is None or table.get("rope_type", "") is None:
            raise CheckpointError(
                f"{path}: config.json: rotary embeddings {table}: expected a rope_theta and "
                "a rope_type"
            )


def rope_parameters(config: dict[str, Any], reference: Any) -> dict[str, dict[str, Any]]:
    """Return the settings of rotary embeddings by layer type, with key '' if all are equal.

    Each table has a rope_type and, where config.json or transformers' class has them, a rope_theta
    and a partial_rotary_factor.
    """
    read = getattr(reference, "rope_parameters", None)
    tables = read or config.get("rope_parameters") or config.get("rope_scaling")
    tables = tables if isinstance(tables, dict) else {}
    nested = {kind: table for kind, table in tables.items() if isinstance(table, dict)}
    flat = {} if read else config  # transformers' class has read the other keys already
    return {kind: _rope_table(table, flat) for kind, table in (nested or {"": tables}).items()}


def _rope_table(table: dict[str, Any], config: dict[str, Any]) -> dict[str, Any]:
    table = {key: value for key, value in table.items() if value is not None}
    for names in SYNONYMS[:2]:
        value = next((config[name] for name in names if config.get(name) is not None), None)
        if value is not None:
            table.setdefault(names[0], value)
    kind = table.pop("type", "default")
    kind = str(table.get("rope_type", kind))
    return {**table, "rope_type": ROPE_TYPES.get(kind, kind)}


def _complete(path: Path, config: dict[str, Any], reference: Any, fields: Fields) -> dict[str, Any]:
    """Return a flat table of settings with the missing keys of `fields`."""
    given = {key: value for key, value in config.items() if value is not None}
    known: dict[str, Any] = {"rope_scaling": None} if "rope_scaling" in fields else {}
    derived = derived_keys(reference)
    names = getattr(reference, "attribute_map", {})
    for field in sorted(fields.keys() - ROPE_KEYS):
        if field in NEVER_GUESSED - derived.keys() and names.get(field) not in given:
            continue
        if _is_computed(reference, field) and fields[field].default is not dataclasses.MISSING:
            continue  # transformers cannot set it
        value = _attribute(reference, field)
        if value is MISSING or value is None:
            value = derived.get(field, value)
        if value is not MISSING and _is_plain(value):
            known[field] = copy.deepcopy(value)
    for names in SYNONYMS:
        value = next((given[name] for name in names if name in given), None)
        if value is not None:
            known |= {name: value for name in names if name in fields}
    known |= {key: derived[key] for key in derived.keys() & fields.keys() & ROPE_KEYS}
    rope = _rope_forms(rope_parameters(config, reference), fields)
    layers = {key: derived[key] for key in derived.keys() & fields.keys() & DERIVED_KEYS}
    layers |= _layer_period(path, reference, fields)
    return {**config, **known, **given, **rope, **layers}


def _rope_forms(tables: dict[str, dict[str, Any]], fields: Fields) -> dict[str, Any]:
    """Return the settings of rotary embeddings under the keys of both forms."""
    table = tables.get("full_attention") or next(iter(tables.values()))
    local = tables.get("sliding_attention", table)
    if "rope_theta" not in table or "rope_theta" not in local:
        return {}
    scaling = {k: v for k, v in table.items() if k not in ("rope_theta", "partial_rotary_factor")}
    forms = {
        **{name: table["rope_theta"] for name in SYNONYMS[0] if name in fields},
        **{name: local["rope_theta"] for name in LOCAL_BASES if name in fields},
        **({GLOBAL_BASE: table["rope_theta"]} if LOCAL_BASES[0] in fields else {}),
        "rope_theta": table["rope_theta"],
        "rope_parameters": table if "" in tables else tables,
    }
    if table["rope_type"] != "default" and ("" in tables or "rope_scaling" in fields):
        forms["rope_scaling"] = {**scaling, "type": table["rope_type"]}
    part = table.get(SYNONYMS[1][0])
    if part is not None and all(other.get(SYNONYMS[1][0]) == part for other in tables.values()):
        forms |= {n: part for n in SYNONYMS[1] if n in fields or n == SYNONYMS[1][0]}
    return forms


def _layer_period(path: Path, reference: Any, fields: Fields) -> dict[str, Any]:
    """Return the layer pattern for a class without `layer_types`."""
    types, keys = getattr(reference, "layer_types", None), [key for key in PERIODS if key in fields]
    if not types or not keys or "layer_types" in fields:
        return {}
    is_full = [kind == "full_attention" for kind in types]
    if "str" in str(fields[keys[0]].type):
        pattern = "".join("G" if full else "L" for full in is_full)
        return {keys[0]: None if all(is_full) else pattern}
    period = is_full.index(True) + 1 if True in is_full else getattr(reference, "_" + keys[0], 0)
    if is_full != [period > 0 and (n + 1) % period == 0 for n in range(len(types))]:
        raise CheckpointError(
            f"{path}: config.json: expected periodic layer_types, which is all that mlx-lm's class "
            f"reads, got {types}"
        )
    return {keys[0]: period}


def _is_computed(reference: Any, name: str) -> bool:
    attribute = getattr(type(reference), name, None)
    return isinstance(attribute, property) and attribute.fset is None


def _attribute(reference: Any, name: str) -> Any:
    try:
        return getattr(reference, name, MISSING)
    except Exception:  # transformers has no common value if layers differ
        return MISSING


def _is_plain(value: Any) -> bool:
    """Return whether `value` can be an entry of config.json."""
    if isinstance(value, dict):
        return all(isinstance(key, str) and _is_plain(v) for key, v in value.items())
    if isinstance(value, (list, tuple)):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, (str, int, float))
