"""Compare a converted checkpoint with its original, weight by weight."""

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

# keys that do not affect the outputs, or are checked elsewhere
IGNORED_KEYS = ("_name_or_path", "torch_dtype", "dtype", "quantization", "quantization_config")
TOLERANCE_DB = 0.05
WHOLE_TOLERANCE_DB = 3.0  # between a sample of rows and the whole weight
EXACT_DB = 150.0  # the limit of float32


def _differing_settings(actual: dict[str, Any], expected: dict[str, Any]) -> list[str]:
    """Return one line for each differing key of config.json that affects the outputs."""
    actual, expected = (json.loads(to_json(config)) for config in (actual, expected))
    return [
        f"config.json: {key}: expected {expected[key]!r:.80}, got {actual.get(key)!r:.80}"
        for key in expected
        if key not in IGNORED_KEYS and actual.get(key) != expected[key]
    ]


def compare(directory: Path, manifest: Manifest, original: Path, progress: Progress) -> list[str]:
    """Return the problems of a converted checkpoint, one line each.

    Converted layers are dequantized. Their signal-to-noise ratio must equal the recorded one over
    the sampled rows, and be similar over all rows. All other tensors must equal the original, cast
    to the stored dtype.

    Args:
        directory: the converted checkpoint.
        manifest: its manifest.
        original: directory of the original model.
        progress: progress reporter.

    Raises:
        CheckpointError: one of the checkpoints cannot be read.
    """
    checkpoint = open_checkpoint(original)
    try:
        recipe = Recipe.from_dict(manifest.recipe)
    except RecipeError as exc:
        return [f"the manifest's recipe is invalid: {exc}"]
    copies = [f"{x.head}.{leaf}" for x in manifest.layers if x.head for leaf in COPIED]
    stored = {name: array for name, array in _load(directory).items() if name not in copies}
    converted = {layer.path: layer for layer in manifest.layers if layer.action != "keep"}
    problems = []
    if checkpoint.source_bytes != manifest.source_bytes:
        problems.append(
            f"source_bytes: expected {checkpoint.source_bytes}, the size of the original, got "
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
                for part in ((leaf,) if layer is None else _tensor_class(layer)._fields)
            }
            w = source_array(checkpoint, dtype, name)
            del checkpoint.weights[name]
            tensor = tensors[leaf]
            if tensor is None:
                problems.append(f"{name} is missing")
            elif layer is None:
                if tensor.dtype != w.dtype or not mx.array_equal(tensor, w):
                    problems.append(f"{name} differs from the original")
            elif problem := _layer_problem(w, tensors, layer):
                problems.append(f"{path}: {problem}")
            advance(1)
    problems += [f"{path} is in the manifest, but not in the original" for path in converted]
    return problems + [f"{name} is not in the original" for name in stored]


def _tensor_class(layer: LayerRecord) -> type[Quantized] | type[Lut] | type[Mixed]:
    return {"lut": Lut, "mixed": Mixed}.get(layer.mode or "", Quantized)


def _load(directory: Path) -> dict[str, mx.array]:
    tensors: dict[str, mx.array] = {}
    for file in sorted({header.file for header in read_headers(directory).values()}):
        try:
            tensors.update(mx.load(str(file)))  # type: ignore[arg-type]
        except Exception as exc:  # mlx does not document the class
            raise CheckpointError(f"{file} cannot be read: {one_line(exc)}") from exc
    return tensors


def _layer_problem(w: mx.array, tensors: dict[str, mx.array | None], layer: LayerRecord) -> str:
    if layer.shape != w.shape:
        return f"shape: expected {list(w.shape)}, got {list(layer.shape)}"
    try:
        sampled_db, whole_db = _signal_to_noise(w, tensors, layer)
    except Exception as exc:  # mlx rejects the tensors
        return f"it cannot be dequantized: {one_line(exc)}"
    recorded_db = EXACT_DB if layer.snr_db is None else layer.snr_db
    if not abs(min(sampled_db, EXACT_DB) - min(recorded_db, EXACT_DB)) <= TOLERANCE_DB:
        return f"signal-to-noise ratio: expected {recorded_db:.2f} dB, got {sampled_db:.2f} dB"
    if not whole_db >= recorded_db - WHOLE_TOLERANCE_DB:
        return f"ratio over all rows: expected {recorded_db:.2f} dB, got {whole_db:.2f} dB"
    return ""


def _signal_to_noise(
    w: mx.array, tensors: dict[str, mx.array | None], layer: LayerRecord
) -> tuple[float, float]:
    """Return the ratio over the rows sampled for `LayerRecord.snr_db`, and over all rows, dB."""
    w = w.reshape(-1, w.shape[-1])
    stored = _tensor_class(layer)(**tensors)  # type: ignore[arg-type]
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
