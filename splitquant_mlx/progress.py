"""Describe progress without showing it: the library reports, the command line draws.

Library functions take a `Progress` and default to `Silent`, so nothing prints unless asked.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol


class Progress(Protocol):
    """Receive the progress of named tasks."""

    def task(
        self, label: str, total: float | None = None
    ) -> AbstractContextManager[Callable[[float], None]]:
        """Open a task of `total` steps (None: unknown); yields a function that advances it."""
        ...


class Silent:
    """Drop all progress."""

    @contextmanager
    def task(self, label: str, total: float | None = None) -> Iterator[Callable[[float], None]]:
        """Yield a function that does nothing."""
        yield lambda amount: None
