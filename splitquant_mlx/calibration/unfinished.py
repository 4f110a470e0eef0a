"""Keep what a long computation has so far in a directory, for it to go on after a kill."""

import fcntl
import json
import os
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any

import mlx.core as mx

from splitquant_mlx.runtime.disk import sync, write_atomic


class Unfinished:
    """Arrays and findings by name; the arrays need not be in memory.

    On a disk that is full or read-only they stay in memory, and a kill loses them.

    Args:
        directory: made here; one of this process's own takes its place while another process
            computes the same.
    """

    def __init__(self, directory: Path):
        self.directory = directory
        self._memory: dict[str, list[mx.array]] = {}
        with suppress(OSError):
            directory.mkdir(parents=True, exist_ok=True)
            self._lock = os.open(directory / "lock", os.O_CREAT | os.O_RDWR)
            try:
                fcntl.lockf(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                self.directory = directory.with_name(f"{directory.name}.{os.getpid()}")

    def keep(self, name: str, arrays: list[mx.array]) -> None:
        """Keep arrays."""
        file, partial = self._file(name), self._file(f".{name}.partial")
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            mx.save_safetensors(str(partial), {str(i): x for i, x in enumerate(arrays)})
            sync(partial)
            os.replace(partial, file)
        except (OSError, RuntimeError):  # mlx's of a disk that is full
            self._memory[name] = arrays

    def arrays(self, name: str) -> list[mx.array] | None:
        """Return arrays that were kept, unread; None when there are none."""
        with suppress(OSError, RuntimeError, KeyError):
            if name in self._memory:
                return self._memory[name]
            found: Any = mx.load(str(self._file(name)))
            return [found[str(i)] for i in range(len(found))]
        return None

    def note(self, findings: Any) -> None:
        """Keep JSON values in place of those before."""
        with suppress(OSError):
            self.directory.mkdir(parents=True, exist_ok=True)
            write_atomic(self.directory / "findings.json", json.dumps(findings).encode())

    def findings(self) -> Any:
        """Return what was noted last; None when nothing was, or it is damaged."""
        with suppress(OSError, ValueError):
            return json.loads((self.directory / "findings.json").read_bytes())
        return None

    def drop(self, name: str) -> None:
        """Forget arrays that are not needed any more."""
        self._memory.pop(name, None)
        self._file(name).unlink(missing_ok=True)

    def remove(self) -> None:
        """Remove everything: the computation has ended."""
        self._memory.clear()
        shutil.rmtree(self.directory, ignore_errors=True)

    def __del__(self) -> None:
        with suppress(OSError, AttributeError):  # AttributeError: there never was a lock
            os.close(self._lock)

    def _file(self, name: str) -> Path:
        return self.directory / f"{name}.safetensors"
