"""Store intermediate results of a long computation on disk, to resume it after a kill."""

import fcntl
import json
import os
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any

import mlx.core as mx

from splitquant_mlx.runtime.disk import sync, write_atomic


class SavedState:
    """Named arrays, and one JSON value, in a directory.

    If the disk is full or read-only, arrays stay in memory, and a kill loses them.

    Args:
        directory: created here. While another process uses it, this one uses a directory of the
            same name with its process id.
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

    def save(self, name: str, arrays: list[mx.array]) -> None:
        """Store arrays."""
        file, partial = self._file(name), self._file(f".{name}.partial")
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            mx.save_safetensors(str(partial), {str(i): x for i, x in enumerate(arrays)})
            sync(partial)
            os.replace(partial, file)
        except (OSError, RuntimeError):  # mlx raises RuntimeError if the disk is full
            self._memory[name] = arrays

    def load(self, name: str) -> list[mx.array] | None:
        """Return stored arrays, loaded lazily; None when there are none."""
        with suppress(OSError, RuntimeError, KeyError):
            if name in self._memory:
                return self._memory[name]
            arrays: Any = mx.load(str(self._file(name)))
            return [arrays[str(i)] for i in range(len(arrays))]
        return None

    def save_json(self, value: Any) -> None:
        """Store the JSON value; it replaces the previous one."""
        with suppress(OSError):
            self.directory.mkdir(parents=True, exist_ok=True)
            write_atomic(self.directory / "value.json", json.dumps(value).encode())

    def load_json(self) -> Any:
        """Return the JSON value; None when there is none, or it is damaged."""
        with suppress(OSError, ValueError):
            return json.loads((self.directory / "value.json").read_bytes())
        return None

    def delete(self, name: str) -> None:
        """Delete arrays."""
        self._memory.pop(name, None)
        self._file(name).unlink(missing_ok=True)

    def remove(self) -> None:
        """Delete everything, at the end of the computation."""
        self._memory.clear()
        shutil.rmtree(self.directory, ignore_errors=True)

    def __del__(self) -> None:
        with suppress(OSError, AttributeError):  # AttributeError: no lock was opened
            os.close(self._lock)

    def _file(self, name: str) -> Path:
        return self.directory / f"{name}.safetensors"
