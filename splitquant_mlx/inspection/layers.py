"""Cut points of a model's layers and histograms of their weights."""

from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from splitquant_mlx.conversion.plan import make_plan
from splitquant_mlx.conversion.weight import UnusableWeightError, require_finite
from splitquant_mlx.errors import CheckpointError, RecipeError
from splitquant_mlx.formats.manifest import load_manifest
from splitquant_mlx.models.checkpoint import open_checkpoint
from splitquant_mlx.models.config import read_config
from splitquant_mlx.models.dense import dense_weight
from splitquant_mlx.models.loader import load_model
from splitquant_mlx.progress import SILENT, Progress
from splitquant_mlx.quantization.split import cluster_weight
from splitquant_mlx.recipe import Recipe

BINS = 160


@dataclass(frozen=True, kw_only=True)
class Histogram:
    """Histogram of a layer's weights.

    Attributes:
        path: path of the layer.
        counts: (bins,), entries per bin.
        edges: (bins + 1,), bounds of the bins.
        cut_points: ascending bounds of the layer's parts; empty if it is not split.
    """

    path: str
    counts: np.ndarray
    edges: np.ndarray
    cut_points: tuple[float, ...]


def find_cut_points(
    directory: Path, *, clusters: int = 3, progress: Progress = SILENT
) -> dict[str, tuple[float, ...]]:
    """Return the cut points of each linear layer, computed if the model is not converted.

    Args:
        directory: model directory.
        clusters: number of parts per layer of an unconverted model.
        progress: progress reporter.

    Raises:
        CheckpointError: when the directory is not a usable model.
    """
    if (manifest := load_manifest(directory)) is not None:
        return {layer.path: layer.cut_points for layer in manifest.layers if layer.cut_points}
    checkpoint = open_checkpoint(directory)
    plan = make_plan(Recipe(clusters=clusters), checkpoint.model, checkpoint.config)
    layers = plan.layers.items()
    split = [path for path, layer in layers if layer.action == "split" and len(layer.shape) == 2]
    cut_points = {}
    with progress.task("Clustering", len(split)) as advance:
        for path in split:
            w = checkpoint.weights.pop(f"{path}.weight")
            _require_finite(directory, path, w)
            cut_points[path] = cluster_weight(w, clusters).cut_points
            advance(1)
    return cut_points


def layer_histogram(directory: Path, path: str, *, clusters: int | None = None) -> Histogram:
    """Return the histogram of a layer's weights, dequantized if need be.

    Args:
        directory: model directory.
        path: path of the layer.
        clusters: number of parts to compute the cut points of, in an unconverted model.

    Raises:
        RecipeError: when the model has no layer `path` with a weight matrix.
    """
    manifest = load_manifest(directory)
    config = read_config(directory)
    if manifest is None and "quantization" not in config:
        w, bins = open_checkpoint(directory).weights.get(f"{path}.weight"), BINS
    else:
        bins = BINS // 4  # narrower bins would show the gaps between codes
        model = load_model(directory, lazy=True, to_run=False)
        module = dict(model.named_modules()).get(path)
        w = _dense(module)
    if w is None or w.ndim < 2:
        raise RecipeError(f"{directory} has no layer {path!r} with a weight matrix")
    _require_finite(directory, path, w)
    records = {record.path: record for record in manifest.layers} if manifest else {}
    cut_points = records[path].cut_points if path in records else ()
    counts, edges = np.histogram(np.array(w.astype(mx.float32)), bins=bins)
    if clusters is not None and not manifest:
        cut_points = cluster_weight(w, clusters).cut_points
    return Histogram(path=path, counts=counts, edges=edges, cut_points=cut_points)


def _require_finite(directory: Path, path: str, w: mx.array) -> None:
    try:
        require_finite(w)
    except UnusableWeightError as exc:
        raise CheckpointError(f"{directory}: layer {path!r} has {exc}: download it again") from exc


def _dense(module: nn.Module | None) -> mx.array | None:
    if module is None or "weight" not in module:
        return None
    packed = "scales" in module or "codebook" in module
    return dense_weight(module) if packed else module["weight"]
