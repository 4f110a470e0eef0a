"""Find keys of a config.json that mlx-lm's classes read and transformers ignores.

Some keys exist in mlx-lm only (`rope_traditional`), others have a form that transformers does not
read. A key is found by removing it: if it is foreign, transformers' configuration is unchanged and
mlx-lm's differs.
"""

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from splitquant_mlx.models.architecture import find_classes
from splitquant_mlx.models.config import text_settings
from splitquant_mlx.models.config_forms import normalize, settings_classes, settings_fields
from splitquant_mlx.models.reference import reference_config, text_reference

Config = dict[str, Any]


def foreign_keys(
    path: Path, config: Config, harmless: Callable[[str, Any], bool]
) -> Iterator[tuple[str, Any]]:
    """Yield the keys that only mlx-lm reads, each with its default value.

    Lists and objects are skipped: they describe differences between layers, which show in the
    tensors.

    Args:
        path: the checkpoint, for messages.
        config: config.json, normalized, of an architecture that transformers has.
        harmless: returns whether a key with a value need not be checked.
    """
    module = sys.modules[find_classes(path, config)[0].__module__]
    text = text_reference(reference_config(config))
    known = {*type(text)().to_dict(), *getattr(text, "attribute_map", {})}
    table = text_settings(config)
    for key in sorted(settings_fields(module).keys() & table.keys() - known):
        value = table[key]
        if not isinstance(value, (bool, int, float, str)) or harmless(key, value):
            continue
        if _is_read(config, key):
            continue
        other = text_settings(normalize(path, _with(config, key)))
        for cls in settings_classes(module):
            if key in cls.__dataclass_fields__:
                try:
                    one, two = (cls.from_dict(settings) for settings in (table, other))
                except Exception:  # another submodule's class, or one that requires the key
                    continue
                if _values(one) != _values(two):
                    yield key, getattr(two, key, None)


def _is_read(config: Config, key: str) -> bool:
    """Return whether removing or changing a key changes transformers' configuration."""
    value = text_settings(config)[key]
    changed = value + "?" if isinstance(value, str) else type(value)(1 - value)
    references = [reference_config(other) for other in (config, _with(config, key))]
    references.append(reference_config(_with(config, key, changed)))
    if None in references:
        return True
    first, *others = (_with(reference.to_dict(), key) for reference in references)
    return any(other != first for other in others)


def _values(settings: Any) -> Config:
    """Return the settings of a class, with text as a list of letters, one per layer."""
    values = vars(settings).items()
    return {name: list(value) if isinstance(value, str) else value for name, value in values}


def _with(config: Config, key: str, value: Any = None) -> Config:
    """Return `config` with a setting of the language model replaced; None removes it."""
    others = {name: setting for name, setting in config.items() if name != key}
    if isinstance(others.get("text_config"), dict):
        return {**others, "text_config": _with(others["text_config"], key, value)}
    return others if value is None else {**others, key: value}
