"""The command `demo`."""

from typing import Annotated, Any

import typer

from splitquant_mlx.cli.console import new_table, next_step, plain, show, size, write_json
from splitquant_mlx.cli.options import Device, JsonFile, ModelOption, named_model, start

BAR_WIDTH = 16


def demo(
    model: Annotated[
        str | None,
        typer.Argument(
            metavar="[MODEL]",
            help="Chat model to use instead of SmolLM2-135M-Instruct (135 M parameters).",
        ),
    ] = None,
    model_option: ModelOption = None,
    json_file: JsonFile = None,
    device: Device = None,
) -> None:
    """Download a small chat model, convert it plain, calibrated and split, and compare them."""
    name = named_model(model, model_option)
    start(device)
    from splitquant_mlx.cli.progress import Bars
    from splitquant_mlx.demo.model import fetch_demo_model
    from splitquant_mlx.demo.run import QUESTION, RECOMMENDED, run_demo, save_results
    from splitquant_mlx.models.source import resolve
    from splitquant_mlx.runtime.cache import cache_directory

    source = resolve(name) if name else fetch_demo_model(Bars())
    home = cache_directory() / "demo"
    results = run_demo(source, home, Bars())
    if write_json(json_file, save_results(results, source.name, home)):
        return
    show(_table(source.name, results))
    if source.path.suffix == ".gguf":
        show("These weights come from a 4-bit file, so all methods look slightly better.")
    show(
        "bits/weight: linear layers only. KL divergence (lower is better) and top-1 agreement: "
        "with the original, on a short text.",
        "",
        QUESTION,
        *(f"  {result.method}: {plain(result.answer)}" for result in results),
        "",
    )
    chosen = next(result.path for result in results if result.method == RECOMMENDED)
    next_step(f"Saved the {RECOMMENDED} model.", "chat", chosen)


def _table(title: str, results: Any) -> Any:
    table = new_table(plain(title), "bits/weight", "size", "time", "top-1", "KL, nats", "")
    table.columns[-1].justify = "left"
    worst = max(result.divergence.kl_mean for result in results if result.divergence)
    for result in results:
        divergence = result.divergence
        table.add_row(
            result.method,
            f"{result.bits_per_weight:.1f}",
            size(result.nbytes),
            f"{result.seconds:.0f} s" if result.seconds else "",
            f"{divergence.top1_agreement:.0%}" if divergence else "",
            f"{divergence.kl_mean:.3f}" if divergence else "",
            "█" * max(1, round(BAR_WIDTH * divergence.kl_mean / worst)) if divergence else "",
        )
    return table
