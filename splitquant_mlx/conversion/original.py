"""Compare a converted checkpoint with the model that it was made from, weight by weight."""

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from splitquant_mlx.conversion.converter import source_array
from splitquant_mlx.conversion.plan import stored_dtype
from splitquant_mlx.conversion.weight import (
    BLOCK,
    SAMPLE,
    decibels,
    row_squares,
    stored_rows,
)
from splitquant_mlx.errors import CheckpointError, RecipeError, one_line
from splitquant_mlx.formats.head_file import COPIED
from splitquant_mlx.formats.manifest import LayerRecord, Manifest
from splitquant_mlx.models.checkpoint import open_checkpoint
from splitquant_mlx.models.config import read_config, to_json
from splitquant_mlx.models.shards import read_headers
from splitquant_mlx.progress import Progress
from splitquant_mlx.quantization.affine import Quantized
from splitquant_mlx.quantization.lut import Lut
from splitquant_mlx.quantization.salience import Mixed
from splitquant_mlx.recipe import Recipe

# what says nothing of the function, or is compared elsewhere
NOT_SETTINGS = ("_name_or_path", "torch_dtype", "dtype", "quantization", "quantization_config")
TOLERANCE_DB = 0.05
# a sample of rows has another ratio than the whole weight, but not by far
WHOLE_TOLERANCE_DB = 3.0
EXACT_DB = 150.0  # float32 has no more


def _differing_settings(found: dict[str, Any], wanted: dict[str, Any]) -> list[str]:
    """Name the keys of config.json that make the converted model another function."""
    found, wanted = (json.loads(to_json(config)) for config in (found, wanted))
    return [
        f"config.json: {key} is {found.get(key)!r:.80}, expected {wanted[key]!r:.80}"
        for key in wanted
        if key not in NOT_SETTINGS and found.get(key) != wanted[key]
    ]


def compare(directory: Path, manifest: Manifest, original: Path, progress: Progress) -> list[str]:
    """Return what is not as it should be, one line each.

    Converted layers are dequantized; their signal-to-noise ratio must be the recorded one over the
    rows it was taken from, and about the same over all rows. Everything else must be the original
    cast to the type it is stored in.

    Args:
        directory: of the converted checkpoint.
        manifest: of it.
        original: directory of the model it was made from.
        progress: progress reporter.

    Raises:
        CheckpointError: when one of the two is not usable.
    """
    checkpoint = open_checkpoint(original)
    try:
        recipe = Recipe.from_dict(manifest.recipe)
    except RecipeError as exc:
        return [f"the manifest's recipe is none: {exc}"]
    copies = [f"{x.head}.{leaf}" for x in manifest.layers if x.head for leaf in COPIED]
    stored = {name: array for name, array in _load(directory).items() if name not in copies}
    converted = {layer.path: layer for layer in manifest.layers if layer.action != "keep"}
    problems = []
    if checkpoint.source_bytes != manifest.source_bytes:
        problems.append(
            f"the original has {checkpoint.source_bytes} bytes, the manifest says "
            f"{manifest.source_bytes}"
        )
    names, dtype = list(checkpoint.weights), stored_dtype(recipe, checkpoint.config)
    problems += _differing_settings(read_config(directory), checkpoint.config)
    with progress.task("Comparing", len(names)) as advance:
        for name in names:
            path, _, leaf = name.rpartition(".")
            layer = converted.pop(path, None) if leaf == "weight" else None
            tensors = {
                part: stored.pop(f"{path}.{part}", None)
                for part in ((leaf,) if layer is None else _kind(layer)._fields)
            }
            w = source_array(checkpoint, dtype, name)
            del checkpoint.weights[name]
            found = tensors[leaf]
            if found is None:
                problems.append(f"{name} is missing")
            elif layer is None:
                if found.dtype != w.dtype or not mx.array_equal(found, w):
                    problems.append(f"{name} is not that of the original")
            elif wrong := _layer_problem(w, tensors, layer):
                problems.append(f"{path}: {wrong}")
            advance(1)
    problems += [f"{path} is in the manifest, and not in the original" for path in converted]
    return problems + [f"{name} is not in the original" for name in stored]


def _kind(layer: LayerRecord) -> type[Quantized] | type[Lut] | type[Mixed]:
    return {"lut": Lut, "mixed": Mixed}.get(layer.mode or "", Quantized)


def _load(directory: Path) -> dict[str, mx.array]:
    tensors: dict[str, mx.array] = {}
    for file in sorted({header.file for header in read_headers(directory).values()}):
        try:
            tensors.update(mx.load(str(file)))  # type: ignore[arg-type]
        except Exception as exc:  # of mlx, which names no class
            raise CheckpointError(f"{file} cannot be read: {one_line(exc)}") from exc
    return tensors


def _layer_problem(w: mx.array, tensors: dict[str, mx.array | None], layer: LayerRecord) -> str:
    if layer.shape != w.shape:
        return f"its shape is {list(layer.shape)}, that of the original {list(w.shape)}"
    try:
        sampled_db, whole_db = _signal_to_noise(w, tensors, layer)
    except Exception as exc:  # tensors that are no quantized weight, which mlx notices
        return f"it cannot be dequantized: {one_line(exc)}"
    recorded_db = EXACT_DB if layer.snr_db is None else layer.snr_db
    if not abs(min(sampled_db, EXACT_DB) - min(recorded_db, EXACT_DB)) <= TOLERANCE_DB:
        return f"its signal-to-noise ratio is {sampled_db:.2f} dB, recorded is {recorded_db:.2f}"
    if not whole_db >= recorded_db - WHOLE_TOLERANCE_DB:
        return f"its ratio over all rows is {whole_db:.2f} dB, recorded is {recorded_db:.2f}"
    return ""


def _signal_to_noise(
    w: mx.array, tensors: dict[str, mx.array | None], layer: LayerRecord
) -> tuple[float, float]:
    """Return the ratio over the rows that `LayerRecord.snr_db` is taken over, and over all, dB."""
    w = w.reshape(-1, w.shape[-1])
    stored = _kind(layer)(**tensors)  # type: ignore[arg-type]
    sizes = {"bits": layer.bits, "group_size": layer.group_size, "mode": layer.mode}
    signal, noise = [], []
    step = max(1, BLOCK // w.shape[1])
    for start in range(0, w.shape[0], step):
        rows = slice(start, start + step)
        squares = row_squares(w[rows], stored_rows(stored, rows, **sizes))
        signal.append(squares[0])
        noise.append(squares[1])
    signals, noises = np.concatenate(signal), np.concatenate(noise)
    sampled = slice(None, None, -(-w.size // SAMPLE))
    return (
        decibels(signals[sampled].sum(), noises[sampled].sum()),
        decibels(signals.sum(), noises.sum()),
    )
