"""Put files on the disk so that they outlive a power cut, hash them, and take them away."""

import fcntl
import hashlib
import os
import shutil
from contextlib import suppress
from pathlib import Path

CHUNK_BYTES = 1 << 18


def sync(path: Path) -> None:
    """Wait until a file's content, or a directory's entries, are on the disk. Raises OSError."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        sync_descriptor(descriptor)
    finally:
        os.close(descriptor)


def sync_descriptor(descriptor: int) -> None:
    """Do as `sync` with an open file."""
    os.fsync(descriptor)
    # on macOS, fsync leaves the data in the disk's own cache
    if (full := getattr(fcntl, "F_FULLFSYNC", None)) is not None:
        with suppress(OSError):  # a file system that has no such thing
            fcntl.fcntl(descriptor, full)


def write_whole(file: Path, content: bytes) -> None:
    """Write a file, all of it or nothing. Raises OSError.

    A process that is killed may leave a `.NAME.partial`, which the next call writes over.
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


def sha256(file: Path) -> str:
    """Return the SHA-256 of a file's content in hexadecimal. Raises OSError."""
    digest, buffer = hashlib.sha256(), memoryview(bytearray(CHUNK_BYTES))
    with file.open("rb", buffering=0) as opened:
        while size := opened.readinto(buffer):
            digest.update(buffer[:size])
    return digest.hexdigest()


def remove(path: Path) -> None:
    """Remove a file, a link or a directory with all it holds, as far as that can be done."""
    if path.is_symlink() or not path.is_dir():
        path.unlink(missing_ok=True)
        return
    try:
        shutil.rmtree(path, ignore_errors=True)
    except KeyboardInterrupt:  # the user presses Ctrl-C a second time
        shutil.rmtree(path, ignore_errors=True)
        raise


def _no_link(name: str, flags: int) -> int:
    return os.open(name, flags | os.O_NOFOLLOW, 0o666)
