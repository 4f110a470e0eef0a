"""Offer `inspect`."""

import dataclasses
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any

import typer

from splitquant_mlx.cli import console
from splitquant_mlx.cli.console import new_table, pairs, show, size
from splitquant_mlx.cli.options import (
    JsonFile,
    Model,
    start,
)
from splitquant_mlx.cli.settings import dataclass_options
from splitquant_mlx.errors import RecipeError

WEIGHTS = "Weights"


Layers = Annotated[bool, typer.Option("--layers", help="One row per layer, not per kind of layer.")]
OneLayer = Annotated[
    str | None,
    typer.Option(
        metavar="PATH",
        help="Show the histogram of this layer's weights instead.",
        rich_help_panel=WEIGHTS,
    ),
]
Png = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE", help="Write that histogram as a PNG file too.", rich_help_panel=WEIGHTS
    ),
]
CutPoints = Annotated[
    bool,
    typer.Option(
        "--cut-points",
        help="Show where layers are split, or would be: reads all weights of an original.",
        rich_help_panel=WEIGHTS,
    ),
]
Clusters = Annotated[
    int,
    typer.Option(
        min=2,
        max=8,
        help="Parts to cluster an unconverted model's layers into.",
        rich_help_panel=WEIGHTS,
    ),
]


@dataclass_options(Model, "model")
def inspect(
    model: Model,
    layers: Layers = False,
    layer: OneLayer = None,
    png: Png = None,
    cut_points: CutPoints = False,
    clusters: Clusters = 3,
    json_file: JsonFile = None,
) -> None:
    """Show what a model is, and its layers; or one layer's histogram."""
    if png is not None and layer is None:
        raise RecipeError("--png shows one layer: say which with --layer")
    name = model.choose()
    start(model.device)
    from splitquant_mlx.cli.progress import Bars
    from splitquant_mlx.inspection.layers import find_cut_points
    from splitquant_mlx.inspection.overview import describe, describe_gguf
    from splitquant_mlx.models.directory import as_directory
    from splitquant_mlx.models.source import resolve

    source = resolve(name, revision=model.revision)
    if source.path.is_file() and layer is None and not cut_points:
        return _report(name, describe_gguf(source.path), {}, json_file, each=layers)
    with as_directory(source, Bars()) as directory:
        found = describe(directory)
        if layer is not None:
            path = _path(layer, [record.path for record in found.layers])
            _show_histogram(directory, path, clusters if cut_points else None, png)
            return
        cuts = {}
        if cut_points:
            cuts = find_cut_points(directory, clusters=clusters, progress=Bars())
    _report(name, found, cuts, json_file, each=layers)


def _report(
    name: str,
    found: Any,
    cuts: dict[str, tuple[float, ...]],
    json_file: JsonFile,
    *,
    each: bool,
) -> None:
    values = dataclasses.asdict(found) | ({"cut_points": cuts} if cuts else {})
    if console.write_json(json_file, values):
        return
    _print(name, found)
    if cuts:
        _print_cuts(found.layers, cuts)
    else:
        _print_layers(found.layers, each=each)


def _show_histogram(directory: Path, path: str, clusters: int | None, png: Path | None) -> None:
    from splitquant_mlx.inspection.layers import layer_histogram
    from splitquant_mlx.inspection.plots import save_histogram, text_histogram

    histogram = layer_histogram(directory, path, clusters=clusters)
    show(f"{path}\n{text_histogram(histogram)}")
    if png is not None:
        save_histogram(histogram, png)
        show(f"Saved {png}")


def _path(given: str, paths: list[str]) -> str:
    """Return the layer that is meant: its path, or an end of it that no other layer has."""
    if given in paths:
        return given
    ending = [path for path in paths if path.endswith(f".{given}")]
    if len(ending) == 1:
        return ending[0]
    near = ending or get_close_matches(given, paths, n=4, cutoff=0.5) or paths
    raise RecipeError(
        f"--layer: there is no layer {given!r} with a weight matrix, but {', '.join(near[:4])}"
        f"{' and others' if len(near) > 4 else ''}: --layers lists them"
    )


def _print(name: str, found: Any) -> None:
    def count(value: int | None) -> str:
        return "not said" if value is None else f"{value:,} tokens"

    source = f", from {console.plain(found.source)}" if found.source else ""
    show(
        pairs(
            ("Model", console.plain(name)),
            ("Architecture", console.plain(found.architecture)),
            ("Parameters", _millions(found.parameters)),
            ("Context", count(found.context)),
            ("Vocabulary", count(found.vocabulary)),
            ("Chat template", "yes" if found.has_chat_template else "no: it continues text"),
            ("Quantized", f"{found.method or 'no'}{source}"),
            (
                "Size",
                f"{size(found.stored_bytes)}, {found.bits_per_weight:.2f} bits/weight",
            ),
            ("Memory to run", f"about {found.memory_bytes / 1e9:.1f} GB"),
            ("Runs in", found.runs_in),
        ),
        "",
    )


def _print_cuts(layers: Any, cuts: dict[str, tuple[float, ...]]) -> None:
    table = new_table("", "shape", "cut points")
    for layer in layers:
        points = ", ".join(f"{cut:.4g}" for cut in cuts.get(layer.path, ()))
        table.add_row(_name(layer.path), _shape(layer), points)
    show(table)


def _name(path: str) -> str:
    return console.plain(path.removeprefix("model.").removeprefix("layers.*."))


def _shape(layer: Any) -> str:
    return " x ".join(map(str, layer.shape))


def _print_layers(layers: Any, *, each: bool) -> None:
    from splitquant_mlx.inspection.overview import group_layers

    rows = [(layer.path, [layer]) for layer in layers] if each else group_layers(layers)
    with_noise = any(layer.snr_db is not None for layer in layers)
    columns = ["shape", "form", "bits/weight", "size", *(["SNR dB"] if with_noise else [])]
    table = new_table("", *([] if each else ["layers"]), *columns)
    table.padding = (0, 1, 0, 0)
    for path, group in rows:
        first = group[0]
        form = {"keep": "not quantized", "quantize": "", "split": f"{first.clusters} x "}
        text = form[first.action]
        if first.bits is None and first.mode is not None:
            text = first.mode
        elif first.bits is not None:
            text += f"{first.bits} bits "
            text += "on average " if first.mode == "mixed" else ""
            text += "codebooks" if first.mode == "lut" else f"g{first.group_size}"
            text += f", {first.outliers} kept a row" if first.outliers else ""
        snr = [layer.snr_db for layer in group if layer.snr_db is not None]
        row = [
            _name(path),
            *([] if each else [str(len(group))]),
            _shape(first),
            text,
            f"{first.bits_per_weight:.2f}",
            size(sum(layer.nbytes for layer in group)),
        ]
        if with_noise:
            row.append(f"{sorted(snr)[len(snr) // 2]:.1f}" if snr else "")
        table.add_row(*row)
    show(table)


def _millions(count: int) -> str:
    for unit, factor in (("billion", 1e9), ("million", 1e6)):
        if count >= factor:
            return f"{count / factor:.2f} {unit}"
    return f"{count:,}"
