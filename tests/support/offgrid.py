"""Make a reference model out of a 4-bit GGUF file whose weights do not lie on a 4-bit grid.

Weights read from Q4_1 take 16 values in every block of 32, which flatters some quantizers. Uniform
noise of plus or minus half a step, from a fixed seed, undoes that and stays within what the file
says of the weights. In a block of more than 16 values the step is the smallest difference of two.
A head that is the embedding in another block type is the embedding again, in the head's type.
"""

import json
import shutil
from pathlib import Path

import mlx.core as mx
import numpy as np

from splitquant_mlx.models.gguf_import import import_gguf
from splitquant_mlx.progress import Silent

BLOCK = 32
HEAD, TABLE = "lm_head.weight", "model.embed_tokens.weight"


def steps(blocks: np.ndarray) -> np.ndarray:
    """Return the step of the grid of each block (n, 32), as (n, 1)."""
    width = np.ptp(blocks, axis=1, keepdims=True)
    gaps = np.diff(np.sort(blocks, axis=1), axis=1)
    gaps[gaps <= 1e-5 * width] = np.inf
    levels = 1 + np.isfinite(gaps).sum(axis=1, keepdims=True)
    smallest = gaps.min(axis=1, keepdims=True)
    return np.where(levels <= 16, width / 15, np.where(np.isfinite(smallest), smallest, 0))


def make_offgrid(gguf: Path, directory: Path, seed: int = 0) -> Path:
    """Write `gguf` to `directory` as a float32 Hugging Face checkpoint, off the grid."""
    rng = np.random.default_rng(seed)
    directory.mkdir()
    import_gguf(gguf, directory, Silent())
    weights: dict[str, np.ndarray] = {}
    tables: dict[str, np.ndarray] = {}  # of the file, to compare
    for file in sorted(directory.glob("*.safetensors")):
        for name, w in mx.load(str(file)).items():
            values = np.array(w.astype(mx.float32))
            if name in (HEAD, TABLE):
                tables[name] = values
            if values.ndim == 2:
                blocks = values.reshape(-1, BLOCK)
                step = steps(blocks)
                blocks = blocks + (rng.random(blocks.shape, np.float32) - 0.5) * step
                values = blocks.reshape(values.shape)
            weights[name] = values
        file.unlink()
    config = json.loads((directory / "config.json").read_text()) | {"torch_dtype": "float32"}
    head, table = tables.get(HEAD), tables[TABLE]
    if head is not None and np.abs(head - table).mean() < 0.1 * np.abs(table).mean():
        weights[TABLE] = weights.pop(HEAD)
        config["tie_word_embeddings"] = True
    (directory / "model.safetensors.index.json").unlink(missing_ok=True)
    arrays = {name: mx.array(values) for name, values in weights.items()}
    mx.save_safetensors(str(directory / "model.safetensors"), arrays, {"format": "mlx"})
    (directory / "config.json").write_text(json.dumps(config))
    return directory


if __name__ == "__main__":
    import sys

    shutil.rmtree(sys.argv[2], ignore_errors=True)
    make_offgrid(Path(sys.argv[1]), Path(sys.argv[2]), *map(int, sys.argv[3:]))
