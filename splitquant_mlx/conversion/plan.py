"""Decide from recipe and model what happens to every layer, before any weight is read."""

from collections.abc import Callable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import mlx.nn as nn

from splitquant_mlx.errors import RecipeError
from splitquant_mlx.models.checkpoint import parameters
from splitquant_mlx.recipe import CALIBRATED, GROUP_SIZES, MODES, Recipe


@dataclass(frozen=True, kw_only=True)
class LayerPlan:
    """Say what happens to one layer that holds a weight matrix.

    Attributes:
        path: the module's path, such as "model.layers.0.mlp.up_proj".
        kind: "linear", "lm_head", "embedding", "experts" (a stack of expert matrices) or "other".
        action: "split", "quantize" or "keep".
        shape: of the weight, (..., out, in).
        bits: bits of a code; None when kept.
        group_size: inputs that share a scale; None when kept.
        mode: mlx's quantization mode.
        fit: how codes and scales are found: "rtn", "imatrix" or "gptq".
        note: why this layer is not treated as the recipe says for its kind; empty if it is.
    """

    path: str
    kind: str
    action: str
    shape: tuple[int, ...]
    bits: int | None = None
    group_size: int | None = None
    mode: str = "affine"
    fit: str = "rtn"
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Hold the whole plan: one entry for each layer with a weight, by path, in model order."""

    recipe: Recipe
    layers: dict[str, LayerPlan]

    @property
    def exceptions(self) -> list[LayerPlan]:
        """Return the layers that are not treated as the recipe says for their kind."""
        return [layer for layer in self.layers.values() if layer.note]


def make_plan(recipe: Recipe, model: nn.Module, vocab_size: int | None = None) -> Plan:
    """Plan the conversion of `model`.

    Args:
        recipe: the settings.
        model: mlx-lm's model; only names, types and shapes are looked at.
        vocab_size: the width of the output head, to know it by when it is not called lm_head.

    Raises:
        RecipeError: when no layer is selected, a pattern of the recipe matches no layer, or the
            group size fits none of them.
    """
    predicate = getattr(model, "quant_predicate", None)
    modules = dict(model.named_modules())
    tied = not any(_kind(path, m, vocab_size) == "lm_head" for path, m in modules.items())
    layers = {}
    for name in parameters(model):
        path, _, leaf = name.rpartition(".")
        if leaf == "weight" and modules[path].weight.ndim >= 2:
            kind = _kind(path, modules[path], vocab_size)
            layers[path] = _plan_layer(recipe, path, kind, modules[path], predicate, tied)
    if unknown := [path for path in recipe.layers if path not in layers]:
        raise RecipeError(
            f"the recipe has settings for {unknown[0]!r}, which is no layer of this model: take "
            "the recipe that was made for it"
        )
    plan = Plan(recipe=recipe, layers=layers)
    _require_matches(plan)
    _require_fit(plan)
    return plan


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
    predicate: Callable[[str, nn.Module], bool | dict[str, Any]] | None,
    tied: bool,
) -> LayerPlan:
    weight = module["weight"]
    shape = tuple(weight.shape)

    def keep(note: str = "") -> LayerPlan:
        return LayerPlan(path=path, kind=kind, action="keep", shape=shape, note=note)

    if kind == "other":
        return keep(f"a {type(module).__name__} has no quantized form")
    action, note = _wanted_action(recipe, path, kind)
    if action == "keep":
        return keep(note)
    bits, group_size, mode = _settings(recipe, path, kind)
    if predicate is not None:
        asked = predicate(path, module)
        if asked is False:
            return keep("this architecture keeps it unquantized")
        if isinstance(asked, dict) and action == "quantize" and path not in recipe.layers:
            bits, mode = asked.get("bits", bits), asked.get("mode", mode)
            group_size = asked.get("group_size", MODES[mode][0])
            note = note or f"this architecture asks for {bits} bits"
    sizes = [group_size, *reversed(GROUP_SIZES)] if mode == "affine" else [group_size]
    fitting = [size for size in sizes if size <= group_size and shape[-1] % size == 0]
    if not fitting:
        return keep(f"no group size fits its width {shape[-1]}")
    if fitting[0] != group_size:
        note = f"group size {fitting[0]}, as {group_size} does not divide its width {shape[-1]}"
    return LayerPlan(
        path=path,
        kind=kind,
        action=action,
        shape=shape,
        bits=bits,
        group_size=fitting[0],
        mode=mode,
        fit=_fit(recipe, kind, action, tied),
        note=note,
    )


def _settings(recipe: Recipe, path: str, kind: str) -> tuple[int, int, str]:
    """Return bits, group_size and mode that the recipe has for a layer."""
    own = recipe.layers.get(path, {})
    bits, group_size = recipe.bits or 0, recipe.group_size or 0
    if kind in ("embedding", "lm_head"):
        bits = recipe.embedding_bits or bits
    return own.get("bits", bits), own.get("group_size", group_size), recipe.mode


def _wanted_action(recipe: Recipe, path: str, kind: str) -> tuple[str, str]:
    """Return the action for a layer and, where the recipe cannot have it, why it differs."""
    if any(fnmatchcase(path, pattern) for pattern in recipe.exclude):
        return "keep", "excluded"
    if recipe.include and not any(fnmatchcase(path, pattern) for pattern in recipe.include):
        return "keep", "not included"
    if kind == "embedding":
        return str(recipe.embeddings), ""
    if kind == "lm_head":
        return str(recipe.lm_head), ""
    if recipe.method != "splitquant":
        plainly = recipe.method in CALIBRATED and kind == "experts"
        return "quantize", "a stack of experts is rounded to nearest" if plainly else ""
    if kind == "experts":
        return "quantize", "a stack of experts is not split"
    return "split", ""


def _fit(recipe: Recipe, kind: str, action: str, tied: bool) -> str:
    """Return how a layer is fitted: only layers that are fed hidden states have moments."""
    fed = kind in ("linear", "lm_head") or (kind == "embedding" and tied)
    unfitted = recipe.calibration is None or recipe.method == "rtn"  # which refine may calibrate
    if unfitted or action == "keep" or not fed:
        return "rtn"
    return "gptq" if recipe.method == "gptq" else "imatrix"


def _require_matches(plan: Plan) -> None:
    """Raise RecipeError for an include or exclude pattern that matches no layer."""
    for option in ("include", "exclude"):
        for pattern in getattr(plan.recipe, option):
            if not any(fnmatchcase(path, pattern) for path in plan.layers):
                raise RecipeError(
                    f"{option} pattern {pattern!r} matches no layer of this model: expected a glob "
                    f"pattern over layer paths such as {', '.join([*plan.layers][:3])}"
                )


def _require_fit(plan: Plan) -> None:
    recipe = plan.recipe
    linear = [layer for layer in plan.layers.values() if layer.kind in ("linear", "experts")]
    selected = [layer for layer in linear if layer.note not in ("excluded", "not included")]
    if not selected:
        if any(layer.action != "keep" for layer in plan.layers.values()):
            return
        if recipe.include or recipe.exclude:
            raise RecipeError(
                "include and exclude leave no layer to convert: embeddings and lm_head are "
                f"{recipe.embeddings!r} and {recipe.lm_head!r} in this recipe"
            )
        raise RecipeError("this model has no linear layer to convert")
    unfit = ("group size", "no group size", "this architecture")
    if all(layer.note.startswith(unfit) for layer in selected):
        if all(layer.note.startswith("this architecture") for layer in selected):
            return
        widths = ", ".join(str(n) for n in sorted({layer.shape[-1] for layer in selected})[:4])
        fits = [n for n in GROUP_SIZES if any(layer.shape[-1] % n == 0 for layer in selected)]
        advice = f"use --group-size {max(fits)}" if fits else "no group size fits this model"
        raise RecipeError(
            f"group size {recipe.group_size} divides the width of no layer ({widths}): {advice}"
        )


def parameter_names(plan: Plan, model: nn.Module) -> list[str]:
    """Return the names of all tensors that the converted checkpoint will hold."""
    names = []
    for name in parameters(model):
        path, _, leaf = name.rpartition(".")
        layer = plan.layers.get(path)
        names.append(name)
        if leaf == "weight" and layer is not None and layer.action != "keep":
            names.append(f"{path}.scales")
            if layer.mode == "affine":
                names.append(f"{path}.biases")
    return names
