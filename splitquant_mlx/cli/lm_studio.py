"""Link converted models into the models directory of LM Studio."""

from pathlib import Path

from splitquant_mlx.cli import console
from splitquant_mlx.errors import RecipeError, TargetError
from splitquant_mlx.recipe import Recipe

HOME = Path("~/.lmstudio/models")
OWNER = "splitquant-mlx"  # LM Studio expects USER/NAME


def check(recipe: Recipe) -> None:
    """Raise RecipeError for a method whose result LM Studio does not run."""
    layers = {"splitquant": "split layers", "lut": "lookup tables", "salience": "mixed bits"}
    if recipe.method in layers:
        raise RecipeError(
            f"--lmstudio: LM Studio does not run {layers[recipe.method]}: use --method auto or -q"
        )


def link(model: Path) -> None:
    """Link a model's directory into LM Studio's. Raises TargetError."""
    path = HOME.expanduser() / OWNER / model.name
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_symlink():
            path.unlink()
        path.symlink_to(model.resolve(), target_is_directory=True)
    except OSError as exc:
        raise TargetError(f"--lmstudio: cannot link {path}: {exc.strerror or exc}") from exc
    console.show(f"Linked as {path}: LM Studio lists it as {OWNER}/{model.name}")
