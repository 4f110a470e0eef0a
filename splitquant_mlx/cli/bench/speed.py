"""The command `bench speed`, and the command of a single trial that it runs."""

import json
from typing import Annotated, Any

import typer

from splitquant_mlx.bench.workload import Workload
from splitquant_mlx.cli.console import new_table, plain, show, size, write_json
from splitquant_mlx.cli.options import (
    Device,
    JsonFile,
    ModelArgument,
    ModelOption,
    choose_model,
    start,
)
from splitquant_mlx.cli.settings import Given, settings_options

workload_options = settings_options(
    Workload,
    "workload",
    flags={
        "prompt_tokens": ("--prompt-tokens", "-p"),
        "generation_tokens": ("--generation-tokens", "-g"),
        "batch_size": ("--batch-size", "-b"),
    },
    with_defaults=True,
)


@workload_options
def speed(
    model: ModelArgument = None,
    model_option: ModelOption = None,
    against: Annotated[
        list[str] | None, typer.Option(help="Another model, run alternately; repeatable.")
    ] = None,
    *,
    workload: Given,
    trials: Annotated[
        int, typer.Option("--trials", "-n", min=1, help="Measured rounds, after a warm-up.")
    ] = 5,
    device: Device = None,
    json_file: JsonFile = None,
) -> None:
    """Measure speed, startup time and memory of models; `bench MODEL` is short for it.

    Prefill and decoding are measured as in mlx_lm.benchmark, every trial in a new process.
    """
    chosen = Workload(**workload)
    model = choose_model(model, model_option)
    start(device)
    from splitquant_mlx.bench.speed import bench_speed
    from splitquant_mlx.cli.progress import Bars

    models = [model, *(against or ())]
    result = bench_speed(models, chosen, trials=trials, device=device, progress=Bars())
    if not write_json(json_file, result):
        _print(result)


@workload_options
def trial(model: Annotated[str, typer.Option()], device: Device = None, *, workload: Given) -> None:
    """Run one trial in this process and print its result as JSON, for `bench speed`."""
    start(device)
    from splitquant_mlx.bench.speed import run_trial

    print(json.dumps(run_trial(model, Workload(**workload))))


def _print(result: dict[str, Any]) -> None:
    def seconds(values: dict[str, float]) -> str:
        return f"{values['median']:.2f} s ({values['min']:.2f} to {values['max']:.2f})"

    def rate(values: dict[str, float]) -> str:
        return f"{values['median']:.1f} ({values['min']:.1f} to {values['max']:.1f})"

    rows = {
        "prefill, tokens/s": ("prompt_tps", rate),
        "decode, tokens/s": ("generation_tps", rate),
        "load": ("load_s", seconds),
        "start to first token": ("first_token_s", seconds),
        "peak memory": ("peak_bytes", lambda values: size(values["median"])),
    }
    models = [plain(model["model"]) for model in result["models"]]
    table = new_table(f"median (min to max) of {result['settings']['trials']}", *models)
    for name, (key, form) in rows.items():
        table.add_row(name, *(form(model[key]) for model in result["models"]))
    show(table)
    show(f"Memory: {result['peak_memory']}; computed on the {result['device'].upper()}.")
    for other in result["ratios"]:
        show(plain(f"{other['model']}: {_compared(other)} {other['against']}"))


def _compared(ratios: dict[str, Any]) -> str:
    """Return the speed and memory of a model relative to the one it alternated with."""
    parts = [
        f"{name} {1 / ratios[key]['median']:.2f} x as fast "
        f"({1 / ratios[key]['max']:.2f} to {1 / ratios[key]['min']:.2f})"
        for name, key in (("prefill", "prefill_time"), ("decode", "decode_time"))
    ]
    return f"{', '.join(parts)}, {ratios['peak_bytes']['median']:.2f} x the peak memory of"
