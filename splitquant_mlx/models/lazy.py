"""A model directory whose model, tokenizer and content hash load on first access."""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import mlx.nn as nn

from splitquant_mlx.errors import CheckpointError
from splitquant_mlx.models.dense import for_scoring
from splitquant_mlx.models.directory import as_directory
from splitquant_mlx.models.loader import load_model, load_tokenizer
from splitquant_mlx.models.source import resolve
from splitquant_mlx.progress import CHECKING, SILENT, Progress

CHUNK_BYTES = 1 << 20


def model_hash(directory: Path, progress: Progress = SILENT) -> str:
    """Return a SHA-256 over all files that a checkpoint's predictions depend on.

    These are config.json, tokenizer.json and every .safetensors file: name, size in bytes and
    content, at about 1 s/GB.

    Raises:
        CheckpointError: when there are no weights, or a file cannot be read.
    """
    digest = hashlib.sha256()
    try:
        weights = sorted(directory.glob("*.safetensors"))
        if not weights:
            raise CheckpointError(f"{directory} has no .safetensors file: pass a model directory")
        named = [directory / name for name in ("config.json", "tokenizer.json")]
        files = [*(file for file in named if file.exists()), *weights]
        sizes = [file.stat().st_size for file in files]
        with progress.task(CHECKING, sum(sizes)) as advance:
            for file, size in zip(files, sizes, strict=True):
                digest.update(f"{file.name}\0{size}\0".encode())
                with file.open("rb") as opened:
                    while chunk := opened.read(CHUNK_BYTES):
                        digest.update(chunk)
                        advance(len(chunk))
    except OSError as exc:
        raise CheckpointError(f"cannot read {exc.filename}: {exc.strerror or exc}") from exc
    return digest.hexdigest()


class LazyModel:
    """A model directory whose model, tokenizer and content hash load on first access.

    Args:
        path: the directory.
        trust_remote_code: run Python files of the checkpoint.
        progress: progress reporter of the hash.
    """

    def __init__(self, path: Path, *, trust_remote_code: bool = False, progress: Progress = SILENT):
        self.path = path
        self._trusted = trust_remote_code
        self._progress = progress

    @cached_property
    def model(self) -> nn.Module:
        """Return the model, loaded once."""
        return self.load()

    @cached_property
    def tokenizer(self) -> Any:
        """Return mlx-lm's TokenizerWrapper."""
        return load_tokenizer(self.path, {"trust_remote_code": self._trusted})

    @cached_property
    def hash(self) -> str:
        """Return the hash of the content; see `model_hash`."""
        return model_hash(self.path, self._progress)

    def load(self) -> nn.Module:
        """Load the model for scoring, without caching it."""
        return for_scoring(load_model(self.path, trust_remote_code=self._trusted))


@contextmanager
def open_model(
    model: str, *, revision: str | None, trust_remote_code: bool, progress: Progress
) -> Iterator[LazyModel]:
    """Open a repo id, directory or .gguf file. Raises SplitQuantError when it is not usable."""
    with as_directory(resolve(model, revision=revision), progress) as path:
        yield LazyModel(path, trust_remote_code=trust_remote_code, progress=progress)
