"""Estimate what a conversion will come to, before it: size, bits/weight, memory and time.

Sizes follow from the plan, memory from what the stages hold, time from parts that are computed.
"""

from dataclasses import dataclass
from pathlib import Path

from splitquant_mlx.conversion.budget import find_budget, measure_sizes
from splitquant_mlx.conversion.converter import source_array
from splitquant_mlx.conversion.plan import LayerPlan, make_plan
from splitquant_mlx.inspection.conversion_memory import converting_bytes
from splitquant_mlx.inspection.conversion_time import conversion_seconds
from splitquant_mlx.models.checkpoint import open_checkpoint, parameters
from splitquant_mlx.recipe import Recipe


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """What a conversion is expected to come to.

    Attributes:
        layers: what is planned for each layer.
        parameters: of the model.
        source_bytes: size of the original's tensors.
        stored_bytes: size of the converted model's tensors.
        memory_bytes: peak.
        seconds: time of the whole conversion, s; rough.
        explanation: how the size was computed, one line; empty where the target is the size.
    """

    layers: tuple[LayerPlan, ...]
    parameters: int
    source_bytes: int
    stored_bytes: float
    memory_bytes: float
    seconds: float
    explanation: str = ""

    @property
    def bits_per_weight(self) -> float:
        """Return stored bits over original entries, of the whole model."""
        return 8 * self.stored_bytes / self.parameters


def estimate(directory: Path, recipe: Recipe) -> Estimate:
    """Estimate the conversion of a model directory by a recipe; small parts of it are computed.

    Raises:
        SplitQuantError: as the conversion would.
    """
    checkpoint = open_checkpoint(directory)
    sizes = {name: array.size for name, array in parameters(checkpoint.model).items()}
    planned = recipe.without_target() if recipe.method == "auto" else recipe
    plan = make_plan(planned, checkpoint.model, checkpoint.config)
    arrays = {name: source_array(checkpoint, plan.dtype, name) for name in checkpoint.weights}
    stored = float(plan.stored_bytes(arrays))
    explanation = ""
    if recipe.method == "auto":
        choice = measure_sizes(recipe, checkpoint)
        budget = find_budget(recipe, choice, checkpoint)
        explanation = budget.explanation
        if budget.total_bytes is not None:
            stored = min(budget.total_bytes, choice.most_bytes)
    total = sum(sizes.values())
    return Estimate(
        layers=tuple(plan.layers.values()),
        parameters=total,
        source_bytes=checkpoint.source_bytes,
        stored_bytes=stored,
        memory_bytes=converting_bytes(sizes, recipe),
        seconds=conversion_seconds(directory, list(plan.layers.values()), arrays, recipe),
        explanation=explanation,
    )
