"""Look into a model: its layers, where they are split, and how a layer's weights are spread."""

from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from splitquant_mlx.conversion.plan import make_plan
from splitquant_mlx.conversion.weight import require_finite
from splitquant_mlx.errors import CheckpointError, RecipeError
from splitquant_mlx.formats.manifest import LayerRecord, Manifest, load_manifest
from splitquant_mlx.models.checkpoint import open_checkpoint
from splitquant_mlx.models.config import read_config
from splitquant_mlx.models.dense import dense_weight
from splitquant_mlx.models.loader import load_model
from splitquant_mlx.progress import Progress, Silent
from splitquant_mlx.quantization.split import cluster_weight
from splitquant_mlx.recipe import Recipe


@dataclass(frozen=True, kw_only=True)
class Inspection:
    """Hold what `inspect_model` found: the layers, and the manifest of a converted model."""

    layers: tuple[LayerRecord, ...]
    manifest: Manifest | None


@dataclass(frozen=True, kw_only=True)
class Histogram:
    """Hold the spread of a layer's weights.

    Attributes:
        path: the layer.
        counts: entries in each bin.
        edges: bounds of the bins, one more than counts.
        cut_points: where the layer is split, ascending.
    """

    path: str
    counts: np.ndarray
    edges: np.ndarray
    cut_points: tuple[float, ...]


def inspect_model(
    directory: Path, *, clusters: int = 3, progress: Progress | None = None
) -> Inspection:
    """List the layers that hold a weight matrix.

    A model converted by splitquant-mlx is described by its manifest. Of any other model the
    linear layers are clustered, to show where a split would cut them.

    Args:
        directory: a model directory.
        clusters: parts to cluster an unconverted model's layers into.
        progress: told how far the clustering is.

    Raises:
        CheckpointError: when the directory is not a usable model.
    """
    if (manifest := load_manifest(directory)) is not None:
        return Inspection(layers=manifest.layers, manifest=manifest)
    checkpoint = open_checkpoint(directory)
    plan = make_plan(Recipe(clusters=clusters), checkpoint.model, checkpoint.config)
    records = []
    with (progress or Silent()).task("Clustering", len(plan.layers)) as advance:
        for layer in plan.layers.values():
            w = checkpoint.weights.pop(f"{layer.path}.weight")
            _require_finite(directory, layer.path, w)
            cuts = cluster_weight(w, clusters).cut_points if layer.action == "split" else ()
            records.append(
                LayerRecord(
                    path=layer.path,
                    kind=layer.kind,
                    action="keep",
                    shape=layer.shape,
                    nbytes=w.nbytes,
                    bits_per_weight=8 * w.nbytes / w.size,
                    cut_points=cuts,
                )
            )
            advance(1)
    return Inspection(layers=tuple(records), manifest=None)


def layer_histogram(directory: Path, path: str, *, clusters: int = 3, bins: int = 160) -> Histogram:
    """Count how a layer's weights are spread; of a quantized layer, the weights it stands for.

    Raises:
        RecipeError: when the model has no layer `path` with a weight matrix.
    """
    manifest = load_manifest(directory)
    config = read_config(directory)
    if manifest is None and "quantization" not in config:
        w = open_checkpoint(directory).weights.get(f"{path}.weight")
    else:
        module = dict(load_model(directory, lazy=True).named_modules()).get(path)
        w = _dense(module)
    if w is None or w.ndim < 2:
        raise RecipeError(
            f"{directory} has no layer {path!r} with a weight matrix: `splitquant-mlx inspect` "
            "without --layer lists them"
        )
    _require_finite(directory, path, w)
    records = {record.path: record for record in manifest.layers} if manifest else {}
    cuts = records[path].cut_points if path in records else ()
    counts, edges = np.histogram(np.array(w.astype(mx.float32)), bins=bins)
    cuts = cuts or cluster_weight(w, clusters).cut_points
    return Histogram(path=path, counts=counts, edges=edges, cut_points=cuts)


def _require_finite(directory: Path, path: str, w: mx.array) -> None:
    try:
        require_finite(w)
    except ValueError as exc:
        raise CheckpointError(f"{directory}: layer {path!r} {exc}: download it again") from exc


def _dense(module: nn.Module | None) -> mx.array | None:
    if module is None or "weight" not in module:
        return None
    return dense_weight(module) if "scales" in module else module["weight"]
