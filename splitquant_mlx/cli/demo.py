"""Offer `demo`."""

import shlex
from typing import Annotated

import typer

from splitquant_mlx.cli.options import Device, start


def demo(
    model: Annotated[
        str | None,
        typer.Option(
            help="Chat model to take instead of SmolLM2-135M-Instruct (135 M parameters)."
        ),
    ] = None,
    device: Device = None,
) -> None:
    """Get a small real chat model, convert it plain and split, and compare the two."""
    start(device)
    from rich.console import Console
    from rich.table import Table

    from splitquant_mlx.cli.console import Bars, plain, size
    from splitquant_mlx.demo.model import fetch_demo_model
    from splitquant_mlx.demo.run import QUESTION, run_demo, save_results
    from splitquant_mlx.models.source import resolve
    from splitquant_mlx.runtime.cache import cache_directory

    source = resolve(model) if model else fetch_demo_model(Bars())
    home = cache_directory() / "demo"
    results = run_demo(source, home, Bars())
    save_results(results, source.name, home)
    console = Console(highlight=False)
    table = Table(box=None, padding=(0, 2, 0, 0), title=plain(source.name), title_justify="left")
    table.add_column("method", no_wrap=True)
    for name in ("bits/weight", "size", "KL, nats", "top-1", "tokens/s", "took"):
        table.add_column(name, justify="right")
    for result in results:
        found = result.divergence
        table.add_row(
            result.method,
            f"{result.bits_per_weight:.2f}",
            size(result.nbytes),
            f"{found.kl_mean:.3f}" if found else "",
            f"{found.top1_agreement:.1%}" if found else "",
            f"{result.tokens_per_s:.1f}",
            f"{result.seconds:.1f} s" if result.seconds else "",
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
    next_command = f"splitquant-mlx chat --model {shlex.quote(str(results[-1].path))}"
    console.print(f"\nNext: {next_command}", markup=False, soft_wrap=True)
