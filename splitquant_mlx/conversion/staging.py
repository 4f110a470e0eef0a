"""Write a converted checkpoint atomically.

A conversion writes to one hidden, locked directory next to the target: the `model`, the journal of
finished work, an unpacked source. At the end the model is synchronized to disk and renamed to the
target. If the process is killed, the directory remains, and the next conversion to the same target
resumes from it.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from splitquant_mlx.errors import TargetError
from splitquant_mlx.runtime.disk import as_target_error, remove, sync
from splitquant_mlx.runtime.workspace import empty, workspace

MODEL = "model"
JOURNAL = "journal"
REFINEMENT = "refinement"
OLD = "replaced"  # the previous target while it is being replaced
MAX_JOURNAL_BYTES = 1 << 28


@contextmanager
def staged(target: Path, *, overwrite: bool = False, source: Path | None = None) -> Iterator[Path]:
    """Yield a working directory whose `model` becomes `target` when the block ends.

    After a killed conversion, the directory contains its JOURNAL and `model`. The directory is
    removed on an error, and on an interrupt if no shard was finished; `target` is then unchanged.

    Raises:
        TargetError: `target` exists and `overwrite` is not set, it exists and is not a model
            directory or contains `source`, another process writes it, it cannot be written, or the
            disk is full.
    """
    target = _absolute(target)
    check_target(target, overwrite=overwrite, source=source)
    staging = _staging(target)
    with (
        as_target_error(target),
        _created_parents(target),
        workspace(
            staging,
            f"a conversion into {target}",
            leave_on_interrupt=lambda: _has_finished_shards(staging / JOURNAL),
        ),
    ):
        try:
            _remove_foreign(staging)
            (staging / MODEL).mkdir(exist_ok=True)
            yield staging
            for path in (staging / MODEL, *(staging / MODEL).rglob("*")):
                sync(path)
            check_target(
                target, overwrite=overwrite, source=source
            )  # it may have changed meanwhile
            _move(staging, target)
        finally:
            if os.path.lexists(staging / OLD) and not os.path.lexists(target):
                (staging / OLD).rename(target)


def remove_leftover(target: Path) -> None:
    """Remove the directory of a conversion that was killed after `target` was renamed."""
    target = _absolute(target)
    staging = _staging(target)
    with suppress(TargetError, OSError):
        if os.path.lexists(target) and staging.is_dir() and not (staging / MODEL).exists():
            with workspace(staging, ""):
                pass  # removed at the end of the block


def check_target(target: Path, *, overwrite: bool = False, source: Path | None = None) -> None:
    """Raise TargetError if `target` must not be written; see `staged`."""
    target = _absolute(target)
    with as_target_error(target):
        parent = next((p for p in target.parents if os.path.lexists(p)), target)
        if not parent.is_dir():
            raise TargetError(f"cannot write {target}: {parent} is not a directory")
        try:
            target.lstat()
        except FileNotFoundError:
            return
        if not overwrite:
            raise TargetError(
                f"{target} exists already: choose another --mlx-path, or pass --overwrite to "
                "replace it"
            )
        if target.is_symlink() or not target.is_dir():
            raise TargetError(
                f"{target} is not a directory: it is never overwritten, remove it first"
            )
        if any(target.iterdir()) and not (target / "config.json").is_file():
            raise TargetError(
                f"{target} is not a model directory (it has no config.json): it is never "
                "overwritten: choose another --mlx-path"
            )
        if os.path.ismount(target):
            raise TargetError(f"{target} is a mount point: use a directory inside it")
        if source is not None and source.resolve().is_relative_to(target.resolve()):
            raise TargetError(
                f"{target} contains the model to convert: it is never overwritten, choose another "
                "--mlx-path"
            )


def _absolute(target: Path) -> Path:
    try:
        if "\0" in str(target):
            raise TargetError(
                f"cannot write {str(target)!r}: a path cannot contain a NUL character"
            )
        str(target).encode()  # mlx requires UTF-8 paths
        return Path(os.path.abspath(target.expanduser()))
    except RuntimeError as exc:
        raise TargetError(f"cannot write {target}: there is no such user's home") from exc
    except UnicodeEncodeError as exc:
        raise TargetError(
            f"cannot write {str(target)!a}: expected a path that UTF-8 can encode, got half a "
            "character: choose another --mlx-path"
        ) from exc


def _staging(target: Path) -> Path:
    if not target.name:
        raise TargetError(f"cannot write {target}: use a directory inside it")
    return target.with_name(f".{target.name}.partial")


def _has_finished_shards(journal: Path) -> bool:
    try:
        return len(journal.read_bytes().splitlines()) > 1  # the first line is the key
    except OSError:
        return False


def _remove_foreign(staging: Path) -> None:
    """Remove everything that a conversion cannot resume from, or that others put there."""
    empty(staging, keep=(MODEL, JOURNAL, REFINEMENT, OLD))
    for name in (MODEL, JOURNAL, REFINEMENT, OLD):
        path = staging / name
        if path.is_symlink() or not (path.is_file() if name == JOURNAL else path.is_dir()):
            remove(path)
        elif name == JOURNAL and path.stat().st_size > MAX_JOURNAL_BYTES:
            remove(path)


@contextmanager
def _created_parents(target: Path) -> Iterator[None]:
    """Create the parents of `target`; remove them if the block ends with an error."""
    created = [parent for parent in target.parents if not parent.exists()]
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        for parent in created:
            sync(parent.parent)
        yield
    except BaseException:
        for parent in created:
            with suppress(OSError):
                parent.rmdir()
        raise


def _move(staging: Path, target: Path) -> None:
    """Rename the model to the target; move a previous target aside first."""
    if os.path.lexists(target):
        remove(staging / OLD)
        target.rename(staging / OLD)
    (staging / MODEL).rename(target)
    sync(target.parent)
