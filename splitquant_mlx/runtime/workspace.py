"""Hold a directory for one process at a time, and take over what a killed one left in it.

The lock is the kernel's, on the directory itself: it ends with the process, however that ends, so
no lock is ever stale. A file in the directory names the process, and tells that the directory was
made here: no other is taken over or removed.
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

MARK = "held-by"
UNSUPPORTED = (errno.ENOTSUP, errno.ENOSYS, errno.ENOLCK)


@contextmanager
def workspace(
    directory: Path, work: str, *, is_worth: Callable[[], bool] = lambda: False
) -> Iterator[None]:
    """Make `directory`, or take it over, and hold it; the end of the block removes it.

    What lies in a directory taken over is as a killed process left it, or as somebody made it.

    Args:
        directory: its parent must exist.
        work: what is done in it, for messages, such as "a conversion into PATH".
        is_worth: asked after an interrupt by the user whether to leave the directory for the next.

    Raises:
        TargetError: when another process holds it, or it is no directory of this kind.
        OSError: when it cannot be made.
    """
    lock = _hold(directory, work)
    is_left = False
    try:
        yield
    except KeyboardInterrupt:
        is_left = is_worth()
        raise
    finally:
        try:
            if not is_left:
                _clear(directory)
        finally:
            os.close(lock)


def empty(directory: Path, keep: Sequence[str] = ()) -> None:
    """Remove what lies in a workspace, but for what is named in `keep`."""
    for path in directory.iterdir():
        if path.name not in (MARK, *keep):
            remove(path)


def _hold(directory: Path, work: str) -> int:
    """Return the descriptor that holds the lock."""
    while True:
        with suppress(FileExistsError):
            directory.mkdir()
        try:
            lock = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        except FileNotFoundError:
            continue  # its holder has just removed it
        except OSError as exc:
            if exc.errno in (errno.ENOTDIR, errno.ELOOP):
                raise _in_the_way(directory, "is no directory") from exc
            raise
        try:
            if _is_locked(lock):
                raise TargetError(
                    f"{work} is under way already, in {_holder(lock)}: wait for its end, or stop it"
                )
            if _is_at(directory, lock):
                _claim(directory, lock)
                return lock
        except BaseException:
            os.close(lock)
            raise
        os.close(lock)  # its holder removed it before the lock was had


def _is_locked(descriptor: int) -> bool:
    """Take the lock; tell whether another process has it."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError as exc:
        if exc.errno not in UNSUPPORTED:  # a file system without locks does without
            raise
    return False


def _is_at(directory: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(directory.lstat(), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def _claim(directory: Path, lock: int) -> None:
    """Name this process in the directory, if it is one of ours."""
    if os.fstat(lock).st_uid != os.geteuid():
        raise _in_the_way(directory, "is another user's")
    names = os.listdir(lock)
    if names and MARK not in names:
        raise _in_the_way(directory, "holds files that are not of this program")
    flags = os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK
    try:
        mark = os.open(MARK, flags, 0o666, dir_fd=lock)
    except OSError as exc:
        if exc.errno in (errno.ELOOP, errno.EISDIR, errno.ENXIO):
            raise _in_the_way(directory / MARK, "is no file of this program") from exc
        raise
    try:
        status = os.fstat(mark)
        if not stat.S_ISREG(status.st_mode) or status.st_nlink != 1:
            raise _in_the_way(directory / MARK, "is no file of this program")
        os.ftruncate(mark, 0)
        os.write(mark, b"%d\n" % os.getpid())
    finally:
        os.close(mark)


def _holder(lock: int) -> str:
    """Name the process that holds the directory."""
    with suppress(OSError):
        mark = os.open(MARK, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK, dir_fd=lock)
        try:
            is_file = stat.S_ISREG(os.fstat(mark).st_mode)
            found = re.fullmatch(rb"(\d{1,10})\n", os.read(mark, 16) if is_file else b"")
        finally:
            os.close(mark)
        if found:
            return f"process {int(found[1])}"
    return "another process"


def _clear(directory: Path) -> None:
    """Remove the directory, its mark last, so that a kill leaves it to be taken over."""
    with suppress(OSError):
        empty(directory)
        if os.listdir(directory) == [MARK]:
            (directory / MARK).unlink()
        directory.rmdir()


def _in_the_way(path: Path, why: str) -> TargetError:
    return TargetError(f"{path} is in the way: it {why}: remove it, or choose another place")
