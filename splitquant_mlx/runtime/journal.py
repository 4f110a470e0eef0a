"""Journal of finished steps, from which interrupted work resumes.

The file holds JSON lines. The first is the key: everything that the results depend on. Each
further line is the record of one finished step, written immediately. A process that is killed
loses at most the line being written.
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
    """A journal that resumes the file at `path` if its key is the same, and replaces it otherwise.

    Use in a `with` statement, in one process at a time.

    Args:
        path: file to resume or create, with its parent directories.
        key: JSON-serializable settings and hashes of model and data.

    Attributes:
        done: records of the steps finished earlier.

    Raises:
        TargetError: when the file cannot be read or written, or is not a journal.
    """

    def __init__(self, path: Path, key: Mapping[str, Any]) -> None:
        self._path = path
        opening = _line({"journal": key})
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            content = path.read_bytes() if path.exists() else b""
            if not content.startswith(OPENING[: len(content)]):
                raise TargetError(f"{path} is not a journal: choose another path or remove it")
            self.done, end = _read(content, opening)
            # unbuffered, so that closing the file writes nothing and cannot fail again
            self._file = path.open("ab", buffering=0)
            self._file.truncate(end)
            if not end:
                self._write(opening)
        except OSError as exc:
            raise _target_error(path, exc) from exc

    def append(self, record: Mapping[str, Any]) -> None:
        """Add the record of a finished step. Raises TargetError."""
        try:
            self._write(_line(record))
        except OSError as exc:
            raise _target_error(self._path, exc) from exc

    def _write(self, line: bytes) -> None:
        if self._file.write(line) != len(line):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def __enter__(self) -> "Journal":
        return self

    def __exit__(self, *exc: object) -> None:
        self._file.close()


def _read(content: bytes, opening: bytes) -> tuple[list[dict[str, Any]], int]:
    """Return the records before the first damaged line, and its offset; 0 if the key differs."""
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


def _target_error(path: Path, exc: OSError) -> TargetError:
    return TargetError(f"cannot write the journal {path}: {exc.strerror or one_line(exc)}")
