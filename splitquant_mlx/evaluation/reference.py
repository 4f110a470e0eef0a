"""Cache the reference model's log-probabilities, so that it runs once for all compared models.

The cache stores float32, as computed, so that the divergence of a model from itself is zero. An
entry is one .npy file (windows, length, vocabulary), read and written block by block and named by
a hash of everything the values depend on. The cache is bounded and evicts the least recently used
entries. Predictions that do not fit, or cannot be written, are recomputed on each iteration.
"""

import hashlib
import io
import math
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from splitquant_mlx.errors import SourceError
from splitquant_mlx.evaluation.scoring import block_rows, log_probability_blocks, token_array
from splitquant_mlx.progress import SILENT, Progress
from splitquant_mlx.runtime.cache import cache_directory

LIMIT_BYTES = 4_000_000_000
SUFFIX = ".npy"
PARTIAL = ".partial"
ABANDONED_S = 3600


@dataclass(frozen=True, kw_only=True, eq=False)
class Reference:
    """Iterable over the reference's ln p, in the blocks of `scoring.log_probability_blocks`.

    Attributes:
        windows: tokens (windows, length), int32.
        file: the cached predictions; None if they are recomputed on each iteration.
        load: returns the reference model; only called if `file` is missing or damaged.
    """

    windows: np.ndarray
    file: Path | None
    load: Callable[[], nn.Module]

    def __iter__(self) -> Iterator[mx.array]:
        vocabulary = self.file and _cached_vocabulary(self.file, self.windows.shape)
        if self.file and vocabulary:
            return _read(self.file, self.windows.shape, vocabulary)
        return log_probability_blocks(self.load(), self.windows)


def open_reference(
    windows: np.ndarray,
    *,
    model_hash: str,
    load: Callable[[], nn.Module],
    directory: Path | None = None,
    limit_bytes: int = LIMIT_BYTES,
    progress: Progress = SILENT,
) -> Reference:
    """Look up a reference model's predictions in the cache; compute and cache them if missing.

    The model is released after that: if the predictions are cached, it is never in memory together
    with the models compared with it.

    Args:
        windows: tokens (windows, length); see `text.cut_windows`.
        model_hash: content hash of the reference; see `lazy.model_hash`.
        load: returns the reference model, ready for scoring; only called if needed.
        directory: cache directory; None is `reference` in the package's cache directory.
        limit_bytes: maximum size of the cache. Larger predictions are not cached; the reference
            then runs alongside each model, block by block.
        progress: progress reporter.

    Raises:
        RecipeError: when a token is not in the model's vocabulary.
        SplitQuantError: any error of `load`.
    """
    windows = np.ascontiguousarray(windows, np.int32)
    directory = directory or cache_directory() / "reference"
    file = directory / f"{_key(windows, model_hash)}{SUFFIX}"
    if not _cached_vocabulary(file, windows.shape):
        model = load()
        _, vocabulary = token_array(model, windows)
        nbytes = 4 * windows.size * vocabulary
        if nbytes > limit_bytes:
            return Reference(windows=windows, file=None, load=load)
        try:
            _prepare_cache(directory, limit_bytes - nbytes, replace=file)
            _write(file, model, windows, vocabulary, progress)
        except OSError:  # a full or read-only disk costs time, not the result
            return Reference(windows=windows, file=None, load=load)
    with suppress(OSError):
        os.utime(file)  # mark as recently used
    return Reference(windows=windows, file=file, load=load)


def _key(windows: np.ndarray, model_hash: str) -> str:
    """Hash the model, the tokens, their shape, and what affects rounding: mlx version, device."""
    device = mx.default_device().type.name
    settings = f"{model_hash}\0{windows.shape}\0{version('mlx')}\0{device}\0"
    return hashlib.sha256(settings.encode() + windows.astype("<i4").tobytes()).hexdigest()


def _cached_vocabulary(file: Path, shape: tuple[int, ...]) -> int:
    """Return the vocabulary size of a complete entry for windows of `shape`; 0 if there is none."""
    try:
        nbytes = file.stat().st_size - len(_header(shape, 1))
        vocabulary, rest = divmod(max(nbytes, 0), 4 * math.prod(shape))
        header = _header(shape, vocabulary)
        with file.open("rb") as opened:
            complete = not rest and opened.read(len(header)) == header
    except OSError:
        return 0
    return vocabulary if complete else 0


def _header(shape: tuple[int, ...], vocabulary: int) -> bytes:
    """Return the .npy header of an entry; numpy pads it to a fixed length."""
    buffer = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        buffer, {"descr": "<f4", "fortran_order": False, "shape": (*shape, vocabulary)}
    )
    return buffer.getvalue()


def _read(file: Path, shape: tuple[int, ...], vocabulary: int) -> Iterator[mx.array]:
    rows = block_rows(vocabulary)
    windows, length = shape
    with file.open("rb") as opened:
        opened.seek(len(_header(shape, vocabulary)))
        for _ in range(windows):
            for start in range(0, length, rows):
                nbytes = 4 * min(rows, length - start) * vocabulary
                content = opened.read(nbytes)
                if len(content) != nbytes:
                    raise SourceError(f"{file} was truncated while it was read: run it again")
                yield mx.array(np.frombuffer(content, "<f4").reshape(-1, vocabulary))


def _write(
    file: Path, model: nn.Module, windows: np.ndarray, vocabulary: int, progress: Progress
) -> None:
    """Write an entry to a temporary file and rename it when complete."""
    with tempfile.NamedTemporaryFile(
        dir=file.parent, prefix=f".{file.stem}-", suffix=PARTIAL, delete=False
    ) as opened:
        partial = Path(opened.name)
        try:
            opened.write(_header(windows.shape, vocabulary))
            with progress.task("Running the reference", windows.size) as advance:
                for block in log_probability_blocks(model, windows):
                    opened.write(np.array(block).astype("<f4", copy=False).data)
                    advance(block.shape[0])
            opened.flush()
            os.fsync(opened.fileno())
            os.replace(partial, file)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise


def _prepare_cache(directory: Path, allowed_bytes: int, replace: Path) -> None:
    """Remove a damaged entry, abandoned files, and least recently used entries over the limit."""
    directory.mkdir(parents=True, exist_ok=True)
    replace.unlink(missing_ok=True)
    for file in directory.glob(f".*{PARTIAL}"):
        if time.time() - file.stat().st_mtime > ABANDONED_S:  # its writer was killed
            file.unlink(missing_ok=True)
    entries = [(file.stat(), file) for file in directory.glob(f"*{SUFFIX}")]
    total_bytes = sum(stat.st_size for stat, _ in entries)
    for stat, file in sorted(entries, key=lambda entry: entry[0].st_mtime_ns):
        if total_bytes <= allowed_bytes:
            return
        file.unlink(missing_ok=True)
        total_bytes -= stat.st_size
