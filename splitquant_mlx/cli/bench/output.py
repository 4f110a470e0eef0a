"""Look up the shapes that benchmarks take."""

from typing import TYPE_CHECKING

from splitquant_mlx.errors import RecipeError

if TYPE_CHECKING:
    from splitquant_mlx.bench.random_checkpoint import Shape


def named_shape(shape: str) -> "Shape":
    """Return a well-known shape. Raises RecipeError for a name that is none."""
    from splitquant_mlx.bench.random_checkpoint import SHAPES

    if shape not in SHAPES:
        raise RecipeError(f"shape: wanted one of {', '.join(SHAPES)}, got {shape!r}")
    return SHAPES[shape]
