"""Values of the parts "convert", "speed" and "weights" of a study's results."""

import math
from pathlib import Path
from typing import Any

import mlx.core as mx

from splitquant_mlx.bench.speed import Workload, bench_speed
from splitquant_mlx.formats.manifest import Manifest, load_manifest
from splitquant_mlx.inspection.layers import layer_histogram
from splitquant_mlx.models.shards import read_headers
from splitquant_mlx.recipe import Recipe


def measured_sizes(directory: Path, original: Path, method: str) -> dict[str, Any]:
    """Return the size of a model that this study did not convert, as a "convert" part.

    Args:
        directory: directory of the model.
        original: directory of the original, which has the parameter count for bits/weight.
        method: name of the method in the report.
    """
    stored = sum(header.nbytes for header in read_headers(directory).values())
    source = read_headers(original).values()
    return {
        "method": method,
        "bits_per_weight": 8 * stored / sum(math.prod(header.shape) for header in source),
        "stored_bytes": stored,
        "weight_file_bytes": weight_file_bytes(directory),
        "source_bytes": sum(header.nbytes for header in source),
    }


def weight_file_bytes(directory: Path) -> int:
    """Return the size on disk of all weight files of a model directory."""
    return sum(file.stat().st_size for file in directory.glob("*.safetensors"))


def convert_values(
    manifest: Manifest, recipe: Recipe, directory: Path, peak_bytes: int
) -> dict[str, Any]:
    """Return the size and cost of a conversion, as a "convert" part."""
    return {
        "method": recipe.method,
        "linear_bits_per_weight": manifest.linear_bits_per_weight,
        "bits_per_weight": manifest.bits_per_weight,
        "stored_bytes": manifest.stored_bytes,
        "weight_file_bytes": weight_file_bytes(directory),
        "source_bytes": manifest.source_bytes,
        "seconds": manifest.seconds,
        "peak_bytes": peak_bytes,
        "bits": None if recipe.method == "auto" else recipe.bits,
        "granularity": recipe.granularity,
        "clusters": recipe.clusters if recipe.method == "splitquant" else None,
        "num_samples": manifest.recipe.get("calibration", {}).get("num_samples"),
    }


def speed_values(path: Path, workload: Workload, trials: int) -> dict[str, Any]:
    """Measure the speed of a model, as a "speed" part."""
    device = mx.default_device().type.name
    (result,) = bench_speed([str(path)], workload, trials=trials, device=device)["models"]
    decode = result["generation_tps"]
    return {
        "decode_tokens_per_s": decode["median"],
        "decode_tokens_per_s_min": decode["min"],
        "decode_tokens_per_s_max": decode["max"],
        "prefill_tokens_per_s": result["prompt_tps"]["median"],
        "load_s": result["load_s"]["median"],
        "first_token_s": result["first_token_s"]["median"],
        "peak_bytes": max(result["peak_bytes"]["runs"]),
    }


def weights_values(original: Path, home: Path) -> dict[str, Any]:
    """Return the weight histogram of a middle layer and its cut points, as a "weights" part."""
    manifest = load_manifest(home)
    layers = [layer for layer in manifest.layers if layer.action == "split"] if manifest else []
    layer = layers[len(layers) // 2]
    histogram = layer_histogram(original, layer.path)
    return {
        "layer": layer.path,
        "edges": histogram.edges.tolist(),
        "counts": histogram.counts.tolist(),
        "cut_points": list(layer.cut_points),
    }
