"""Get calibration tokens: sampled from the model and cached, or read from a file."""

from hashlib import sha256
from importlib.metadata import version
from pathlib import Path

import mlx.core as mx
import numpy as np

from splitquant_mlx.calibration.saved_state import SavedState
from splitquant_mlx.calibration.self_text import BATCH_TEXTS, CACHE_BYTES, beginnings, sample_tokens
from splitquant_mlx.data.text import cut_windows, encode, load_text
from splitquant_mlx.models.compact import compact
from splitquant_mlx.models.config import read_config
from splitquant_mlx.models.footprint import check_context, context_limit
from splitquant_mlx.models.lazy import LazyModel
from splitquant_mlx.models.loader import load_model
from splitquant_mlx.progress import Progress
from splitquant_mlx.recipe import SELF, Calibration
from splitquant_mlx.runtime.blas import release_freed_memory
from splitquant_mlx.runtime.cache import cache_directory, cached_on_disk


def calibration_tokens(
    opened: LazyModel, calibration: Calibration, progress: Progress
) -> np.ndarray:
    """Return calibration tokens (texts, length) int32.

    Sampled text is cached on disk, by a hash of the model, the settings and the software versions.

    Raises:
        SplitQuantError: when the text file or the model cannot be read, the text is too short, or
            `sequence_length` exceeds the model's context.
    """
    texts, length = calibration.texts_for(), calibration.sequence_length
    check_context("sequence_length", length, context_limit(read_config(opened.path)))
    if calibration.text != SELF:
        text = load_text(Path(calibration.text))
        # evenly over the file, which may begin with a table of contents
        windows = cut_windows(encode(opened.tokenizer, text), length)
        return windows[:: max(1, len(windows) // texts)][:texts]
    seed = calibration.seed
    prompts = beginnings(opened.tokenizer, texts, np.random.default_rng(seed))
    batches = (BATCH_TEXTS, CACHE_BYTES)
    parts = (opened.hash, prompts, length, seed, batches, "compact", version("mlx"))
    key = sha256(repr((*parts, mx.default_device().type.name)).encode()).hexdigest()

    def sample() -> np.ndarray:
        model = compact(load_model(opened.path, lazy=True, dequantize=True, keep_dtype=True))
        saved_state = SavedState(cache_directory() / f"calibration/{key}.unfinished")
        settings = {"length": length, "seed": seed, "progress": progress}
        return sample_tokens(model, prompts, **settings, saved_state=saved_state)

    tokens = cached_on_disk(
        f"calibration/{key}.bin",
        sample,
        pack=lambda tokens: tokens.astype("<i4").tobytes(),
        unpack=lambda content: np.frombuffer(content, "<i4").reshape(texts, length),
    )
    release_freed_memory()  # of the copy
    return tokens
