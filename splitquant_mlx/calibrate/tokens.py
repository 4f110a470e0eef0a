"""Find the tokens to calibrate a model on: sampled and kept, or read from a file."""

import hashlib
import os
import tempfile
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path

import mlx.core as mx
import numpy as np

from splitquant_mlx.cache import cache_directory
from splitquant_mlx.calibrate.text import BATCH_TEXTS, beginnings, sample_tokens
from splitquant_mlx.evaluate.opened import Opened
from splitquant_mlx.evaluate.text import cut_windows, encode, load_text
from splitquant_mlx.progress import Progress
from splitquant_mlx.recipe import SELF, Calibration


def calibration_tokens(directory: Path, calibration: Calibration, progress: Progress) -> np.ndarray:
    """Return tokens (texts, length) int32 to calibrate the model in `directory` on.

    What the model writes is kept in the cache directory, by a hash of the model, the settings and
    what else it depends on, so that it writes it once.

    Raises:
        SplitQuantError: when the text file or the model cannot be read, or the text is too short.
    """
    opened = Opened(directory, progress=progress)
    texts, length = calibration.num_samples, calibration.sequence_length
    if calibration.text != SELF:
        text = load_text(Path(calibration.text))
        # evenly over the file, which may begin with a table of contents
        windows = cut_windows(encode(opened.tokenizer, text), length)
        return windows[:: max(1, len(windows) // texts)][:texts]
    seed = calibration.seed
    prompts = beginnings(opened.tokenizer, texts, np.random.default_rng(seed))
    parts = (opened.hash, prompts, length, seed, BATCH_TEXTS, version("mlx"))
    key = hashlib.sha256(repr((*parts, mx.default_device().type.name)).encode()).hexdigest()
    file = cache_directory() / "calibration" / f"{key}.npy"
    with suppress(OSError, ValueError):
        kept = np.load(file, allow_pickle=False)
        if kept.shape == (texts, length) and kept.dtype == np.int32:
            return kept
    tokens = sample_tokens(opened.load(), prompts, length=length, seed=seed, progress=progress)
    _keep(tokens, file)
    return tokens


def _keep(tokens: np.ndarray, file: Path) -> None:
    """Write beside and rename; a full or read-only disk costs time, not the result."""
    with suppress(OSError):
        file.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=file.parent, suffix=".partial", delete=False) as kept:
            np.save(kept, tokens)
        os.replace(kept.name, file)
