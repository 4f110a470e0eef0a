"""Keep finished work in a file, so that what is interrupted goes on where it was.

The file is JSON lines. The first is the key, everything that the results depend on; then comes one
record for each finished piece, written at once. A process that is killed loses the
line it was writing at most.
"""

import errno
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from splitquant_mlx.errors import TargetError, one_line

OPENING = b'{"journal": '


class Journal:
    """Open a journal: go on with the one at `path` if it has the same key, else begin it afresh.

    To be used in a `with` statement, by one process at a time.

    Args:
        path: of the file; its directory is made if need be.
        key: settings and hashes of model and data, as JSON can hold them.

    Attributes:
        done: the records found.

    Raises:
        TargetError: when the file cannot be read or written, or is no journal.
    """

    def __init__(self, path: Path, key: Mapping[str, Any]) -> None:
        self._path = path
        opening = _line({"journal": key})
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            content = path.read_bytes() if path.exists() else b""
            if not content.startswith(OPENING[: len(content)]):
                raise TargetError(f"{path} is no journal: give another path, or remove it")
            self.done, end = _read(content, opening)
            # unbuffered: nothing is left to write, and to fail again, when the file is closed
            self._file = path.open("ab", buffering=0)
            self._file.truncate(end)
            if not end:
                self._write(opening)
        except OSError as exc:
            raise _cannot(path, exc) from exc

    def append(self, record: Mapping[str, Any]) -> None:
        """Add the record of a finished piece. Raises TargetError."""
        try:
            self._write(_line(record))
        except OSError as exc:
            raise _cannot(self._path, exc) from exc

    def _write(self, line: bytes) -> None:
        if self._file.write(line) != len(line):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def __enter__(self) -> "Journal":
        return self

    def __exit__(self, *exc: object) -> None:
        self._file.close()


def _read(content: bytes, opening: bytes) -> tuple[list[dict[str, Any]], int]:
    """Return the records up to the first torn line, and where that begins; 0 for another key."""
    if not content.startswith(opening):
        return [], 0
    records, end = [], len(opening)
    for line in content[end:].splitlines(keepends=True):
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            break
        if not line.endswith(b"\n") or not isinstance(record, dict):
            break
        records.append(record)
        end += len(line)
    return records, end


def _line(record: Mapping[str, Any]) -> bytes:
    return json.dumps(record, sort_keys=True).encode() + b"\n"


def _cannot(path: Path, exc: OSError) -> TargetError:
    return TargetError(f"cannot keep the journal {path}: {exc.strerror or one_line(exc)}")
