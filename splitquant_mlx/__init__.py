"""Quantize LLMs for Apple silicon without a calibration data set: SplitQuantV2 for MLX.

One weight:      split, cluster_weight, quantize, quantize_parts, dequantize
One layer:       SplitLinear, SplitConv, QuantizedSplitLinear, QuantizedSplitConv
One mlx model:   split_model, quantize_split_layers
One checkpoint:  convert, Recipe, load_recipe, load, load_manifest
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from splitquant_mlx._version import __version__

if TYPE_CHECKING:
    from splitquant_mlx.conversion.pipeline import convert
    from splitquant_mlx.errors import (
        CheckpointError,
        RecipeError,
        SourceError,
        SplitQuantError,
        TargetError,
        VersionError,
    )
    from splitquant_mlx.formats.manifest import LayerRecord, Manifest, load_manifest
    from splitquant_mlx.models.loader import load
    from splitquant_mlx.nn.model_file import QuantizedSplitLinear
    from splitquant_mlx.nn.split_layers import (
        QuantizedSplitConv,
        SplitConv,
        SplitLinear,
        quantize_split_layers,
        split_model,
    )
    from splitquant_mlx.quantization.affine import Quantized, dequantize, quantize, quantize_parts
    from splitquant_mlx.quantization.kmeans import Clustering
    from splitquant_mlx.quantization.split import cluster_weight, split
    from splitquant_mlx.recipe import Recipe, load_recipe

__all__ = [
    "CheckpointError",
    "Clustering",
    "LayerRecord",
    "Manifest",
    "Quantized",
    "QuantizedSplitConv",
    "QuantizedSplitLinear",
    "Recipe",
    "RecipeError",
    "SourceError",
    "SplitConv",
    "SplitLinear",
    "SplitQuantError",
    "TargetError",
    "VersionError",
    "__version__",
    "cluster_weight",
    "convert",
    "dequantize",
    "load",
    "load_manifest",
    "load_recipe",
    "quantize",
    "quantize_parts",
    "quantize_split_layers",
    "split",
    "split_model",
]

# Imported on first use: --help answers without mlx, and OpenBLAS can be loaded before mlx is.
_MODULES = {
    "quantization.affine": ("Quantized", "dequantize", "quantize", "quantize_parts"),
    "errors": (
        "CheckpointError",
        "RecipeError",
        "SourceError",
        "SplitQuantError",
        "TargetError",
        "VersionError",
    ),
    "quantization.kmeans": ("Clustering",),
    "nn.split_layers": (
        "QuantizedSplitConv",
        "SplitConv",
        "SplitLinear",
        "quantize_split_layers",
        "split_model",
    ),
    "models.loader": ("load",),
    "formats.manifest": ("LayerRecord", "Manifest", "load_manifest"),
    "nn.model_file": ("QuantizedSplitLinear",),
    "quantization.split": ("cluster_weight", "split"),
    "conversion.pipeline": ("convert",),
    "recipe": ("Recipe", "load_recipe"),
}


def __getattr__(name: str) -> Any:
    for module, names in _MODULES.items():
        if name in names:
            value = getattr(import_module(f"{__name__}.{module}"), name)
            globals()[name] = value
            return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
