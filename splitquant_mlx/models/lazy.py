"""Hold a model directory, of which model, tokenizer and hash are had when first asked for."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import mlx.nn as nn

from splitquant_mlx.models.directory import as_directory
from splitquant_mlx.evaluation.reference import model_hash
from splitquant_mlx.evaluation.scoring import for_scoring
from splitquant_mlx.models.loader import load_model, load_tokenizer
from splitquant_mlx.progress import Progress
from splitquant_mlx.models.source import resolve


class Opened:
    """Give what evaluations want of the model in the directory `path`."""

    def __init__(
        self, path: Path, *, trust_remote_code: bool = False, progress: Progress | None = None
    ):
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
        """Return what names the model by its content; see `reference.model_hash`."""
        return model_hash(self.path, self._progress)

    def load(self) -> nn.Module:
        """Load the model, ready for scoring, without keeping it here."""
        return for_scoring(load_model(self.path, trust_remote_code=self._trusted))


@contextmanager
def open_model(
    model: str, *, revision: str | None, trust_remote_code: bool, progress: Progress
) -> Iterator[Opened]:
    """Open a repo id, directory or .gguf file. Raises SplitQuantError when it cannot be had."""
    with as_directory(resolve(model, revision=revision), progress) as path:
        yield Opened(path, trust_remote_code=trust_remote_code, progress=progress)
