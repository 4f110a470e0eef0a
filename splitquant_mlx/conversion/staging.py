"""Put a converted checkpoint in its place: all of it, or nothing.

Everything that a conversion writes lies in one hidden directory beside the target, which is held
with a lock: the `model` to be, the journal of what is finished, an unpacked source. At the end the
model is synchronized and renamed to the target. A process that is killed leaves that directory, and
the next conversion into the same target takes it over.
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
OLD = "replaced"  # the former target while it is replaced
MAX_JOURNAL_BYTES = 1 << 28


@contextmanager
def staged(target: Path, *, overwrite: bool = False, source: Path | None = None) -> Iterator[Path]:
    """Yield a directory to work in, whose `model` becomes `target` when the block ends well.

    Of a conversion that was killed, the directory holds the JOURNAL and the `model` as they were
    left. On an error it is removed, and on an interrupt where no file of weights was finished;
    `target` is as it was.

    Raises:
        TargetError: when `target` exists and `overwrite` is not set, when it exists and is not a
            model directory or holds `source`, when another process writes it, or when it cannot
            be written or the disk is full.
    """
    target = _absolute(target)
    check_target(target, overwrite=overwrite, source=source)
    staging = _staging(target)
    with (
        as_target_error(target),
        _made_parents(target),
        workspace(
            staging,
            f"a conversion into {target}",
            is_worth=lambda: _has_finished_shards(staging / JOURNAL),
        ),
    ):
        try:
            _tidy(staging)
            (staging / MODEL).mkdir(exist_ok=True)
            yield staging
            for path in (staging / MODEL, *(staging / MODEL).rglob("*")):
                sync(path)
            check_target(target, overwrite=overwrite, source=source)  # hours may have passed
            _put(staging, target)
        finally:
            if os.path.lexists(staging / OLD) and not os.path.lexists(target):
                (staging / OLD).rename(target)


def sweep(target: Path) -> None:
    """Remove what a conversion leaves that was killed when `target` was in its place already."""
    target = _absolute(target)
    staging = _staging(target)
    with suppress(TargetError, OSError):
        if os.path.lexists(target) and staging.is_dir() and not (staging / MODEL).exists():
            with workspace(staging, ""):
                pass  # its end removes it


def check_target(target: Path, *, overwrite: bool = False, source: Path | None = None) -> None:
    """Raise TargetError when `target` may not be written; see `staged`."""
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
            raise TargetError(f"{target} is a mount point: give a directory inside it")
        if source is not None and source.resolve().is_relative_to(target.resolve()):
            raise TargetError(
                f"{target} holds the model to convert: it is never overwritten, choose another "
                "--mlx-path"
            )


def _absolute(target: Path) -> Path:
    try:
        if "\0" in str(target):
            raise TargetError(f"cannot write {str(target)!r}: a path holds no NUL character")
        str(target).encode()  # mlx writes to no other path
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
        raise TargetError(f"cannot write {target}: give a directory inside it")
    return target.with_name(f".{target.name}.partial")


def _has_finished_shards(journal: Path) -> bool:
    try:
        return len(journal.read_bytes().splitlines()) > 1  # the first line says what of
    except OSError:
        return False


def _tidy(staging: Path) -> None:
    """Leave only what can be gone on with; somebody may have put the rest there."""
    empty(staging, keep=(MODEL, JOURNAL, REFINEMENT, OLD))
    for name in (MODEL, JOURNAL, REFINEMENT, OLD):
        path = staging / name
        if path.is_symlink() or not (path.is_file() if name == JOURNAL else path.is_dir()):
            remove(path)
        elif name == JOURNAL and path.stat().st_size > MAX_JOURNAL_BYTES:
            remove(path)


@contextmanager
def _made_parents(target: Path) -> Iterator[None]:
    """Make the directories above `target`; they go again when the block ends with an error."""
    made = [parent for parent in target.parents if not parent.exists()]
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        for parent in made:
            sync(parent.parent)
        yield
    except BaseException:
        for parent in made:
            with suppress(OSError):
                parent.rmdir()
        raise


def _put(staging: Path, target: Path) -> None:
    """Rename the model to the target; a former one is moved aside first."""
    if os.path.lexists(target):
        remove(staging / OLD)
        target.rename(staging / OLD)
    (staging / MODEL).rename(target)
    sync(target.parent)
