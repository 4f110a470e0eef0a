"""Choose bits and group size of every layer, for a target of bits/weight or of KL divergence."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from hashlib import sha256
from importlib.metadata import version

import mlx.core as mx
import numpy as np

from splitquant_mlx.calibration.sensitivity import Option, predict_divergence
from splitquant_mlx.calibration.tokens import calibration_tokens
from splitquant_mlx.conversion.converter import source_array
from splitquant_mlx.conversion.plan import LayerPlan, Plan, make_plan
from splitquant_mlx.models.checkpoint import Checkpoint, open_checkpoint
from splitquant_mlx.models.lazy import LazyModel, open_model
from splitquant_mlx.models.loader import load_model
from splitquant_mlx.progress import Progress, Silent
from splitquant_mlx.quantization.allocate import allocate
from splitquant_mlx.recipe import Calibration, Recipe
from splitquant_mlx.runtime.cache import kept

OPTIONS: tuple[Option, ...] = (
    (2, 64), (2, 32), (3, 128), (3, 64), (3, 32), (4, 128), (4, 64), (4, 32),
    (5, 128), (5, 64), (5, 32), (6, 128), (6, 64), (6, 32), (8, 64), (8, 32),
)  # fmt: skip
TOKENS = 4096  # that sensitivities are measured on


@dataclass(frozen=True, kw_only=True)
class Forecast:
    """Result of choosing bits, and what they are expected to lose.

    Attributes:
        recipe: a "gptq" recipe with the bits and group size of every layer.
        bits_per_weight: stored bits over entries of the layers that are quantized.
        divergence: predicted KL divergence of each layer alone, on text that the model writes, nats
            a token; the sum predicts the model's.
        nbytes: stored size of each layer, bytes.
    """

    recipe: Recipe
    bits_per_weight: float
    divergence: Mapping[str, float]
    nbytes: Mapping[str, float]


def forecast(
    model: str, recipe: Recipe, *, revision: str | None = None, progress: Progress | None = None
) -> Forecast:
    """Choose for a repo id, directory or .gguf file; see `choose_bits`."""
    progress = progress or Silent()
    with open_model(model, revision=revision, trust_remote_code=False, progress=progress) as opened:
        return choose_bits(opened, recipe, progress)


def choose_bits(opened: LazyModel, recipe: Recipe, progress: Progress) -> Forecast:
    """Choose for a model what an "auto" recipe asks for.

    Raises:
        RecipeError: when the target is out of reach, or the model cannot be calibrated.
        SplitQuantError: when the model or the calibration text cannot be used.
    """
    checkpoint = open_checkpoint(opened.path)
    chosen = replace(recipe, method="gptq", target_bpw=None, max_kl=None)
    plan = make_plan(chosen, checkpoint.model, checkpoint.config)
    layers = {
        path: layer
        for path, layer in plan.layers.items()
        if layer.action == "quantize" and (layer.kind != "experts" or layer.quantizer == "gptq")
    }
    options = {path: _options(layer, recipe) for path, layer in layers.items()}
    calibration = chosen.calibration or Calibration()
    tokens = calibration_tokens(opened, calibration, progress)
    texts = max(1, TOKENS // tokens.shape[1])
    divergence = _sensitivities(opened, tokens[:texts], options, calibration.seed, progress)
    stored = {path: _stored_bits(checkpoint, plan, path, options[path]) for path in layers}
    entries = sum(math.prod(layer.shape) for layer in layers.values())
    if recipe.max_kl is not None:
        found = allocate(stored, divergence, recipe.max_kl)
    else:
        found = allocate(divergence, stored, (recipe.target_bpw or 0) * entries)
    return Forecast(
        recipe=replace(
            chosen,
            layers={
                path: {"bits": bits, "group_size": size} for path, (bits, size) in found.items()
            },
        ),
        bits_per_weight=sum(stored[path][option] for path, option in found.items()) / entries,
        divergence={path: divergence[path][option] for path, option in found.items()},
        nbytes={path: stored[path][option] / 8 for path, option in found.items()},
    )


def _sensitivities(
    opened: LazyModel,
    tokens: np.ndarray,
    options: Mapping[str, list[Option]],
    seed: int,
    progress: Progress,
) -> dict[str, dict[Option, float]]:
    """Predict divergences, or find them as they were for another target."""
    settings = (opened.hash, seed, sorted(options.items()), version("mlx"))
    key = repr((*settings, mx.default_device().type.name, tokens.shape)).encode()
    name = sha256(key + tokens.tobytes()).hexdigest()

    def unpack(content: bytes) -> dict[str, dict[Option, float]]:
        listed = json.loads(content)
        return {path: {(bits, size): kl for bits, size, kl in listed[path]} for path in options}

    def pack(found: Mapping[str, Mapping[Option, float]]) -> bytes:
        listed = {path: [[*option, kl] for option, kl in of.items()] for path, of in found.items()}
        return json.dumps(listed).encode()

    def compute() -> dict[str, dict[Option, float]]:
        model = load_model(opened.path, lazy=True, dequantize=True)
        return predict_divergence(model, tokens, options, seed=seed, progress=progress)

    return kept(f"sensitivity/{name}.json", compute, pack=pack, unpack=unpack)


def _options(layer: LayerPlan, recipe: Recipe) -> list[Option]:
    """Return what may be chosen for a layer: what the recipe fixes for it is not."""
    own = recipe.layers.get(layer.path, {})
    bits = own.get("bits")
    if layer.kind in ("embedding", "lm_head"):
        bits = bits or recipe.embedding_bits
    size = own.get("group_size")
    found = [
        option
        for option in OPTIONS
        if layer.shape[-1] % option[1] == 0
        and (bits is None or option[0] == bits)
        and (size is None or option[1] == size)
    ]
    return found or [(layer.bits, layer.group_size)]


def _stored_bits(
    checkpoint: Checkpoint, plan: Plan, path: str, options: Sequence[Option]
) -> dict[Option, float]:
    """Return the stored size of a layer at each option, bits."""
    dtype = source_array(checkpoint, plan.dtype, f"{path}.weight").dtype
    layer = plan.layers[path]
    return {
        (bits, size): 8.0 * replace(layer, bits=bits, group_size=size).stored_bytes(dtype)
        for bits, size in options
    }
