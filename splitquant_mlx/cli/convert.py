"""Offer `convert`."""

from pathlib import Path
from typing import Annotated, Any

import typer

from splitquant_mlx.cli.options import DEFAULT_MODEL, Device, Revision, start
from splitquant_mlx.errors import RecipeError
from splitquant_mlx.recipe import Recipe, load_recipe, write_recipe


def convert(
    model: Annotated[
        str,
        typer.Option("--model", "--hf-path", help="Repo id, directory or .gguf file to convert."),
    ],
    mlx_path: Annotated[Path, typer.Option(help="Directory to write.")] = Path(DEFAULT_MODEL),
    recipe: Annotated[
        Path | None, typer.Option(help="TOML file of settings; options given here win.")
    ] = None,
    method: Annotated[
        str | None, typer.Option(help="splitquant (default), rtn, imatrix, gptq or auto.")
    ] = None,
    bits: Annotated[
        int | None, typer.Option("--bits", "--q-bits", help="2, 3, 4 (default), 5, 6 or 8.")
    ] = None,
    group_size: Annotated[
        int | None,
        typer.Option("--group-size", "--q-group-size", help="32, 64 (default) or 128."),
    ] = None,
    granularity: Annotated[
        str | None, typer.Option(help="One scale a group (default), channel or tensor.")
    ] = None,
    q_mode: Annotated[
        str | None, typer.Option(help="affine (default); for rtn also mxfp4, nvfp4, mxfp8.")
    ] = None,
    clusters: Annotated[
        int | None, typer.Option(help="Parts a layer is split into, 2 to 8 (default 3).")
    ] = None,
    kmeans: Annotated[
        str | None, typer.Option(help="exact (default) or sklearn, for comparison.")
    ] = None,
    dtype: Annotated[
        str | None, typer.Option(help="float16, bfloat16 or float32 for what stays unquantized.")
    ] = None,
    embeddings: Annotated[
        str | None, typer.Option(help="keep or quantize (default: keep; rtn: quantize).")
    ] = None,
    lm_head: Annotated[
        str | None, typer.Option(help="keep, quantize or split (default: keep; rtn: quantize).")
    ] = None,
    include: Annotated[
        list[str] | None, typer.Option(help="Convert only layers matching this glob; repeatable.")
    ] = None,
    exclude: Annotated[
        list[str] | None, typer.Option(help="Keep layers matching this glob; repeatable.")
    ] = None,
    embedding_bits: Annotated[
        int | None,
        typer.Option(help="Bits of quantized embeddings and lm_head (imatrix, gptq: 6)."),
    ] = None,
    target_bpw: Annotated[
        float | None, typer.Option(help="auto: bits/weight of what is quantized (default 4.5).")
    ] = None,
    max_kl: Annotated[
        float | None, typer.Option(help="auto: nats a token to stay below, instead of a target.")
    ] = None,
    sweeps: Annotated[
        int | None, typer.Option(help="gptq, auto: rounds of coordinate descent (default 3).")
    ] = None,
    refine: Annotated[
        bool | None,
        typer.Option(
            "--refine",
            help="Then train scales and biases to predict what the original does; not for "
            "splitquant.",
        ),
    ] = None,
    calibration: Annotated[
        str | None,
        typer.Option(
            help="self (imatrix, gptq, auto: default) or a text, JSONL or parquet file; with "
            "splitquant, fits the parts' scales, which the paper does not do."
        ),
    ] = None,
    num_samples: Annotated[
        int | None,
        typer.Option(help="Texts to calibrate on (default 256); --refine has four times as many."),
    ] = None,
    sequence_length: Annotated[
        int | None, typer.Option(help="Tokens of each of them (default 128).")
    ] = None,
    seed: Annotated[
        int | None, typer.Option(help="Seed of the text that the model writes (default 0).")
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
) -> None:
    """Quantize a model: by default k-means splits every linear layer, then plain INT4."""
    settings = {
        "method": method,
        "bits": bits,
        "group_size": group_size,
        "granularity": granularity,
        "mode": q_mode,
        "clusters": clusters,
        "kmeans": kmeans,
        "dtype": dtype,
        "embeddings": embeddings,
        "lm_head": lm_head,
        "include": tuple(include or ()) or None,
        "exclude": tuple(exclude or ()) or None,
        "embedding_bits": embedding_bits,
        "target_bpw": target_bpw,
        "max_kl": max_kl,
        "sweeps": sweeps,
        "refine": refine,
    }
    calibrate_on = {
        "text": calibration,
        "num_samples": num_samples,
        "sequence_length": sequence_length,
        "seed": seed,
    }
    base = load_recipe(recipe).to_dict() if recipe else {}
    if given := _given(calibrate_on):
        settings["calibration"] = {**base.get("calibration", {}), **given}
    chosen = Recipe.from_dict({**base, **_given(settings)})
    if plan is not None and chosen.method != "auto":
        raise RecipeError(f"--plan is for method 'auto', got {chosen.method!r}")
    if upload_repo is not None:
        from splitquant_mlx.publish.hub import check_login

        check_login(upload_repo)
    start(device)
    from splitquant_mlx.cli.console import Bars
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


def _given(settings: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in settings.items() if value is not None}
