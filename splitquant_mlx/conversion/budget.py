"""What a model's files take by what is chosen for its layers, and what a target leaves for them."""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from splitquant_mlx.conversion.converter import source_array
from splitquant_mlx.conversion.plan import LayerPlan, Plan, make_plan
from splitquant_mlx.errors import RecipeError
from splitquant_mlx.formats.shard_writer import MAX_SHARD_BYTES, header_room, most_header_bytes
from splitquant_mlx.models.checkpoint import Checkpoint
from splitquant_mlx.models.footprint import PROGRAM_BYTES, context_bytes, context_limit
from splitquant_mlx.recipe import Recipe
from splitquant_mlx.sizes import parse_bytes, size

Option = tuple[int, int]  # bits, group_size
OPTIONS: tuple[Option, ...] = (
    (2, 64), (2, 32), (3, 128), (3, 64), (3, 32), (4, 128), (4, 64), (4, 32),
    (5, 128), (5, 64), (5, 32), (6, 128), (6, 64), (6, 32), (8, 64), (8, 32),
)  # fmt: skip
# which experts a token goes to changes by jumps, which sensitivities do not see; a router is small
ROUTER = re.compile(r"(^|\.)(gate|router)(\.|$)")
ROUTER_BITS = 8
CONTEXT_TOKENS = 8192  # that a machine's memory is to hold, or the model's own limit
# macOS leaves its GPU two thirds of a small machine's memory, of a larger one three quarters
LARGE_BYTES = 36e9
SYSTEM_SHARES = {False: 1 / 3, True: 1 / 4}


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """What a model's files take, by what is chosen for its layers.

    Attributes:
        layers: what may be chosen for each layer, with the stored size, bytes, by path.
        rest_bytes: size of everything else: other tensors, and the files' headers.
        entries: of the weights of those layers.
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
        """Return the size of all files where the layers take so many bits/weight on average."""
        return self.rest_bytes + bits_per_weight * self.entries / 8


@dataclass(frozen=True, kw_only=True)
class Budget:
    """What a target allows.

    Attributes:
        total_bytes: for all files; None where the target is no size.
        explanation: how it was computed, one line; empty where the target says it itself.
    """

    total_bytes: float | None
    explanation: str = ""


def measure_sizes(
    recipe: Recipe, checkpoint: Checkpoint, max_shard_bytes: int = MAX_SHARD_BYTES
) -> Sizes:
    """Return the sizes that an "auto" recipe may choose among."""
    plan = make_plan(recipe.without_target(), checkpoint.model, checkpoint.config)
    arrays = {name: source_array(checkpoint, plan.dtype, name) for name in checkpoint.weights}
    whole = plan.stored_bytes(arrays)
    layers, entries = {}, 0
    for path, layer in choosable(plan).items():
        dtype = arrays[f"{path}.weight"].dtype
        whole -= layer.stored_bytes(dtype)
        entries += math.prod(layer.shape)
        layers[path] = {
            option: float(replace(layer, bits=option[0], group_size=option[1]).stored_bytes(dtype))
            for option in options_of(layer, recipe)
        }
    largest = whole + sum(max(layer.values()) for layer in layers.values())
    headers = most_header_bytes(plan.tensors(arrays), largest, max_shard_bytes)
    headers += sum(8 + header_room([x.head] * 2) for x in plan.layers.values() if x.head)
    return Sizes(layers=layers, rest_bytes=whole + headers, entries=entries)


def choosable(plan: Plan) -> dict[str, LayerPlan]:
    """Return the layers that bits are chosen for, by path."""
    return {
        path: layer
        for path, layer in plan.layers.items()
        if layer.action == "quantize" and (layer.kind != "experts" or layer.quantizer == "gptq")
    }


def options_of(layer: LayerPlan, recipe: Recipe) -> Sequence[Option]:
    """Return what may be chosen for a layer: what the recipe fixes for it is not."""
    own = recipe.layers.get(layer.path, {})
    bits = own.get("bits")
    if layer.kind in ("embedding", "lm_head"):
        bits = bits or recipe.embedding_bits
    if ROUTER.search(layer.path):
        bits = bits or ROUTER_BITS
    width = own.get("group_size")
    found = [
        option
        for option in OPTIONS
        if layer.shape[-1] % option[1] == 0
        and (bits is None or option[0] == bits)
        and (width is None or option[1] == width)
    ]
    return found or [(layer.bits, layer.group_size)]


def find_budget(recipe: Recipe, sizes: Sizes, checkpoint: Checkpoint) -> Budget:
    """Return what the target of an "auto" recipe allows.

    Raises:
        RecipeError: when no choice is small enough, with the figures.
    """
    if recipe.target_bpw is not None:
        return Budget(total_bytes=sizes.of_bits(recipe.target_bpw))
    least = f"at the least bits/weight it takes {size(sizes.least_bytes)}"
    if recipe.target_size is not None:
        budget = Budget(total_bytes=parse_bytes(recipe.target_size))
        reason = f"target_size: {recipe.target_size} is too small for this model"
    elif recipe.fits is not None:
        budget = _fitting(recipe, checkpoint)
        reason = f"fits: this model is too large: {budget.explanation}"
    else:
        return Budget(total_bytes=None)
    if (budget.total_bytes or 0) < sizes.least_bytes:
        rest = f", {size(sizes.rest_bytes)} of it not quantized" if sizes.rest_bytes else ""
        raise RecipeError(f"{reason}: {least}{rest}: choose a larger size or a smaller model")
    return budget


def _fitting(recipe: Recipe, checkpoint: Checkpoint) -> Budget:
    """Return what a machine's memory leaves for the model's files."""
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
