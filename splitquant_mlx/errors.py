"""Errors that a user can act on: one root class and a subclass for each kind.

A message is one line: what failed, in which tensor or file, the expected and the actual value, and
what to do. The command line prints it and exits with code 2; the library only raises.
"""

from collections.abc import Iterable
from difflib import get_close_matches


class SplitQuantError(Exception):
    """Base class of all errors of this package."""


class SplitQuantWarning(UserWarning):
    """Behaviour that a user may not expect; the command line shows it as a note."""


def one_line(text: object) -> str:
    """Return a text, such as an exception's message, on one line without control characters."""
    return " ".join("".join(c if c.isprintable() else " " for c in str(text)).split())


def abbreviate(names: Iterable[str], most: int = 3) -> str:
    """Join the first `most` of `names`, sorted, and append the number of the rest."""
    listed = sorted(names)
    more = f" and {len(listed) - most} more" if len(listed) > most else ""
    return ", ".join(listed[:most]) + more


def closest_word(word: str, known: Iterable[str]) -> str | None:
    """Return the known word most similar to `word`; None if none is close."""
    return next(iter(get_close_matches(word, list(known), n=1, cutoff=0.7)), None)


class SourceError(SplitQuantError):
    """The model cannot be reached: no such path or repository, gated, no network."""


class CheckpointError(SplitQuantError):
    """The checkpoint cannot be used: truncated, corrupt, incomplete, unknown."""


class VersionError(SplitQuantError):
    """An installed package is too old or too new."""


class RecipeError(SplitQuantError):
    """A setting is unknown, out of range or in conflict with others.

    Args:
        reason: what is wrong.
        field: name of the setting, which begins the message; empty for several or none.
    """

    def __init__(self, reason: str, *, field: str = ""):
        super().__init__(f"{field}: {reason}" if field else reason)
        self.reason, self.field = reason, field


class MemoryTooSmallError(SplitQuantError):
    """The machine has too little memory."""


class DeviceError(SplitQuantError):
    """The model does not run on this device."""


class UploadError(SplitQuantError):
    """The model cannot be uploaded: no log-in, no permission, no quota, no network."""


class TargetError(SplitQuantError):
    """The output cannot be written: it exists, is not writable, or the disk is full."""


class RankError(SplitQuantError):
    """Another process of a distributed run cannot be reached."""


class FailedElsewhere(SplitQuantError):
    """Another process of a distributed run failed; the message is its own."""
