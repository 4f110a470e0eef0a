"""Sizes of a model's files for each option of its layers, and the size that a target allows."""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from splitquant_mlx.calibration.layer_divergence import Option
from splitquant_mlx.conversion.converter import source_array
from splitquant_mlx.conversion.plan import LayerPlan, make_plan
from splitquant_mlx.errors import RecipeError
from splitquant_mlx.formats.shard_writer import MAX_SHARD_BYTES, header_room, most_header_bytes
from splitquant_mlx.models.checkpoint import Checkpoint
from splitquant_mlx.models.footprint import PROGRAM_BYTES, context_bytes, context_limit
from splitquant_mlx.recipe import Recipe
from splitquant_mlx.sizes import parse_bytes, size

OPTIONS: tuple[Option, ...] = (
    (2, 64), (2, 32), (3, 128), (3, 64), (3, 32), (4, 128), (4, 64), (4, 32),
    (5, 128), (5, 64), (5, 32), (6, 128), (6, 64), (6, 32), (8, 64), (8, 32),
)  # fmt: skip
# routing changes discontinuously, which sensitivities do not measure; routers are small
ROUTER = re.compile(r"(^|\.)(gate|router)(\.|$)")
ROUTER_BITS = 8
CONTEXT_TOKENS = 8192  # to leave memory for, or the model's limit if it is lower
# macOS reserves a third of a small machine's memory, a quarter of a larger one's, from the GPU
LARGE_BYTES = 36e9
SYSTEM_SHARES = {False: 1 / 3, True: 1 / 4}


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Stored sizes for each option of the layers whose bits are chosen.

    Attributes:
        layers: path -> option -> stored size, bytes.
        rest_bytes: size of everything else: other tensors and file headers.
        entries: number of weights in these layers.
    """

    layers: Mapping[str, Mapping[Option, float]]
    rest_bytes: float
    entries: int

    @property
    def least_bytes(self) -> float:
        """Return the smallest size of all files."""
        return self.rest_bytes + sum(min(layer.values()) for layer in self.layers.values())

    @property
    def most_bytes(self) -> float:
        """Return the largest size of all files."""
        return self.rest_bytes + sum(max(layer.values()) for layer in self.layers.values())

    def of_bits(self, bits_per_weight: float) -> float:
        """Return the size of all files for an average of `bits_per_weight` in the layers."""
        return self.rest_bytes + bits_per_weight * self.entries / 8


@dataclass(frozen=True, kw_only=True)
class Budget:
    """Size that a target allows.

    Attributes:
        total_bytes: of all files; None if the target is not a size.
        explanation: how it was computed, one line; empty if the target is a size.
    """

    total_bytes: float | None
    explanation: str = ""


def measure_sizes(
    recipe: Recipe, checkpoint: Checkpoint, max_shard_bytes: int = MAX_SHARD_BYTES
) -> Sizes:
    """Return the sizes of all options of an "auto" recipe."""
    plan = make_plan(recipe.without_target(), checkpoint.model, checkpoint.config)
    arrays = {name: source_array(checkpoint, plan.dtype, name) for name in checkpoint.weights}
    rest = plan.stored_bytes(arrays)
    layers, entries = {}, 0
    for path, layer in plan.layers.items():
        if layer.action != "quantize" or (layer.kind == "experts" and layer.quantizer != "gptq"):
            continue
        dtype = arrays[f"{path}.weight"].dtype
        rest -= layer.stored_bytes(dtype)
        entries += math.prod(layer.shape)
        layers[path] = {
            option: float(replace(layer, bits=option[0], group_size=option[1]).stored_bytes(dtype))
            for option in _options(layer, recipe)
        }
    largest = rest + sum(max(layer.values()) for layer in layers.values())
    headers = most_header_bytes(plan.tensors(arrays), largest, max_shard_bytes)
    headers += sum(8 + header_room([x.head] * 2) for x in plan.layers.values() if x.head)
    return Sizes(layers=layers, rest_bytes=rest + headers, entries=entries)


def _options(layer: LayerPlan, recipe: Recipe) -> Sequence[Option]:
    """Return the options of a layer, restricted to the settings that the recipe has for it."""
    settings = recipe.layers.get(layer.path, {})
    bits = settings.get("bits")
    if layer.kind in ("embedding", "lm_head"):
        bits = bits or recipe.embedding_bits
    if ROUTER.search(layer.path):
        bits = bits or ROUTER_BITS
    group_size = settings.get("group_size")
    options = [
        option
        for option in OPTIONS
        if layer.shape[-1] % option[1] == 0
        and (bits is None or option[0] == bits)
        and (group_size is None or option[1] == group_size)
    ]
    return options or [(layer.bits, layer.group_size)]


def find_budget(recipe: Recipe, sizes: Sizes, checkpoint: Checkpoint) -> Budget:
    """Return the size that the target of an "auto" recipe allows.

    Raises:
        RecipeError: the smallest possible size exceeds the target.
    """
    if recipe.target_bpw is not None:
        return Budget(total_bytes=sizes.of_bits(recipe.target_bpw))
    smallest = f"with the fewest bits it takes {size(sizes.least_bytes)}"
    if recipe.target_size is not None:
        budget = Budget(total_bytes=parse_bytes(recipe.target_size))
        field, reason = "target_size", f"{recipe.target_size} is too small for this model"
    elif recipe.fits is not None:
        budget = _fitting(recipe, checkpoint)
        field, reason = "fits", f"this model is too large: {budget.explanation}"
    else:
        return Budget(total_bytes=None)
    if (budget.total_bytes or 0) < sizes.least_bytes:
        rest = f", {size(sizes.rest_bytes)} of it not quantized" if sizes.rest_bytes else ""
        advice = "choose a larger size or a smaller model"
        raise RecipeError(f"{reason}: {smallest}{rest}: {advice}", field=field)
    return budget


def _fitting(recipe: Recipe, checkpoint: Checkpoint) -> Budget:
    """Return the memory of a machine that is available for the model's files."""
    memory = parse_bytes(recipe.fits or "")
    system = memory * SYSTEM_SHARES[memory >= LARGE_BYTES] + PROGRAM_BYTES
    tokens = min(context_limit(checkpoint.config) or CONTEXT_TOKENS, CONTEXT_TOKENS)
    context = context_bytes(checkpoint.model, tokens)
    left = memory - system - context
    share = "a quarter" if memory >= LARGE_BYTES else "a third"
    return Budget(
        total_bytes=left,
        explanation=(
            f"{size(memory)} of memory less {size(system)} for the system and the program (macOS "
            f"keeps {share} from the GPU) and {size(context)} for a context of {tokens:,} tokens "
            f"leave {size(max(0, left))} for the model"
        ),
    )
