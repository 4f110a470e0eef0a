"""Offer `bench --model`, and the process of a single trial that it starts."""

import json
from typing import Annotated, Any

import typer

from splitquant_mlx.cli.bench.output import JsonFile, check_json, new_table, save_json
from splitquant_mlx.cli.options import Device, start
from splitquant_mlx.errors import RecipeError

PromptTokens = Annotated[
    int, typer.Option("--prompt-tokens", "-p", help="Length of the random prompt.")
]
GenerationTokens = Annotated[
    int, typer.Option("--generation-tokens", "-g", help="Length of the answer.")
]
BatchSize = Annotated[int, typer.Option("--batch-size", "-b", help="Prompts answered together.")]


def speed(
    context: typer.Context,
    model: Annotated[
        str | None, typer.Option(help="Directory, .gguf file or repo id to measure.")
    ] = None,
    against: Annotated[
        list[str] | None, typer.Option(help="Another model, run in turns; repeatable.")
    ] = None,
    prompt_tokens: PromptTokens = 512,
    generation_tokens: GenerationTokens = 128,
    batch_size: BatchSize = 1,
    trials: Annotated[
        int, typer.Option("--trials", "-n", help="Counted rounds, after one that is not.")
    ] = 5,
    device: Device = None,
    json_file: JsonFile = None,
) -> None:
    """Measure speed, start and memory of models, or, with a command, something else.

    Prefill and decoding are measured as in mlx_lm.benchmark, every trial in a fresh process.
    """
    if context.invoked_subcommand is not None:
        return
    if model is None:
        raise RecipeError("bench: say which model with --model, or give a command (bench --help)")
    check_json(json_file)
    start(device)
    from splitquant_mlx.bench.speed import Workload, bench_speed
    from splitquant_mlx.cli.console import Bars

    workload = Workload(
        prompt_tokens=prompt_tokens, generation_tokens=generation_tokens, batch_size=batch_size
    )
    found = bench_speed(
        [model, *(against or ())], workload, trials=trials, device=device, progress=Bars()
    )
    save_json(json_file, found)
    _show(found)


def trial(
    model: Annotated[str, typer.Option()],
    prompt_tokens: PromptTokens,
    generation_tokens: GenerationTokens,
    batch_size: BatchSize,
    device: Device = None,
) -> None:
    """Run one trial in this process; `bench --model` reads the JSON it prints."""
    start(device)
    from splitquant_mlx.bench.speed import Workload, run_trial

    workload = Workload(
        prompt_tokens=prompt_tokens, generation_tokens=generation_tokens, batch_size=batch_size
    )
    print(json.dumps(run_trial(model, workload)))


def _show(found: dict[str, Any]) -> None:
    from rich.console import Console

    from splitquant_mlx.cli.console import plain, size

    def seconds(values: dict[str, float]) -> str:
        return f"{values['median']:.2f} s ({values['min']:.2f} to {values['max']:.2f})"

    def rate(values: dict[str, float]) -> str:
        return f"{values['median']:.1f} ({values['min']:.1f} to {values['max']:.1f})"

    rows = {
        "prefill, tokens/s": ("prompt_tps", rate, "prefill_time"),
        "decode, tokens/s": ("generation_tps", rate, "decode_time"),
        "load": ("load_s", seconds, "load_s"),
        "start to first token": ("first_token_s", seconds, "first_token_s"),
        "peak memory": ("peak_bytes", lambda values: size(values["median"]), "peak_bytes"),
    }
    models = [plain(model["model"]) for model in found["models"]]
    table = new_table(f"median (least to most) of {found['settings']['trials']}", *models)
    for name, (key, show, _) in rows.items():
        table.add_row(name, *(show(model[key]) for model in found["models"]))
    console = Console(highlight=False)
    console.print(table)
    console.print(f"Memory: {found['peak_memory']}; {found['device']}.")
    for other in found["ratios"]:
        parts = (
            f"{name.partition(',')[0]} {other[key]['median']:.2f} x "
            f"({other[key]['min']:.2f} to {other[key]['max']:.2f})"
            for name, (_, _, key) in rows.items()
        )
        text = f"{other['model']} takes, over {other['against']}: {', '.join(parts)}"
        console.print(plain(text), markup=False)
