"""Estimate size, bits/weight, peak memory and time of a conversion.

Sizes follow from the plan, memory from the tensors of each stage, time from timing small parts.
"""

from dataclasses import dataclass
from pathlib import Path

from splitquant_mlx.conversion.budget import find_budget, measure_sizes
from splitquant_mlx.conversion.converter import source_array
from splitquant_mlx.conversion.plan import LayerPlan, make_plan
from splitquant_mlx.inspection.conversion_memory import converting_bytes
from splitquant_mlx.inspection.conversion_time import conversion_seconds
from splitquant_mlx.models.architecture import parameters, widest_input
from splitquant_mlx.models.checkpoint import open_checkpoint
from splitquant_mlx.recipe import Recipe


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """Estimate of a conversion.

    Attributes:
        layers: plan of each layer.
        parameters: number of parameters of the original.
        source_bytes: size of the original's tensors.
        stored_bytes: size of the converted model's tensors.
        memory_bytes: peak memory.
        seconds: rough time of the whole conversion, s.
        explanation: how a target size was computed, in one line, or "".
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
        """Return stored bits / parameters of the original, of the whole model."""
        return 8 * self.stored_bytes / self.parameters


def estimate(directory: Path, recipe: Recipe) -> Estimate:
    """Estimate the conversion of a model directory by running small parts of it.

    Raises:
        SplitQuantError: the error that the conversion would raise.
    """
    checkpoint = open_checkpoint(directory)
    recipe = recipe.for_model(widest_input(checkpoint.model))
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
    layers = tuple(plan.layers.values())
    return Estimate(
        layers=layers,
        parameters=sum(sizes.values()),
        source_bytes=checkpoint.source_bytes,
        stored_bytes=stored,
        memory_bytes=converting_bytes(sizes, recipe),
        seconds=conversion_seconds(directory, layers, arrays, recipe),
        explanation=explanation,
    )
