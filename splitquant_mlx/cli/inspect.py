"""Offer `inspect`."""

from pathlib import Path
from typing import Annotated, Any

import typer

from splitquant_mlx.cli.options import (
    DEFAULT_MODEL,
    Device,
    Model,
    Revision,
    check_model,
    start,
)
from splitquant_mlx.errors import RecipeError


def inspect(
    model: Model = DEFAULT_MODEL,
    layer: Annotated[
        str | None, typer.Option(help="Show the histogram of this layer's weights instead.")
    ] = None,
    png: Annotated[
        Path | None, typer.Option(help="Write that histogram as a PNG file too.")
    ] = None,
    clusters: Annotated[
        int, typer.Option(help="Parts to cluster an unconverted model's layers into.")
    ] = 3,
    revision: Revision = None,
    device: Device = None,
) -> None:
    """Show a model's layers, cut points, bytes and bits/weight, or one layer's histogram."""
    if png is not None and layer is None:
        raise RecipeError("--png shows one layer: say which with --layer")
    check_model(model)
    start(device)
    from splitquant_mlx.cli.progress import Bars
    from splitquant_mlx.inspection.layers import inspect_model, layer_histogram
    from splitquant_mlx.inspection.plots import save_histogram, text_histogram
    from splitquant_mlx.models.directory import as_directory
    from splitquant_mlx.models.source import resolve

    with as_directory(resolve(model, revision=revision), Bars()) as directory:
        if layer is None:
            _print_layers(inspect_model(directory, clusters=clusters, progress=Bars()))
            return
        histogram = layer_histogram(directory, layer, clusters=clusters)
        print(f"{layer}\n{text_histogram(histogram)}")
        if png is not None:
            save_histogram(histogram, png)
            print(f"Saved {png}")


def _print_layers(inspection: Any) -> None:
    from rich.console import Console
    from rich.table import Table

    from splitquant_mlx.cli.console import size

    table = Table(box=None, padding=(0, 2, 0, 0))
    table.add_column("layer", no_wrap=True)
    table.add_column("shape", no_wrap=True)
    table.add_column("form", no_wrap=True)
    for name in ("bits/weight", "size", "SNR dB"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("cut points", no_wrap=True)
    for record in inspection.layers:
        form = record.action
        if record.bits is not None:
            form = f"{form} {record.clusters or 1} x {record.bits} bits g{record.group_size}"
        table.add_row(
            record.path,
            " x ".join(str(n) for n in record.shape),
            form,
            f"{record.bits_per_weight:.2f}",
            size(record.nbytes),
            "" if record.snr_db is None else f"{record.snr_db:.1f}",
            ", ".join(f"{cut:.4g}" for cut in record.cut_points),
        )
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = 200
    console.print(table)
    if manifest := inspection.manifest:
        console.print(
            f"linear layers {manifest.linear_bits_per_weight:.2f} bits/weight, whole model "
            f"{manifest.bits_per_weight:.2f} bits/weight, {size(manifest.stored_bytes)} "
            f"(original {size(manifest.source_bytes)})"
        )
