"""Take from a model's README what every copy of the model must repeat: licence, languages, tags.

The README of a hub repo opens with a table in YAML between two lines of three dashes. It is read
when the model is converted and kept in the manifest, since the source may be out of reach, or
changed, when the result is published.
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

KEYS = (
    "license", "license_name", "license_link", "language", "base_model", "pipeline_tag", "tags",
)  # fmt: skip
BLOCK = re.compile(r"\ufeff?\s*---[ \t]*\r?\n(.*?\n)---[ \t]*(?:\r?\n|$)", re.DOTALL)
MAX_CHARACTERS = 1 << 16  # some seconds of parsing at worst
MOST = 50

Card = dict[str, Any]


def read_source_card(directory: Path) -> Card:
    """Return the table of `directory`/README.md, checked; empty where there is none to be read."""
    file = directory / "README.md"
    try:
        if not file.is_file():
            return {}
        with file.open(encoding="utf-8", errors="replace") as opened:
            block = BLOCK.match(opened.read(MAX_CHARACTERS))
        # this loader makes text of everything: `no` stays a language, and it merges no tables
        found = yaml.load(block[1], yaml.BaseLoader) if block else {}
    except (OSError, ValueError, RecursionError, yaml.YAMLError):
        return {}
    return check_source_card(found) if isinstance(found, dict) else {}


def write_source_card(values: Mapping[str, Any], directory: Path) -> None:
    """Write the known entries as the table of `directory`/README.md."""
    table = json.dumps(check_source_card(values))  # JSON is YAML
    (directory / "README.md").write_text(f"---\n{table}\n---\n", encoding="utf-8")


def check_source_card(values: Mapping[str, Any]) -> Card:
    """Return the known entries: printable lines, or lists of them. The rest is left out."""
    card: Card = {}
    for key in KEYS:
        value = values.get(key)
        lines = [item for item in (value if isinstance(value, list) else [value]) if _line(item)]
        if lines:
            card[key] = lines[:MOST] if isinstance(value, list) else lines[0]
    return card


def _line(value: Any) -> bool:
    short = isinstance(value, str) and len(value) <= 200
    return short and value.isprintable() and value.strip() != ""
