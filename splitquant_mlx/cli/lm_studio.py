"""Put a converted model where LM Studio looks."""

import os
from pathlib import Path

from splitquant_mlx.cli import console
from splitquant_mlx.errors import RecipeError, TargetError
from splitquant_mlx.recipe import Recipe

HOME = Path("~/.lmstudio/models")
OWNER = "splitquant-mlx"  # LM Studio wants USER/NAME


def check(recipe: Recipe) -> None:
    """Refuse, before the work, a method whose result LM Studio does not run."""
    layers = {"splitquant": "split layers", "lut": "lookup tables", "salience": "mixed bits"}
    if recipe.method in layers:
        raise RecipeError(
            f"--lmstudio: LM Studio does not run {layers[recipe.method]}: take --method auto, or -q"
        )


def link(model: Path) -> None:
    """Link a model's directory into LM Studio's. Raises TargetError."""
    place = HOME.expanduser() / OWNER / model.name
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        if place.is_symlink():
            place.unlink()
        os.symlink(model.resolve(), place, target_is_directory=True)
    except OSError as exc:
        raise TargetError(f"--lmstudio: cannot link {place}: {exc.strerror or exc}") from exc
    console.show(f"Linked as {place}: LM Studio lists it as {OWNER}/{model.name}")
