"""Working directory that one process at a time locks, and that survives a killed process.

The lock is a kernel lock on the directory itself: it ends with the process, so it is never stale.
A marker file in the directory holds the process id and shows that this program created the
directory; no other directory is reused or removed.
"""

import errno
import fcntl
import os
import re
import stat
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from splitquant_mlx.errors import TargetError
from splitquant_mlx.runtime.disk import remove

MARKER = "held-by"
UNSUPPORTED = (errno.ENOTSUP, errno.ENOSYS, errno.ENOLCK)


@contextmanager
def workspace(
    directory: Path, work: str, *, leave_on_interrupt: Callable[[], bool] = lambda: False
) -> Iterator[None]:
    """Create or reuse `directory` and lock it; remove it at the end of the block.

    A reused directory has whatever content a killed process, or a user, left in it.

    Args:
        directory: its parent must exist.
        work: what is done in it, for messages, such as "a conversion into PATH".
        leave_on_interrupt: returns whether to leave the directory after an interrupt by the user.

    Raises:
        TargetError: when another process has locked it, or it is not a working directory.
        OSError: when it cannot be created.
    """
    lock = _acquire(directory, work)
    leave = False
    try:
        yield
    except KeyboardInterrupt:
        leave = leave_on_interrupt()
        raise
    finally:
        try:
            if not leave:
                _clear(directory)
        finally:
            os.close(lock)


def empty(directory: Path, keep: Sequence[str] = ()) -> None:
    """Remove the content of a workspace, except the names in `keep`."""
    for path in directory.iterdir():
        if path.name not in (MARKER, *keep):
            remove(path)


def _acquire(directory: Path, work: str) -> int:
    """Create and lock the directory; return its descriptor, which holds the lock."""
    while True:
        with suppress(FileExistsError):
            directory.mkdir()
        try:
            lock = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        except FileNotFoundError:
            continue  # the process that held the lock has just removed it
        except OSError as exc:
            if exc.errno in (errno.ENOTDIR, errno.ELOOP):
                raise _in_the_way(directory, "is not a directory") from exc
            raise
        try:
            if not try_lock(lock):
                raise TargetError(
                    f"{work} is already running in {_holder(lock)}: wait until it ends, or stop it"
                )
            if is_at(directory, lock):
                _write_marker(directory, lock)
                return lock
        except BaseException:
            os.close(lock)
            raise
        os.close(lock)  # the directory was removed before it was locked


def try_lock(descriptor: int) -> bool:
    """Lock a directory; return False if another descriptor or process has locked it."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as exc:
        if exc.errno not in UNSUPPORTED:  # on a file system without locks, go on unlocked
            raise
    return True


def is_at(directory: Path, descriptor: int) -> bool:
    """Return whether a descriptor is of the directory that is now at the path."""
    try:
        return os.path.samestat(directory.lstat(), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def _write_marker(directory: Path, lock: int) -> None:
    """Write this process's id into the marker file. Raises TargetError for foreign content."""
    if os.fstat(lock).st_uid != os.geteuid():
        raise _in_the_way(directory, "belongs to another user")
    names = os.listdir(lock)
    if names and MARKER not in names:
        raise _in_the_way(directory, "contains files of other programs")
    flags = os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK
    try:
        marker = os.open(MARKER, flags, 0o666, dir_fd=lock)
    except OSError as exc:
        if exc.errno in (errno.ELOOP, errno.EISDIR, errno.ENXIO):
            raise _in_the_way(directory / MARKER, "is not a regular file") from exc
        raise
    try:
        status = os.fstat(marker)
        if not stat.S_ISREG(status.st_mode) or status.st_nlink != 1:
            raise _in_the_way(directory / MARKER, "is not a regular file with one link")
        os.ftruncate(marker, 0)
        os.write(marker, b"%d\n" % os.getpid())
    finally:
        os.close(marker)


def _holder(lock: int) -> str:
    """Return the process named in the marker file, for a message."""
    with suppress(OSError):
        marker = os.open(MARKER, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK, dir_fd=lock)
        try:
            is_file = stat.S_ISREG(os.fstat(marker).st_mode)
            match = re.fullmatch(rb"(\d{1,10})\n", os.read(marker, 16) if is_file else b"")
        finally:
            os.close(marker)
        if match:
            return f"process {int(match[1])}"
    return "another process"


def _clear(directory: Path) -> None:
    """Remove the directory, its marker last, so that it can be reused after a kill."""
    with suppress(OSError):
        empty(directory)
        if os.listdir(directory) == [MARKER]:
            (directory / MARKER).unlink()
        directory.rmdir()


def _in_the_way(path: Path, why: str) -> TargetError:
    return TargetError(f"{path} is in the way: it {why}: remove it or choose another location")
