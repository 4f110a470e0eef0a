"""Write files durably and atomically; hash and remove files."""

import errno
import fcntl
import hashlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from splitquant_mlx.errors import TargetError

CHUNK_BYTES = 1 << 18


def sync(path: Path) -> None:
    """Flush a file's content, or a directory's entries, to the disk. Raises OSError."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        sync_descriptor(descriptor)
    finally:
        os.close(descriptor)


def sync_descriptor(descriptor: int) -> None:
    """Flush an open file to the disk."""
    os.fsync(descriptor)
    # on macOS, fsync leaves the data in the drive's cache
    if (full := getattr(fcntl, "F_FULLFSYNC", None)) is not None:
        with suppress(OSError):  # not supported by this file system
            fcntl.fcntl(descriptor, full)


def write_atomic(file: Path, content: bytes) -> None:
    """Write a file atomically: readers see the old content or the new. Raises OSError.

    A killed process may leave `.NAME.partial`, which the next call overwrites.
    """
    partial = file.with_name(f".{file.name}.partial")
    try:
        with open(partial, "wb", opener=_no_link) as stream:
            stream.write(content)
            stream.flush()
            sync_descriptor(stream.fileno())
        os.replace(partial, file)
        sync(file.parent)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


@contextmanager
def as_target_error(target: Path) -> Iterator[None]:
    """Convert an OSError of the block into a TargetError that names `target`."""
    try:
        yield
    except OSError as exc:
        if isinstance(exc, BrokenPipeError):
            raise
        if exc.errno in (errno.ENOSPC, errno.EDQUOT):
            message = f"disk full while writing {target}: {exc.strerror or exc}: free some space"
            raise TargetError(message) from exc
        at = f" ({exc.filename})" if exc.filename not in (None, str(target)) else ""
        raise TargetError(f"cannot write {target}: {exc.strerror or exc}{at}") from exc


def sha256(file: Path) -> str:
    """Return the SHA-256 of a file's content in hexadecimal. Raises OSError."""
    digest, buffer = hashlib.sha256(), memoryview(bytearray(CHUNK_BYTES))
    with file.open("rb", buffering=0) as stream:
        while size := stream.readinto(buffer):
            digest.update(buffer[:size])
    return digest.hexdigest()


def remove(path: Path) -> None:
    """Remove a file, a link or a directory tree, as far as permissions allow."""
    if path.is_symlink() or not path.is_dir():
        path.unlink(missing_ok=True)
        return
    try:
        shutil.rmtree(path, ignore_errors=True)
    except KeyboardInterrupt:  # a second Ctrl-C: finish the removal first
        shutil.rmtree(path, ignore_errors=True)
        raise


def _no_link(name: str, flags: int) -> int:
    return os.open(name, flags | os.O_NOFOLLOW, 0o666)
