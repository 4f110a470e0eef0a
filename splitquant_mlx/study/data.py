"""The questions and the text that a study measures on, from files or from the hub."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from splitquant_mlx.data.questions import Question, fetch_questions, load_questions
from splitquant_mlx.data.text import fetch_wikitext, load_text
from splitquant_mlx.errors import SourceError


@dataclass(kw_only=True)
class Data:
    """Data sets, read once; those that cannot be fetched are recorded.

    Attributes:
        files: in place of the hub's data sets, by "arc_challenge", "arc_easy" and "text".
        missing: why a data set could not be fetched, by the same names.
    """

    files: dict[str, Path] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._kept: dict[str, Any] = {}

    def questions(self, task: str, limit: int) -> list[Question]:
        """Return the first `limit` questions (0: all) of a task; none where they are missing."""
        found = self._get(task, load_questions, lambda: fetch_questions(task))
        return (found or [])[: limit or None]

    def text(self) -> str | None:
        """Return the text; None where it is missing."""
        return self._get("text", load_text, fetch_wikitext)

    def _get(self, name: str, read: Callable[[Path], Any], fetch: Callable[[], Any]) -> Any:
        if name not in self._kept:
            try:
                file = self.files.get(name)
                self._kept[name] = read(file) if file else fetch()
            except SourceError as exc:
                if name in self.files:
                    raise
                self._kept[name] = None
                self.missing[name] = str(exc)
        return self._kept[name]
