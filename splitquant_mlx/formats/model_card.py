"""Read the licence, languages and tags in a model's README, which copies of it must repeat.

The README of a hub repo starts with a YAML table between two lines of three dashes. It is read
during conversion and stored in the manifest, since the source may be unavailable or changed when
the result is published.
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
MAX_CHARACTERS = 1 << 16  # a few seconds of parsing at worst
MAX_ITEMS = 50

Card = dict[str, Any]


def read_source_card(directory: Path) -> Card:
    """Return the checked table of `directory`/README.md; empty if there is none or unreadable."""
    file = directory / "README.md"
    try:
        if not file.is_file():
            return {}
        with file.open(encoding="utf-8", errors="replace") as opened:
            block = BLOCK.match(opened.read(MAX_CHARACTERS))
        # BaseLoader returns all scalars as text (`no` stays a language) and merges no tables
        card = yaml.load(block[1], yaml.BaseLoader) if block else {}
    except (OSError, ValueError, RecursionError, yaml.YAMLError):
        return {}
    return check_source_card(card) if isinstance(card, dict) else {}


def write_source_card(values: Mapping[str, Any], directory: Path) -> None:
    """Write the known entries as the table of `directory`/README.md."""
    table = json.dumps(check_source_card(values))  # JSON is YAML
    (directory / "README.md").write_text(f"---\n{table}\n---\n", encoding="utf-8")


def check_source_card(values: Mapping[str, Any]) -> Card:
    """Return the known entries that are printable lines or lists of them; the rest is dropped."""
    card: Card = {}
    for key in KEYS:
        value = values.get(key)
        lines = [item for item in (value if isinstance(value, list) else [value]) if _is_line(item)]
        if lines:
            card[key] = lines[:MAX_ITEMS] if isinstance(value, list) else lines[0]
    return card


def _is_line(value: Any) -> bool:
    short = isinstance(value, str) and len(value) <= 200
    return short and value.isprintable() and value.strip() != ""
