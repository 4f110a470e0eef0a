"""Offer `demo`."""

import shlex
from typing import Annotated

import typer

from splitquant_mlx.cli.options import Device, start

BAR_WIDTH = 16


def demo(
    model: Annotated[
        str | None,
        typer.Option(
            help="Chat model to take instead of SmolLM2-135M-Instruct (135 M parameters)."
        ),
    ] = None,
    device: Device = None,
) -> None:
    """Fetch a small real chat model, convert it plain, calibrated and split, and compare them."""
    start(device)
    from rich.console import Console
    from rich.table import Table

    from splitquant_mlx.cli.console import plain
    from splitquant_mlx.cli.progress import Bars
    from splitquant_mlx.demo.model import fetch_demo_model
    from splitquant_mlx.demo.run import QUESTION, RECOMMENDED, run_demo, save_results
    from splitquant_mlx.models.source import resolve
    from splitquant_mlx.runtime.cache import cache_directory

    source = resolve(model) if model else fetch_demo_model(Bars())
    home = cache_directory() / "demo"
    results = run_demo(source, home, Bars())
    save_results(results, source.name, home)
    console = Console(highlight=False)
    table = Table(box=None, padding=(0, 2, 0, 0), title=plain(source.name), title_justify="left")
    table.add_column("method", no_wrap=True)
    for name in ("bits/weight", "size", "took", "top-1", "KL, nats"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("", no_wrap=True, overflow="crop")
    worst = max(result.divergence.kl_mean for result in results if result.divergence)
    for result in results:
        distance = result.divergence
        table.add_row(
            result.method,
            f"{result.bits_per_weight:.1f}",
            f"{result.nbytes / 1e6:.1f} MB",
            f"{result.seconds:.0f} s" if result.seconds else "",
            f"{distance.top1_agreement:.0%}" if distance else "",
            f"{distance.kl_mean:.3f}" if distance else "",
            "█" * max(1, round(BAR_WIDTH * distance.kl_mean / worst)) if distance else "",
        )
    console.print(table)
    if source.path.suffix == ".gguf":
        console.print("These weights come from a 4-bit file, which flatters all methods a little.")
    console.print(
        "bits/weight: of the linear layers. KL divergence (lower is closer) and top-1 agreement: "
        "with the original, on a short text.\n"
    )
    console.print(f"[bold]{QUESTION}[/]")
    for result in results:
        console.print(f"  {result.method}: {plain(result.answer)}", markup=False)
    chosen = next(result.path for result in results if result.method == RECOMMENDED)
    next_command = f"splitquant-mlx chat --model {shlex.quote(str(chosen))}"
    console.print(f"\nNext: {next_command}", markup=False, soft_wrap=True)
