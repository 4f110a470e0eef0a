"""The command `run`."""

import dataclasses
from pathlib import Path
from typing import Annotated

import typer

from splitquant_mlx.cli import interrupt
from splitquant_mlx.cli.options import Device, JsonFile, start
from splitquant_mlx.cli.report import report
from splitquant_mlx.errors import RecipeError
from splitquant_mlx.evaluation.settings import ARC_TASKS

DATA = (*ARC_TASKS, "text")
# value of --measure -> the setting of [measure] that turns it off
MEASUREMENTS = {"arc": {"arc": ()}, "text": {"text_tokens": 0}, "speed": {"prompt_tokens": 0}}


def run(
    study: Annotated[Path, typer.Argument(help="TOML file of a study, see recipes/.")],
    model: Annotated[str | None, typer.Option(help="Model to use instead of the study's.")] = None,
    output_dir: Annotated[
        Path | None,
        typer.Option(help="Directory of results (default: results/NAME)."),
    ] = None,
    data: Annotated[
        list[str] | None,
        typer.Option(
            help="NAME=FILE: arc_challenge, arc_easy or text; replaces the hub's data; repeatable."
        ),
    ] = None,
    measure: Annotated[
        list[str] | None,
        typer.Option(
            help="Measure only arc, text (KL divergence, perplexity) or speed; repeatable. A later "
            "run adds the rest."
        ),
    ] = None,
    keep_models: Annotated[
        bool, typer.Option("--keep-models", help="Keep the converted models in the directory.")
    ] = False,
    json_file: JsonFile = None,
    device: Device = None,
) -> None:
    """Convert a model with every recipe of a study, measure each, and write the report.

    An interrupted study resumes where it stopped.
    """
    from splitquant_mlx.study.spec import load_study

    interrupt.set_hint()
    chosen = load_study(study)
    if model is not None:
        chosen = dataclasses.replace(chosen, model=model)
    for name in measure or []:
        if name not in MEASUREMENTS:
            raise RecipeError(f"--measure: expected {', '.join(MEASUREMENTS)}, got {name!r:.80}")
    for name, off in MEASUREMENTS.items():
        if measure and name not in measure:
            measures = dataclasses.replace(chosen.measure, **off)
            chosen = dataclasses.replace(chosen, measure=measures)
    files = dict(_data(entry) for entry in data or [])
    start(device)
    from splitquant_mlx.cli.progress import Bars
    from splitquant_mlx.study.runner import run_study

    directory = output_dir or Path("results") / chosen.name
    run_study(chosen, directory, data=files, keep_models=keep_models, progress=Bars())
    report(directory, directory / "report.html", directory / "report.md", json_file)


def _data(entry: str) -> tuple[str, Path]:
    name, _, file = entry.partition("=")
    if name not in DATA or not file:
        raise RecipeError(f"--data: expected NAME=FILE with NAME of {', '.join(DATA)}, got {entry}")
    return name, Path(file)
