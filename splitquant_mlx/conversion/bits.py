"""Choose bits and group size of every layer for a target size or KL divergence."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path

import mlx.core as mx
import numpy as np

from splitquant_mlx.calibration.blocks import is_expert_stack
from splitquant_mlx.calibration.layer_divergence import Option
from splitquant_mlx.calibration.saved_state import SavedState
from splitquant_mlx.calibration.sensitivity import METHOD, from_json, predict_divergence, to_json
from splitquant_mlx.calibration.tokens import calibration_tokens
from splitquant_mlx.conversion.budget import Sizes, find_budget, measure_sizes
from splitquant_mlx.errors import RecipeError
from splitquant_mlx.formats.shard_writer import MAX_SHARD_BYTES
from splitquant_mlx.models.architecture import widest_input
from splitquant_mlx.models.checkpoint import open_checkpoint
from splitquant_mlx.models.lazy import LazyModel, open_model
from splitquant_mlx.models.loader import load_model
from splitquant_mlx.progress import SILENT, Progress
from splitquant_mlx.quantization.allocate import allocate
from splitquant_mlx.recipe import Recipe
from splitquant_mlx.runtime.cache import cache_directory, cached_on_disk

TOKENS = 4096  # for measuring sensitivities
STEP = 0.5  # bits/weight to the next size


@dataclass(frozen=True, kw_only=True)
class Step:
    """Size and predicted divergence of one allocation of bits.

    Attributes:
        bits_per_weight: stored bits per weight of the quantized layers.
        total_bytes: maximum size of all .safetensors files.
        divergence: predicted KL divergence, nats/token.
    """

    bits_per_weight: float
    total_bytes: float
    divergence: float


@dataclass(frozen=True, kw_only=True)
class Forecast:
    """Bits chosen for every layer, with the predicted divergence.

    Attributes:
        recipe: a "gptq" recipe with the bits and group size of every layer.
        bits_per_weight: stored bits per weight of the quantized layers.
        total_bytes: maximum size of all .safetensors files.
        divergence: predicted KL divergence caused by each layer alone, nats/token, on other text
            than that of the calibration; the sum is the prediction for the model.
        nbytes: stored size of each layer, bytes.
        next_size: with half a bit/weight more; None if no larger size is better.
        explanation: how the size was computed, one line; empty if the target is a size.
        mixture: whether tokens are routed to experts; changes of the routing are not predicted.
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
    """Choose bits for a repo id, directory or .gguf file; see `choose_bits`."""
    if recipe.method != "auto":
        raise RecipeError(
            f"expected 'auto', which chooses bits, got {recipe.method!r}", field="method"
        )
    model = str(model)
    with open_model(model, revision=revision, trust_remote_code=False, progress=progress) as opened:
        return choose_bits(opened, recipe, progress)


def choose_bits(
    opened: LazyModel,
    recipe: Recipe,
    progress: Progress,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> Forecast:
    """Choose the bits of an "auto" recipe for a model.

    Raises:
        RecipeError: the target cannot be met, or the model cannot be calibrated.
        SplitQuantError: the model or the calibration text cannot be used.
    """
    checkpoint = open_checkpoint(opened.path)
    recipe = recipe.for_model(widest_input(checkpoint.model))
    sizes = measure_sizes(recipe, checkpoint, max_shard_bytes)
    budget = find_budget(recipe, sizes, checkpoint)
    options = {path: list(stored) for path, stored in sizes.layers.items()}
    tokens = calibration_tokens(opened, recipe.texts, progress)
    texts = max(1, TOKENS // tokens.shape[1])
    divergence = _sensitivities(opened, tokens[:texts], options, recipe.texts.seed, progress)
    if budget.total_bytes is None:
        try:
            chosen = allocate(sizes.layers, divergence, recipe.max_kl or 0)
        except RecipeError as exc:
            raise RecipeError(f"{exc} nats per token", field="max_kl") from exc
    else:
        chosen = allocate(divergence, sizes.layers, budget.total_bytes - sizes.rest_bytes)
    step = _step(chosen, sizes, divergence)
    layers = {path: {"bits": bits, "group_size": size} for path, (bits, size) in chosen.items()}
    return Forecast(
        recipe=replace(recipe.without_target(), layers=layers),
        bits_per_weight=step.bits_per_weight,
        total_bytes=step.total_bytes,
        divergence={path: divergence[path][option] for path, option in chosen.items()},
        nbytes={path: sizes.layers[path][option] for path, option in chosen.items()},
        next_size=_next_size(step, sizes, divergence),
        explanation=budget.explanation,
        mixture=any(is_expert_stack(module) for module in checkpoint.model.modules()),
    )


def _step(
    chosen: Mapping[str, Option], sizes: Sizes, divergence: Mapping[str, Mapping[Option, float]]
) -> Step:
    """Return size and divergence of the chosen options."""
    nbytes = sum(sizes.layers[path][option] for path, option in chosen.items())
    return Step(
        bits_per_weight=8 * nbytes / sizes.entries,
        total_bytes=sizes.rest_bytes + nbytes,
        divergence=sum(divergence[path][option] for path, option in chosen.items()),
    )


def _next_size(
    step: Step, sizes: Sizes, divergence: Mapping[str, Mapping[Option, float]]
) -> Step | None:
    """Return the step with `STEP` bits/weight more; None if its divergence is not lower."""
    larger = sizes.of_bits(step.bits_per_weight + STEP) - sizes.rest_bytes
    next_step = _step(allocate(divergence, sizes.layers, larger), sizes, divergence)
    return next_step if next_step.divergence < step.divergence else None


def _sensitivities(
    opened: LazyModel,
    tokens: np.ndarray,
    options: Mapping[str, list[Option]],
    seed: int,
    progress: Progress,
) -> dict[str, dict[Option, float]]:
    """Predict the divergence of each option, or read it from the cache of another target."""
    settings = (METHOD, opened.hash, seed, sorted(options.items()), version("mlx"))
    key = repr((*settings, mx.default_device().type.name, tokens.shape)).encode()
    name = sha256(key + tokens.tobytes()).hexdigest()

    def unpack(content: bytes) -> dict[str, dict[Option, float]]:
        cached = from_json(json.loads(content))
        return {path: {o: cached[path][o] for o in options[path]} for path in options}

    def compute() -> dict[str, dict[Option, float]]:
        return predict_divergence(
            lambda: load_model(opened.path, lazy=True, dequantize=True),
            tokens,
            options,
            seed=seed,
            progress=progress,
            saved_state=SavedState(cache_directory() / f"sensitivity/{name}.unfinished"),
        )

    def pack(divergence: dict[str, dict[Option, float]]) -> bytes:
        return json.dumps(to_json(divergence)).encode()

    return cached_on_disk(f"sensitivity/{name}.json", compute, pack=pack, unpack=unpack)
