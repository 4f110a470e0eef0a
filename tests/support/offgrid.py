"""Make a reference model out of a 4-bit GGUF file whose weights do not lie on a 4-bit grid.

Weights read from Q4_1 take 16 values in every block of 32, which flatters some quantizers. Uniform
noise of plus or minus half a step, from a fixed seed, undoes that and stays within what Q4_1 says
of the weights.
"""

import json
import shutil
from pathlib import Path

import mlx.core as mx
import numpy as np

from splitquant_mlx.models.gguf_import import import_gguf
from splitquant_mlx.progress import Silent

BLOCK = 32


def make_offgrid(gguf: Path, directory: Path, seed: int = 0) -> Path:
    """Write `gguf` to `directory` as a float32 Hugging Face checkpoint, off the grid."""
    rng = np.random.default_rng(seed)
    directory.mkdir()
    import_gguf(gguf, directory, Silent())
    weights = {}
    for file in sorted(directory.glob("*.safetensors")):
        for name, w in mx.load(str(file)).items():
            values = np.array(w.astype(mx.float32))
            if values.ndim == 2:
                blocks = values.reshape(-1, BLOCK)
                step = np.ptp(blocks, axis=1, keepdims=True) / 15
                blocks = blocks + (rng.random(blocks.shape, np.float32) - 0.5) * step
                values = blocks.reshape(values.shape)
            weights[name] = mx.array(values)
        file.unlink()
    (directory / "model.safetensors.index.json").unlink(missing_ok=True)
    mx.save_safetensors(str(directory / "model.safetensors"), weights, {"format": "mlx"})
    config = json.loads((directory / "config.json").read_text())
    config["torch_dtype"] = "float32"
    (directory / "config.json").write_text(json.dumps(config))
    return directory


if __name__ == "__main__":
    import sys

    shutil.rmtree(sys.argv[2], ignore_errors=True)
    make_offgrid(Path(sys.argv[1]), Path(sys.argv[2]), *map(int, sys.argv[3:]))
