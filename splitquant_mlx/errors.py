"""Name what can go wrong: one root, one child for each thing a user can act on.

A message says what failed, in which tensor or file, what was found, what was wanted and what to
do, on one line. The command line prints it and exits with 2; the library only raises.
"""

from collections.abc import Iterable
from difflib import get_close_matches


class SplitQuantError(Exception):
    """Root of every error this package raises on purpose."""


class SplitQuantWarning(UserWarning):
    """Says what was done otherwise than one may expect; the command line shows it as a note."""


def one_line(text: object) -> str:
    """Return a text, such as an exception's message, on one line that cannot drive a terminal."""
    return " ".join("".join(c if c.isprintable() else " " for c in str(text)).split())


def some(names: Iterable[str], most: int = 3) -> str:
    """Join the first few of `names`, sorted, and say how many more there are."""
    listed = sorted(names)
    more = f" and {len(listed) - most} more" if len(listed) > most else ""
    return ", ".join(listed[:most]) + more


def meant(word: str, known: Iterable[str]) -> str | None:
    """Return the known word that `word` looks like a misspelling of."""
    return next(iter(get_close_matches(word, list(known), n=1, cutoff=0.7)), None)


class SourceError(SplitQuantError):
    """Report that the model to read cannot be reached: no such path or repo, gated, no network."""


class CheckpointError(SplitQuantError):
    """Report that a checkpoint's content is unusable: truncated, corrupt, incomplete, unknown."""


class VersionError(SplitQuantError):
    """Report an installed package that is too old, or too new, for what is used of it."""


class RecipeError(SplitQuantError):
    """Report a setting that is unknown, out of range or does not fit the others."""


class MemoryTooSmallError(SplitQuantError):
    """Report work that needs more memory than this machine has."""


class UploadError(SplitQuantError):
    """Report that a model cannot be sent to the hub: no log-in, no right, no room, no network."""


class TargetError(SplitQuantError):
    """Report that the output cannot be written: it exists, is not writable, the disk is full."""


class RankError(SplitQuantError):
    """Report that another process of a distributed run cannot be reached."""


class FailedElsewhere(SplitQuantError):
    """Report that another process of a distributed run failed, and what it says."""
