"""Questions and text for the measurements of a study, from files or from the hub."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from splitquant_mlx.data.questions import Question, fetch_questions, load_questions
from splitquant_mlx.data.text import fetch_wikitext, load_text
from splitquant_mlx.errors import SourceError


@dataclass(kw_only=True)
class Data:
    """Data sets of a study, each read once.

    Attributes:
        files: files to use instead of the hub's data sets, by "arc_challenge", "arc_easy", "text".
        missing: the error of each data set that could not be fetched, by the same names.
    """

    files: dict[str, Path] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._loaded: dict[str, Any] = {}

    def questions(self, task: str, limit: int) -> list[Question]:
        """Return the first `limit` questions (0: all) of a task; empty if missing."""
        questions = self._get(task, load_questions, lambda: fetch_questions(task))
        return (questions or [])[: limit or None]

    def text(self) -> str | None:
        """Return the text; None if missing."""
        return self._get("text", load_text, fetch_wikitext)

    def _get(self, name: str, read: Callable[[Path], Any], fetch: Callable[[], Any]) -> Any:
        if name not in self._loaded:
            try:
                file = self.files.get(name)
                self._loaded[name] = read(file) if file else fetch()
            except SourceError as exc:
                if name in self.files:
                    raise
                self._loaded[name] = None
                self.missing[name] = str(exc)
        return self._loaded[name]
