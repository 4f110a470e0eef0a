"""Find what mlx-lm's classes follow in a config.json and transformers ignores.

mlx-lm's classes have keys of their own (`rope_traditional`), and some of a form that transformers
does not read. A model of transformers computes the same whatever they say. Which they are shows
when a key is taken away: transformers reads the same, and mlx-lm's settings are others.
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
    """Yield the keys that mlx-lm alone follows, each with the value that it has by default.

    Lists and tables say how layers differ, which their tensors show.

    Args:
        path: the checkpoint, for messages.
        config: config.json, normalized, of an architecture that transformers has.
        harmless: tells of a key and its value that it need not be looked at.
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
                except Exception:  # a part's class, or one that cannot do without the key
                    continue
                if _values(one) != _values(two):
                    yield key, getattr(two, key, None)


def _is_read(config: Config, key: str) -> bool:
    """Tell whether transformers reads something else where a key is gone, or changed."""
    value = text_settings(config)[key]
    changed = value + "?" if isinstance(value, str) else type(value)(1 - value)
    found = [reference_config(other) for other in (config, _with(config, key))]
    found.append(reference_config(_with(config, key, changed)))
    if None in found:
        return True
    first, *others = (_with(reference.to_dict(), key) for reference in found)
    return any(other != first for other in others)


def _values(settings: Any) -> Config:
    """Return the settings of a class; a letter for each layer is as good as a list of them."""
    values = vars(settings).items()
    return {name: list(value) if isinstance(value, str) else value for name, value in values}


def _with(config: Config, key: str, value: Any = None) -> Config:
    """Return a config.json with another value for a key of the language model; None for none."""
    kept = {name: held for name, held in config.items() if name != key}
    if isinstance(kept.get("text_config"), dict):
        return {**kept, "text_config": _with(kept["text_config"], key, value)}
    return kept if value is None else {**kept, key: value}
