"""Quantize LLMs for Apple silicon without a calibration data set: SplitQuantV2 for MLX.

One weight:      split, cluster_weight, quantize, quantize_parts, dequantize
One layer:       SplitLinear, SplitConv, QuantizedSplitLinear, QuantizedSplitConv,
                 LUTLinear
One mlx model:   split_model, quantize_split_layers
One checkpoint:  Recipe, Calibration, load_recipe, forecast, convert, load, load_manifest
Its quality:     evaluate, verify
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from splitquant_mlx._version import __version__

if TYPE_CHECKING:
    from splitquant_mlx.conversion.bits import Forecast, forecast
    from splitquant_mlx.conversion.pipeline import convert
    from splitquant_mlx.conversion.verify import Check, verify
    from splitquant_mlx.errors import (
        CheckpointError,
        RecipeError,
        SourceError,
        SplitQuantError,
        TargetError,
        VersionError,
    )
    from splitquant_mlx.evaluation.settings import Task
    from splitquant_mlx.evaluation.task import evaluate
    from splitquant_mlx.formats.manifest import LayerRecord, Manifest, load_manifest
    from splitquant_mlx.models.loader import load
    from splitquant_mlx.nn.lut_model_file import LUTLinear
    from splitquant_mlx.nn.split_layers import (
        QuantizedSplitConv,
        SplitConv,
        SplitLinear,
        quantize_split_layers,
        split_model,
    )
    from splitquant_mlx.nn.split_model_file import QuantizedSplitLinear
    from splitquant_mlx.quantization.affine import Quantized, dequantize, quantize, quantize_parts
    from splitquant_mlx.quantization.kmeans import Clustering
    from splitquant_mlx.quantization.split import cluster_weight, split
    from splitquant_mlx.recipe import Calibration, Recipe, load_recipe

__all__ = [
    "Calibration",
    "Check",
    "CheckpointError",
    "Clustering",
    "Forecast",
    "LUTLinear",
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
    "Task",
    "VersionError",
    "__version__",
    "cluster_weight",
    "convert",
    "dequantize",
    "evaluate",
    "forecast",
    "load",
    "load_manifest",
    "load_recipe",
    "quantize",
    "quantize_parts",
    "quantize_split_layers",
    "split",
    "split_model",
    "verify",
]

# Imported on first use: --help answers without mlx, and OpenBLAS is loaded before mlx is.
_MODULES = {
    "conversion.bits": "Forecast forecast",
    "conversion.pipeline": "convert",
    "conversion.verify": "Check verify",
    "errors": "CheckpointError RecipeError SourceError SplitQuantError TargetError VersionError",
    "evaluation.settings": "Task",
    "evaluation.task": "evaluate",
    "formats.manifest": "LayerRecord Manifest load_manifest",
    "models.loader": "load",
    "nn.lut_model_file": "LUTLinear",
    "nn.split_model_file": "QuantizedSplitLinear",
    "nn.split_layers": "QuantizedSplitConv SplitConv SplitLinear quantize_split_layers split_model",
    "quantization.affine": "Quantized dequantize quantize quantize_parts",
    "quantization.kmeans": "Clustering",
    "quantization.split": "cluster_weight split",
    "recipe": "Calibration Recipe load_recipe",
}


def __getattr__(name: str) -> Any:
    for module, names in _MODULES.items():
        if name in names.split():
            import_module(f"{__name__}.runtime.blas").preload()
            value = getattr(import_module(f"{__name__}.{module}"), name)
            globals()[name] = value
            return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
