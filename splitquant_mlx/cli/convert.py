"""Offer `convert`."""

from pathlib import Path
from typing import Annotated

import typer

from splitquant_mlx.cli import interrupt
from splitquant_mlx.cli.options import DEFAULT_MODEL, Device, Revision, start
from splitquant_mlx.cli.settings import Given, settings_options
from splitquant_mlx.errors import RecipeError
from splitquant_mlx.recipe import Calibration, Recipe, load_recipe, write_recipe


@settings_options(
    Recipe,
    "settings",
    flags={
        "bits": ("--bits", "--q-bits"),
        "group_size": ("--group-size", "--q-group-size"),
        "mode": ("--q-mode",),
        "refine": ("--refine",),
    },
    skip=("layers", "calibration"),
    panel="Quantization",
)
@settings_options(
    Calibration, "calibration", flags={"text": ("--calibration",)}, panel="Calibration"
)
def convert(
    model: Annotated[
        str,
        typer.Option("--model", "--hf-path", help="Repo id, directory or .gguf file to convert."),
    ],
    mlx_path: Annotated[Path, typer.Option(help="Directory to write.")] = Path(DEFAULT_MODEL),
    recipe: Annotated[
        Path | None, typer.Option(help="TOML file of settings; options given here win.")
    ] = None,
    plan: Annotated[
        Path | None,
        typer.Option(help="auto: write what was chosen to this recipe, and convert nothing."),
    ] = None,
    revision: Revision = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace --mlx-path if it is a model directory.")
    ] = False,
    quantize: Annotated[
        bool, typer.Option("-q", "--quantize", hidden=True, help="Always on; as in mlx_lm.")
    ] = True,
    upload_repo: Annotated[
        str | None,
        typer.Option(help="Upload the result to this Hugging Face repo, USER/NAME; see upload."),
    ] = None,
    device: Device = None,
    *,
    settings: Given,
    calibration: Given,
) -> None:
    """Quantize a model: by default k-means splits every linear layer, then plain INT4."""
    interrupt.resumes()
    base = load_recipe(recipe).to_dict() if recipe else {}
    if calibration:
        settings["calibration"] = {**base.get("calibration", {}), **calibration}
    chosen = Recipe.from_dict({**base, **settings})
    if plan is not None and chosen.method != "auto":
        raise RecipeError(f"--plan is for method 'auto', got {chosen.method!r}")
    if upload_repo is not None:
        from splitquant_mlx.publish.hub import check_login

        check_login(upload_repo)
    start(device)
    from splitquant_mlx.cli.progress import Bars
    from splitquant_mlx.cli.summary import print_forecast, print_summary
    from splitquant_mlx.conversion.pipeline import convert as convert_model

    if plan is not None:
        from splitquant_mlx.conversion.bits import forecast

        found = forecast(model, chosen, revision=revision, progress=Bars())
        print_forecast(found)
        write_recipe(found.recipe, plan)
        return
    manifest = convert_model(
        model,
        mlx_path,
        recipe=chosen,
        revision=revision,
        overwrite=overwrite,
        progress=Bars(),
        on_forecast=print_forecast,
    )
    print_summary(manifest, mlx_path)
    if upload_repo is not None:
        from splitquant_mlx.cli.upload import send
        from splitquant_mlx.publish.upload import prepare_upload

        send(prepare_upload(mlx_path, upload_repo))
