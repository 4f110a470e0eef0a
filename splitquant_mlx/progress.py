"""Progress reporters: the library reports, the command line displays.

Library functions take a `Progress` and default to `SILENT`, so nothing prints unless asked.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol

# labels of the tasks of a conversion, which the command line numbers
UNPACKING = "Unpacking"
CHECKING = "Checking the model"
SAMPLING = "Sampling text"
MEASURING = "Measuring sensitivities"
QUANTIZING = "Quantizing"
PREDICTING = "Running the original"
REFINING = "Refining"


class Advance(Protocol):
    """Function that advances a task by an amount; `note` is shown beside its label."""

    def __call__(self, amount: float, note: str = "") -> None:
        """Advance."""
        ...


class Progress(Protocol):
    """Receiver of the progress of named tasks."""

    def task(self, label: str, total: float | None = None) -> AbstractContextManager[Advance]:
        """Open a task of `total` steps (None: unknown); yields a function that advances it."""
        ...

    def note(self, text: str) -> None:
        """Receive a line for the user, such as where an interrupted task resumes."""
        ...


class Silent:
    """Reporter that ignores everything."""

    @contextmanager
    def task(self, label: str, total: float | None = None) -> Iterator[Advance]:
        """Yield a function that does nothing."""
        yield lambda amount, note="": None

    def note(self, text: str) -> None:
        """Ignore a line."""


SILENT = Silent()  # default of library functions
