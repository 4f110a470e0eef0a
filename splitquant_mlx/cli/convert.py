"""The command `convert`."""

from pathlib import Path
from typing import Annotated, Any

import typer

from splitquant_mlx import progress
from splitquant_mlx.cli import console, interrupt, lm_studio
from splitquant_mlx.cli.options import (
    LAYERS,
    PUBLISHING,
    Device,
    JsonFile,
    Original,
    Revision,
    named_original,
    start,
)
from splitquant_mlx.cli.settings import Given, settings_options
from splitquant_mlx.errors import RecipeError
from splitquant_mlx.recipe import SELF, TARGETS, Calibration, Recipe, load_recipe

OriginalOption = Annotated[
    str | None,
    typer.Option("--model", "--hf-path", metavar="MODEL", help="The same, as an option."),
]
Target = Annotated[
    Path | None, typer.Option(help="Directory to write; by default named after model and method.")
]
RecipeFile = Annotated[
    Path | None,
    typer.Option(metavar="FILE", help="TOML file of settings; options take precedence."),
]
Plain = Annotated[
    bool,
    typer.Option(
        "-q", "--quantize", help="mlx_lm's plain 4-bit (method rtn), if no --method is given."
    ),
]
DryRun = Annotated[
    bool,
    typer.Option("--dry-run", help="Show size, bits/weight, memory and time; convert nothing."),
]
PlanFile = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE", help="auto: write the chosen settings to this recipe, convert nothing."
    ),
]
Overwrite = Annotated[
    bool, typer.Option("--overwrite", help="Replace --mlx-path if it is a model directory.")
]
LmStudio = Annotated[
    bool,
    typer.Option(
        "--lmstudio",
        help=f"Link the result into {lm_studio.HOME}, where LM Studio finds it.",
        rich_help_panel=PUBLISHING,
    ),
]
UploadRepo = Annotated[
    str | None,
    typer.Option(
        help="Upload the result to this Hugging Face repo, USER/NAME; see upload.",
        rich_help_panel=PUBLISHING,
    ),
]


@settings_options(
    Recipe,
    "settings",
    flags={
        "bits": ("--bits", "--q-bits"),
        "group_size": ("--group-size", "--q-group-size"),
        "mode": ("--q-mode",),
    },
    skip=("layers", "calibration"),
    panel="Quantization",
    panels=dict.fromkeys(
        ("include", "exclude", "embeddings", "lm_head", "embedding_bits", "dtype"), LAYERS
    ),
)
@settings_options(
    Calibration, "calibration", flags={"text": ("--calibration",)}, panel="Calibration"
)
def convert(
    model: Original = None,
    model_option: OriginalOption = None,
    mlx_path: Target = None,
    recipe: RecipeFile = None,
    quantize: Plain = False,
    dry_run: DryRun = False,
    plan: PlanFile = None,
    overwrite: Overwrite = False,
    json_file: JsonFile = None,
    revision: Revision = None,
    device: Device = None,
    lmstudio: LmStudio = False,
    upload_repo: UploadRepo = None,
    *,
    settings: Given,
    calibration: Given,
) -> None:
    """Quantize a model. The default is the paper's method, which splits every linear layer.

    For the most accurate model of a given size use `--method auto`; for mlx_lm's plain 4-bit, `-q`.
    """
    name = named_original(model, model_option)
    chosen = _recipe(recipe, settings, calibration, plain=quantize, planned=plan is not None)
    if upload_repo is not None:
        from splitquant_mlx.publish.hub import check_login

        check_login(upload_repo)
    start(device)
    from splitquant_mlx.conversion.staging import check_target
    from splitquant_mlx.models.source import resolve

    target = mlx_path or Path(default_name(name, chosen))
    if lmstudio:
        lm_studio.check(chosen)
    if plan is None and not dry_run:
        check_target(target, overwrite=overwrite)
    source = resolve(name, revision=revision)
    if dry_run:
        return _dry_run(source, chosen, target, json_file)
    _check_memory(source, chosen)
    interrupt.set_hint()
    if plan is not None:
        return _write_plan(source, chosen, plan, json_file)
    _convert(source, chosen, target, overwrite, json_file)
    if lmstudio:
        lm_studio.link(target)
    if upload_repo is not None:
        from splitquant_mlx.cli.upload import send
        from splitquant_mlx.publish.upload import prepare_upload

        send(prepare_upload(target, upload_repo))


def _bars(source: Any, recipe: Recipe) -> Any:
    from splitquant_mlx.cli.progress import Bars

    return Bars(stages(recipe, gguf=source.path.is_file()))


def _dry_run(source: Any, recipe: Recipe, target: Path, json_file: str | None) -> None:
    from splitquant_mlx.cli.summary import print_estimate
    from splitquant_mlx.inspection.estimate import estimate
    from splitquant_mlx.models.directory import as_directory

    with as_directory(source, _bars(source, recipe)) as directory:
        console.note("Timing small parts of the conversion ...")
        result = estimate(directory, recipe)
    if not console.write_json(json_file, _estimate_values(result)):
        print_estimate(result, recipe, target)


def _write_plan(source: Any, recipe: Recipe, plan: Path, json_file: str | None) -> None:
    from splitquant_mlx.cli.summary import print_forecast
    from splitquant_mlx.conversion.bits import forecast
    from splitquant_mlx.runtime.disk import as_target_error

    bars = _bars(source, recipe)
    planned = forecast(source.name, recipe, revision=source.revision, progress=bars)
    with as_target_error(plan):
        plan.write_text(planned.recipe.to_toml(), encoding="utf-8")
    if not console.write_json(json_file, planned.recipe.to_dict()):
        print_forecast(planned)
        console.next_step(f"Saved {plan}.", "convert", source.name, "--recipe", plan)


def _convert(
    source: Any, recipe: Recipe, target: Path, overwrite: bool, json_file: str | None
) -> None:
    from splitquant_mlx.cli.summary import print_forecast, print_summary
    from splitquant_mlx.conversion.pipeline import convert as convert_model

    manifest = convert_model(
        source,
        target,
        recipe=recipe,
        overwrite=overwrite,
        progress=_bars(source, recipe),
        on_forecast=None if console.is_quiet() or json_file == "-" else print_forecast,
    )
    values = _manifest_values(manifest, target)
    if not console.write_json(json_file, values) and not console.is_quiet():
        print_summary(manifest, target)


def _recipe(
    file: Path | None, settings: Given, calibration: Given, *, plain: bool, planned: bool
) -> Recipe:
    """Return the recipe of a file and the options; a target implies auto."""
    base = load_recipe(file).to_dict() if file else {}
    if any(name in settings for name in TARGETS):  # replaces a target of the file
        base = {name: value for name, value in base.items() if name not in TARGETS}
    if calibration:
        settings["calibration"] = {**base.get("calibration", {}), **calibration}
    if "method" not in settings and "method" not in base:
        if planned or any(name in settings for name in TARGETS):
            settings["method"] = "auto"
        elif plain:
            settings["method"] = "rtn"
    method = settings.get("method", base.get("method", "splitquant"))
    unused = {} if method == "splitquant" else {"clusters": "", "kmeans": ""}
    if method == "auto":
        unused |= dict.fromkeys(("bits", "group_size"), ": use target_bpw")
    for name, advice in unused.items():
        if name in settings:
            raise RecipeError(f"not for method {method!r}{advice}", field=name)
    chosen = Recipe.from_dict({**base, **settings})
    if planned and chosen.method != "auto":
        raise RecipeError(f"--plan is for method 'auto', got {chosen.method!r}")
    return chosen


def default_name(model: str, recipe: Recipe) -> str:
    """Return the default name of the target directory, from model and method."""
    stem = Path(model).expanduser().resolve().name.removesuffix(".gguf")
    kind = "split" if recipe.method == "splitquant" else recipe.method
    if recipe.method == "auto":
        size = f"kl{recipe.max_kl:g}" if recipe.max_kl else f"{recipe.target_bpw or 0:g}bpw"
        if target := recipe.target_size or recipe.fits:
            size = ("fits" if recipe.fits else "") + "".join(target.split())
    else:
        size = f"{recipe.bits}bit" if recipe.mode == "affine" else recipe.mode
    return "-".join([stem or "model", kind, size, *(["refined"] if recipe.refine else [])])


def stages(recipe: Recipe, *, gguf: bool = False) -> list[str]:
    """Return the labels of the progress tasks of a conversion, in order."""
    calibrated = recipe.calibration is not None or bool(recipe.refine)
    labels = {
        progress.UNPACKING: gguf,
        progress.CHECKING: calibrated,
        progress.SAMPLING: calibrated and recipe.texts.text == SELF,
        progress.MEASURING: recipe.method == "auto",
        progress.QUANTIZING: True,
        progress.PREDICTING: bool(recipe.refine),
        progress.REFINING: bool(recipe.refine),
    }
    return [label for label, applies in labels.items() if applies]


def _check_memory(source: Any, recipe: Recipe) -> None:
    """Check that the conversion fits in memory. Raises MemoryTooSmallError."""
    from splitquant_mlx.inspection.conversion_memory import converting_bytes
    from splitquant_mlx.models.footprint import tensor_sizes
    from splitquant_mlx.runtime.memory import check_memory

    sizes = tensor_sizes(source.path)
    if not sizes:
        return
    plain = converting_bytes(sizes, Recipe(method="rtn")) / 1e9
    warning = check_memory(
        converting_bytes(sizes, recipe),
        f"converting {source.name} with method {recipe.method!r}",
        f"methods rtn and splitquant need about {plain:.1f} GB",
    )
    if warning:
        console.note(f"warning: {warning}")


def _estimate_values(estimate: Any) -> dict[str, Any]:
    sizes = ("parameters", "source_bytes", "stored_bytes", "bits_per_weight", "memory_bytes")
    kept = {layer.path: layer.note for layer in estimate.layers if layer.action == "keep"}
    return {**{name: getattr(estimate, name) for name in (*sizes, "seconds")}, "kept": kept}


def _manifest_values(manifest: Any, target: Path) -> dict[str, Any]:
    sizes = ("bits_per_weight", "linear_bits_per_weight", "source_bytes", "stored_bytes")
    names = ("recipe", *sizes, "seconds", "refinement")
    return {"path": str(target), **{name: getattr(manifest, name) for name in names}}
