"""Choose bits and group size of every layer, for a target of size or of KL divergence."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path

import mlx.core as mx
import numpy as np

from splitquant_mlx.calibration.blocks import is_expert_stack
from splitquant_mlx.calibration.sensitivity import METHOD, from_json, predict_divergence, to_json
from splitquant_mlx.calibration.tokens import calibration_tokens
from splitquant_mlx.calibration.unfinished import Unfinished
from splitquant_mlx.conversion.budget import Option, Sizes, find_budget, measure_sizes
from splitquant_mlx.errors import RecipeError
from splitquant_mlx.formats.shard_writer import MAX_SHARD_BYTES
from splitquant_mlx.models.checkpoint import open_checkpoint
from splitquant_mlx.models.lazy import LazyModel, open_model
from splitquant_mlx.models.loader import load_model
from splitquant_mlx.progress import SILENT, Progress
from splitquant_mlx.quantization.allocate import allocate
from splitquant_mlx.recipe import Recipe
from splitquant_mlx.runtime.cache import cache_directory, kept

TOKENS = 4096  # that sensitivities are measured on
STEP = 0.5  # bits/weight to the next size up


@dataclass(frozen=True, kw_only=True)
class Step:
    """What another size would give.

    Attributes:
        bits_per_weight: stored bits over entries of the layers that are quantized.
        total_bytes: size of all .safetensors files, at the most.
        divergence: predicted KL divergence, nats a token.
    """

    bits_per_weight: float
    total_bytes: float
    divergence: float


@dataclass(frozen=True, kw_only=True)
class Forecast:
    """Result of choosing bits, and what they are expected to lose.

    Attributes:
        recipe: a "gptq" recipe with the bits and group size of every layer.
        bits_per_weight: stored bits over entries of the layers that are quantized.
        total_bytes: size of all .safetensors files, at the most.
        divergence: predicted KL divergence of each layer alone, on text that the model writes, nats
            a token; the sum predicts the model's.
        nbytes: stored size of each layer, bytes.
        next_size: what half a bit/weight more would give; None where this is the largest size.
        explanation: how the size was computed, one line; empty where the target is the size.
        mixture: whether tokens are routed to experts, whose changes are not predicted.
    """

    recipe: Recipe
    bits_per_weight: float
    total_bytes: float
    divergence: Mapping[str, float]
    nbytes: Mapping[str, float]
    next_size: Step | None = None
    explanation: str = ""
    mixture: bool = False


def forecast(
    model: str | Path,
    recipe: Recipe,
    *,
    revision: str | None = None,
    progress: Progress = SILENT,
) -> Forecast:
    """Choose for a repo id, directory or .gguf file; see `choose_bits`."""
    if recipe.method != "auto":
        raise RecipeError(f"method: expected 'auto', which chooses bits, got {recipe.method!r}")
    model = str(model)
    with open_model(model, revision=revision, trust_remote_code=False, progress=progress) as opened:
        return choose_bits(opened, recipe, progress)


def choose_bits(
    opened: LazyModel,
    recipe: Recipe,
    progress: Progress,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> Forecast:
    """Choose for a model what an "auto" recipe asks for.

    Raises:
        RecipeError: when the target is out of reach, or the model cannot be calibrated.
        SplitQuantError: when the model or the calibration text cannot be used.
    """
    checkpoint = open_checkpoint(opened.path)
    sizes = measure_sizes(recipe, checkpoint, max_shard_bytes)
    budget = find_budget(recipe, sizes, checkpoint)
    options = {path: list(stored) for path, stored in sizes.layers.items()}
    tokens = calibration_tokens(opened, recipe.texts, progress)
    texts = max(1, TOKENS // tokens.shape[1])
    divergence = _sensitivities(opened, tokens[:texts], options, recipe.texts.seed, progress)
    if budget.total_bytes is None:
        try:
            found = allocate(sizes.layers, divergence, recipe.max_kl or 0)
        except RecipeError as exc:
            raise RecipeError(f"max_kl: {exc} nats per token") from exc
    else:
        found = allocate(divergence, sizes.layers, budget.total_bytes - sizes.rest_bytes)
    chosen = _step(found, sizes, divergence)
    layers = {path: {"bits": bits, "group_size": width} for path, (bits, width) in found.items()}
    return Forecast(
        recipe=replace(recipe.without_target(), layers=layers),
        bits_per_weight=chosen.bits_per_weight,
        total_bytes=chosen.total_bytes,
        divergence={path: divergence[path][option] for path, option in found.items()},
        nbytes={path: sizes.layers[path][option] for path, option in found.items()},
        next_size=_next_size(chosen, sizes, divergence),
        explanation=budget.explanation,
        mixture=any(is_expert_stack(module) for module in checkpoint.model.modules()),
    )


def _step(
    found: Mapping[str, Option], sizes: Sizes, divergence: Mapping[str, Mapping[Option, float]]
) -> Step:
    """Return what a choice comes to."""
    nbytes = sum(sizes.layers[path][option] for path, option in found.items())
    return Step(
        bits_per_weight=8 * nbytes / sizes.entries,
        total_bytes=sizes.rest_bytes + nbytes,
        divergence=sum(divergence[path][option] for path, option in found.items()),
    )


def _next_size(
    chosen: Step, sizes: Sizes, divergence: Mapping[str, Mapping[Option, float]]
) -> Step | None:
    """Return what `STEP` bits/weight more would give; None where that is nothing."""
    larger = sizes.of_bits(chosen.bits_per_weight + STEP) - sizes.rest_bytes
    found = _step(allocate(divergence, sizes.layers, larger), sizes, divergence)
    return found if found.divergence < chosen.divergence else None


def _sensitivities(
    opened: LazyModel,
    tokens: np.ndarray,
    options: Mapping[str, list[Option]],
    seed: int,
    progress: Progress,
) -> dict[str, dict[Option, float]]:
    """Predict divergences, or find them as they were for another target."""
    settings = (METHOD, opened.hash, seed, sorted(options.items()), version("mlx"))
    key = repr((*settings, mx.default_device().type.name, tokens.shape)).encode()
    name = sha256(key + tokens.tobytes()).hexdigest()

    def unpack(content: bytes) -> dict[str, dict[Option, float]]:
        found = from_json(json.loads(content))
        return {path: {option: found[path][option] for option in options[path]} for path in options}

    def compute() -> dict[str, dict[Option, float]]:
        return predict_divergence(
            lambda: load_model(opened.path, lazy=True, dequantize=True),
            tokens,
            options,
            seed=seed,
            progress=progress,
            unfinished=Unfinished(cache_directory() / f"sensitivity/{name}.unfinished"),
        )

    def pack(found: dict[str, dict[Option, float]]) -> bytes:
        return json.dumps(to_json(found)).encode()

    return kept(f"sensitivity/{name}.json", compute, pack=pack, unpack=unpack)
