"""Plan the conversion of every layer from recipe and model, before any weight is read."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from splitquant_mlx.calibration.blocks import is_expert_stack
from splitquant_mlx.errors import RecipeError
from splitquant_mlx.formats.head_file import COPIED
from splitquant_mlx.models.architecture import parameters
from splitquant_mlx.nn.split_layers import scale_dtype
from splitquant_mlx.quantization.lut import index_dtype
from splitquant_mlx.recipe import DTYPES, GROUP_SIZES, LEARNED, MODES, OWN_LAYERS, Recipe

# in mlx-vlm 0.7; see `head_file`
HEAD_FROM_EMBEDDING = ("gemma3", "gemma3_text")
Predicate = Callable[[str, nn.Module], bool | dict[str, Any]]


@dataclass(frozen=True, kw_only=True)
class LayerPlan:
    """Plan for one layer with a weight matrix.

    Attributes:
        path: the module's path, such as "model.layers.0.mlp.up_proj".
        kind: "linear", "lm_head", "embedding", "experts" (a stack of expert matrices) or "other".
        action: "split", "quantize" or "keep".
        shape: of the weight, (..., out, in).
        quantizer: name in `quantizers.QUANTIZERS`; empty for "keep".
        bits: bits per code; 0 for "keep".
        group_size: inputs that share a scale; 0 for "keep".
        mode: mlx's quantization mode, "lut" (one codebook per row) or "mixed" (`bits` on average).
        granularity: one scale per "group", "channel" or "tensor".
        clusters: parts that the weight is split into; 1 unless split.
        kmeans: "exact" or "sklearn".
        sweeps: rounds of coordinate descent (gptq, salience), of codes and codebooks (lut), or
            passes over the text (omniquant, efficientqat).
        outliers: unquantized entries per row (lut).
        codebook: "kmeans" or "powers" (lut).
        note: why the layer deviates from the recipe's settings for its kind; empty if it does not.
        deviation: what the note is about: "pattern" (include or exclude), "architecture" or "width"
            of the layer; empty for anything else.
        head: path under which scales and biases are stored a second time; see `LayerRecord`.
    """

    path: str
    kind: str
    action: str
    shape: tuple[int, ...]
    quantizer: str = ""
    bits: int = 0
    group_size: int = 0
    mode: str = "affine"
    granularity: str = "group"
    clusters: int = 1
    kmeans: str = "exact"
    sweeps: int = 0
    outliers: int = 0
    codebook: str = "kmeans"
    note: str = ""
    deviation: str = ""
    head: str = ""

    def tensors(self, dtype: mx.Dtype) -> dict[str, tuple[mx.Dtype, tuple[int, ...]]]:
        """Return dtype and shape of the tensors stored for a weight of type `dtype`, by leaf."""
        if self.action == "keep":
            return {"weight": (dtype, self.shape)}
        *rows, width = self.shape
        width *= self.clusters
        tensors = {"weight": (mx.uint32, (*rows, width * self.bits // 32))}
        if self.mode == "lut":
            tensors["codebook"] = dtype, (*rows, 2**self.bits)
            if self.outliers:
                tensors["outliers"] = dtype, (*rows, self.outliers)
                tensors["indices"] = index_dtype(width), (*rows, self.outliers)
            return tensors
        scales = (*rows, width // self.group_size)
        if self.mode == "mixed":
            tensors |= {"scales": (dtype, scales), "biases": (dtype, scales)}
            flat = {leaf: (kind, (math.prod(shape),)) for leaf, (kind, shape) in tensors.items()}
            return {**flat, "widths": (mx.uint8, (width,))}
        if self.mode != "affine":
            return {**tensors, "scales": (mx.uint8, scales)}
        # a split float16 or float32 layer may have bfloat16 scales, of the same size as float16
        kind = (scale_dtype(dtype) or mx.float16) if self.action == "split" else dtype
        return {**tensors, "scales": (kind, scales), "biases": (kind, scales)}

    def stored_bytes(self, dtype: mx.Dtype) -> int:
        """Return the stored bytes of a weight of type `dtype`, including copies for a head."""
        return sum(
            kind.size * math.prod(shape) * (2 if self.head and leaf in COPIED else 1)
            for leaf, (kind, shape) in self.tensors(dtype).items()
        )


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Plan for a whole model.

    Attributes:
        layers: plan of each layer with a weight, by path, in model order.
        dtype: type that floating tensors are cast to before conversion; None keeps their types.
    """

    layers: Mapping[str, LayerPlan]
    dtype: mx.Dtype | None

    def layer_of(self, name: str) -> LayerPlan | None:
        """Return the layer whose weight is parameter `name`; None for other parameters."""
        path, _, leaf = name.rpartition(".")
        return self.layers.get(path) if leaf == "weight" else None

    def tensors(
        self, arrays: Mapping[str, mx.array]
    ) -> dict[str, tuple[mx.Dtype, tuple[int, ...]]]:
        """Return dtype and shape of every tensor of the converted checkpoint, by name.

        Args:
            arrays: the parameters by name, cast to `dtype`.
        """
        tensors = {}
        for name, array in arrays.items():
            if layer := self.layer_of(name):
                stored = layer.tensors(array.dtype)
                tensors |= {f"{layer.path}.{leaf}": kind for leaf, kind in stored.items()}
            else:
                tensors[name] = array.dtype, tuple(array.shape)
        return tensors

    def stored_bytes(self, arrays: Mapping[str, mx.array]) -> int:
        """Return the size of all tensors of the converted checkpoint, bytes; see `tensors`."""
        return sum(
            layer.stored_bytes(array.dtype) if (layer := self.layer_of(name)) else array.nbytes
            for name, array in arrays.items()
        )


def make_plan(recipe: Recipe, model: nn.Module, config: Mapping[str, Any]) -> Plan:
    """Plan the conversion of `model`.

    Args:
        recipe: the settings.
        model: mlx-lm's model; only names, types and shapes are used.
        config: its config.json.

    Raises:
        RecipeError: no layer is selected, a pattern of the recipe matches no layer, or the group
            size divides the width of no layer.
    """
    predicate = getattr(model, "quant_predicate", None)
    modules = dict(model.named_modules())
    kinds = {}
    for name in parameters(model):
        path, _, leaf = name.rpartition(".")
        if leaf == "weight" and modules[path].weight.ndim >= 2:
            kinds[path] = _kind(path, modules[path], config.get("vocab_size"))
    tied = "lm_head" not in kinds.values()
    layers = {
        path: _plan_layer(recipe, path, kind, modules[path], predicate, tied)
        for path, kind in kinds.items()
    }
    if unknown := [path for path in recipe.layers if path not in layers]:
        raise RecipeError(
            f"the recipe has settings for {unknown[0]!r}, which is not a layer of this model: use "
            "a recipe made for this model"
        )
    _require_matches(recipe, layers)
    _require_convertible_layer(recipe, layers)
    if config.get("model_type") in HEAD_FROM_EMBEDDING and tied:
        layers = _with_head(layers)
    return Plan(layers=layers, dtype=stored_dtype(recipe, config))


def _with_head(layers: Mapping[str, LayerPlan]) -> dict[str, LayerPlan]:
    """Return `layers` with the head set for a quantized embedding."""
    return {
        path: replace(layer, head=path.replace("model.embed_tokens", "lm_head"))
        if layer.kind == "embedding" and layer.action == "quantize"
        else layer
        for path, layer in layers.items()
    }


def stored_dtype(recipe: Recipe, config: Mapping[str, Any]) -> mx.Dtype | None:
    """Return the dtype of unquantized tensors by recipe or config; None keeps their types."""
    text_config = config.get("text_config") or {}
    name = (
        recipe.dtype or config.get("torch_dtype") or config.get("dtype") or text_config.get("dtype")
    )
    return getattr(mx, name) if name in DTYPES else None


def _kind(path: str, module: nn.Module, vocab_size: int | None) -> str:
    if isinstance(module, nn.Embedding):
        return "embedding"
    if type(module) is nn.Linear:
        is_head = module.weight.shape[0] == vocab_size and ".layers." not in path
        return "lm_head" if is_head or path.split(".")[-1] == "lm_head" else "linear"
    return "experts" if hasattr(module, "to_quantized") else "other"


def _plan_layer(
    recipe: Recipe,
    path: str,
    kind: str,
    module: nn.Module,
    predicate: Predicate | None,
    tied: bool,
) -> LayerPlan:
    shape = tuple(module["weight"].shape)

    def keep(note: str = "", deviation: str = "") -> LayerPlan:
        return LayerPlan(
            path=path, kind=kind, action="keep", shape=shape, note=note, deviation=deviation
        )

    if kind == "other":
        return keep(f"a {type(module).__name__} has no quantized form")
    action, note = _action(recipe, path, kind, module)
    if action == "keep":
        return keep(note, "pattern" if note else "")
    deviation = ""
    bits, group_size, mode = _settings(recipe, path, kind)
    is_custom = recipe.method in OWN_LAYERS and kind == "linear"
    if predicate is not None:
        settings = predicate(path, module)
        if settings is False:
            return keep("this architecture keeps it unquantized", "architecture")
        if isinstance(settings, dict) and action == "quantize" and path not in recipe.layers:
            bits, mode = settings.get("bits", bits), settings.get("mode", "affine")
            group_size = settings.get("group_size", MODES[mode][0])  # defaults of to_quantized
            deviation = "" if note else "architecture"
            note = note or f"this architecture asks for {bits} bits"
            is_custom = False
    sizes = [group_size, *reversed(GROUP_SIZES)] if mode == "affine" else [group_size]
    fitting = [size for size in sizes if size <= group_size and shape[-1] % size == 0]
    if not fitting:
        return keep(f"no group size fits its width {shape[-1]}", "width")
    if fitting[0] != group_size:
        reason = f"group size {fitting[0]}, as {group_size} does not divide its width {shape[-1]}"
        note = f"{reason}; {note}" if note else reason
        deviation = "width"
    layer = LayerPlan(
        path=path,
        kind=kind,
        action=action,
        shape=shape,
        quantizer=_quantizer_for(recipe, module, kind, action, tied),
        bits=bits,
        group_size=fitting[0],
        mode=mode,
        granularity=recipe.granularity,
        clusters=recipe.clusters if action == "split" else 1,
        kmeans=recipe.kmeans,
        sweeps=recipe.sweeps or 0,
        note=note,
        deviation=deviation,
    )
    return _custom_layer(recipe, layer) if is_custom else layer


def _custom_layer(recipe: Recipe, layer: LayerPlan) -> LayerPlan:
    """Return the plan of a linear layer for methods lut and salience, with layers not in mlx."""
    method, path, allowed = recipe.method, layer.path, OWN_LAYERS[recipe.method]
    if layer.bits not in allowed:
        raise RecipeError(
            f"expected {', '.join(map(str, allowed))} with method {method!r}, got {layer.bits}",
            field=f"layers.{path}.bits",
        )
    if method == "salience":
        return replace(layer, quantizer=method, mode="mixed")
    if "group_size" in recipe.layers.get(path, {}):
        raise RecipeError("not for method 'lut': leave it out", field=f"layers.{path}.group_size")
    return replace(
        layer,
        quantizer=method,
        mode="lut",
        group_size=layer.shape[-1],
        outliers=math.ceil(recipe.outlier_share * layer.shape[-1]),
        codebook=recipe.codebook or "kmeans",
        note="",
        deviation="",
    )


def _settings(recipe: Recipe, path: str, kind: str) -> tuple[int, int, str]:
    """Return bits, group_size and mode of a layer by the recipe."""
    settings = recipe.layers.get(path, {})
    assert recipe.bits is not None and recipe.group_size is not None  # filled in by Recipe
    bits = recipe.bits
    if kind in ("embedding", "lm_head"):
        bits = recipe.embedding_bits or bits
    group_size = settings.get("group_size", recipe.group_size)
    return settings.get("bits", bits), group_size, recipe.mode


def _action(recipe: Recipe, path: str, kind: str, module: nn.Module) -> tuple[str, str]:
    """Return the action for a layer, and a note if it deviates from the recipe."""
    if any(fnmatchcase(path, pattern) for pattern in recipe.exclude):
        return "keep", "excluded"
    if recipe.include and not any(fnmatchcase(path, pattern) for pattern in recipe.include):
        return "keep", "not included"
    if kind == "embedding":
        return str(recipe.embeddings), ""
    if kind == "lm_head":
        return str(recipe.lm_head), ""
    if kind == "experts" and recipe.method != "rtn" and not is_expert_stack(module):
        done = "not split" if recipe.method == "splitquant" else "quantized by rtn"
        return "quantize", f"a {type(module).__name__} is {done}"
    if kind == "experts" and recipe.method in (*OWN_LAYERS, *LEARNED):
        method = "gptq" if recipe.method in OWN_LAYERS else "rtn"
        return "quantize", f"a stack of experts is quantized by {method}"
    return ("split" if recipe.method == "splitquant" else "quantize"), ""


def _quantizer_for(recipe: Recipe, module: nn.Module, kind: str, action: str, tied: bool) -> str:
    """Return the quantizer's name; only layers whose inputs are hidden states are calibrated."""
    has_inputs = kind in ("linear", "lm_head") or (kind == "embedding" and tied)
    calibrated = (has_inputs or is_expert_stack(module)) and recipe.calibration is not None
    if action == "split":
        return "splitquant_imatrix" if calibrated else "splitquant"
    if not calibrated or recipe.method == "rtn":  # a calibration of rtn is for refine
        return "rtn"
    if recipe.method in LEARNED and kind in ("linear", "experts"):
        return recipe.method if kind == "linear" else "rtn"
    return "imatrix" if recipe.method == "imatrix" else "gptq"


def _require_matches(recipe: Recipe, layers: Mapping[str, LayerPlan]) -> None:
    """Raise RecipeError for an include or exclude pattern that matches no layer."""
    for option in ("include", "exclude"):
        for pattern in getattr(recipe, option):
            if not any(fnmatchcase(path, pattern) for path in layers):
                raise RecipeError(
                    f"{option} pattern {pattern!r} matches no layer of this model: expected a glob "
                    f"pattern over layer paths such as {', '.join([*layers][:3])}"
                )


def _require_convertible_layer(recipe: Recipe, layers: Mapping[str, LayerPlan]) -> None:
    linear = [layer for layer in layers.values() if layer.kind in ("linear", "experts")]
    selected = [layer for layer in linear if layer.deviation != "pattern"]
    if not selected:
        if any(layer.action != "keep" for layer in layers.values()):
            return
        if recipe.include or recipe.exclude:
            raise RecipeError(
                "include and exclude leave no layer to convert: embeddings and lm_head are "
                f"{recipe.embeddings!r} and {recipe.lm_head!r} in this recipe"
            )
        raise RecipeError("this model has no linear layers to convert")
    widths = sorted({layer.shape[-1] for layer in selected if layer.deviation == "width"})
    if widths and all(layer.deviation in ("width", "architecture") for layer in selected):
        fits = [size for size in GROUP_SIZES if any(width % size == 0 for width in widths)]
        advice = f"use --group-size {max(fits)}" if fits else "no group size fits this model"
        raise RecipeError(
            f"group size {recipe.group_size} divides the width of no layer "
            f"({', '.join(map(str, widths[:4]))}): {advice}"
        )
