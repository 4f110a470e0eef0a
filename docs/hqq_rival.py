"""Quantize a checkpoint of one file by HQQ, for its row of recipes/rivals.toml.

    pip install hqq torch mlx safetensors
    python docs/hqq_rival.py MODEL RECORD

writes rivals/hqq under the working directory: every matrix, the embedding too, in 4 bits with
groups of 64 along the inputs, as HQQ's own `Quantizer` fits them. HQQ reads a code q as
(q - zero) scale, mlx as q scale + bias, so that nothing is lost but the rounding of both to
float16. RECORD is the JSON file of docs/rivals.py. HQQ needs no text.
"""

import json
import shutil
import sys
import time
from pathlib import Path

import mlx.core as mx
import numpy as np
import torch
from hqq.core.quantize import Quantizer

BITS, GROUP_SIZE = 4, 64


def quantize(w: np.ndarray) -> tuple[mx.array, mx.array, mx.array]:
    """Return packed codes, scales and biases of a weight (out, in), as mlx stores them."""
    settings = {"nbits": BITS, "group_size": GROUP_SIZE, "axis": 1, "optimize": True}
    found, meta = Quantizer.quantize(
        torch.from_numpy(w), **settings, bitpack=False, device="cpu", compute_dtype=torch.float32
    )
    codes = mx.array(found.numpy().astype(np.uint32)).reshape(len(w), -1, 32 // BITS)
    packed = (codes << (BITS * mx.arange(32 // BITS, dtype=mx.uint32))).sum(-1)
    scale, zero = (meta[name].numpy().reshape(len(w), -1) for name in ("scale", "zero"))
    scales, biases = (mx.array(values).astype(mx.float16) for values in (scale, -zero * scale))
    return packed.astype(mx.uint32), scales, biases


def main() -> None:
    """Write the checkpoint and what it took."""
    model, record = map(Path, sys.argv[1:])
    target = Path("rivals/hqq")
    started = time.perf_counter()
    shutil.copytree(model, target, ignore=shutil.ignore_patterns("*.safetensors"))
    tensors: dict[str, mx.array] = {}
    for name, w in mx.load(str(model / "model.safetensors")).items():
        if w.ndim != 2:
            tensors[name] = w.astype(mx.float16)
            continue
        parts = quantize(np.array(w.astype(mx.float32)))
        path = name.removesuffix(".weight")
        for leaf, part in zip(("weight", "scales", "biases"), parts, strict=True):
            tensors[f"{path}.{leaf}"] = part
    mx.save_safetensors(str(target / "model.safetensors"), tensors, {"format": "mlx"})
    config = json.loads((target / "config.json").read_text(encoding="utf-8"))
    config["quantization"] = {"bits": BITS, "group_size": GROUP_SIZE}
    (target / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
    records = json.loads(record.read_text(encoding="utf-8")) if record.exists() else {}
    command, seconds = "hqq.core.quantize.Quantizer.quantize", time.perf_counter() - started
    records["hqq"] = {"command": command, "tokens": 0, "seconds": seconds}
    record.write_text(json.dumps(records, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
