"""Store intermediate results of a long computation on disk, to resume it after a kill."""

import itertools
import json
import os
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any

import mlx.core as mx

from splitquant_mlx.runtime.disk import sync, write_atomic
from splitquant_mlx.runtime.workspace import is_at, try_lock


class SavedState:
    """Named arrays, and one JSON value, in a directory.

    If the disk is full or read-only, arrays stay in memory, and a kill loses them.

    Args:
        directory: created here. While it is in use, its name with a number is used instead; the
            next use of `directory` removes numbered ones of killed processes.
    """

    def __init__(self, directory: Path):
        self.directory = directory
        self._memory: dict[str, list[mx.array]] = {}
        with suppress(OSError):
            self._lock = self._acquire()
            if self.directory == directory:
                self._remove_abandoned()

    def _acquire(self) -> int:
        """Lock the directory, else a numbered one; return the descriptor that holds the lock."""
        directory, numbers = self.directory, itertools.count(1)
        while True:
            self.directory.mkdir(parents=True, exist_ok=True)
            lock = os.open(self.directory, os.O_RDONLY | os.O_DIRECTORY)
            if try_lock(lock) and is_at(self.directory, lock):
                return lock
            os.close(lock)
            self.directory = directory.with_name(f"{directory.name}.{next(numbers)}")

    def _remove_abandoned(self) -> None:
        for path in self.directory.parent.glob(f"{self.directory.name}.*"):
            lock = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
            if try_lock(lock):
                shutil.rmtree(path, ignore_errors=True)
            os.close(lock)

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
