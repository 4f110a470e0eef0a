"""The command `inspect`."""

import dataclasses
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any

import typer

from splitquant_mlx.cli import console
from splitquant_mlx.cli.console import new_table, pairs, show, size
from splitquant_mlx.cli.options import JsonFile, Model, start
from splitquant_mlx.cli.settings import dataclass_options
from splitquant_mlx.errors import RecipeError

WEIGHTS = "Weights"

Layers = Annotated[bool, typer.Option("--layers", help="One row per layer, not per kind.")]
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
        metavar="FILE", help="Also write that histogram as a PNG file.", rich_help_panel=WEIGHTS
    ),
]
CutPoints = Annotated[
    bool,
    typer.Option(
        "--cut-points",
        help="Show the cut points of the layers; for an original, all weights are read.",
        rich_help_panel=WEIGHTS,
    ),
]
Clusters = Annotated[
    int,
    typer.Option(
        min=2,
        max=8,
        help="Number of parts per layer, for an unconverted model.",
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
    """Show properties and layers of a model, or the histogram of one layer."""
    if png is not None and layer is None:
        raise RecipeError("--png shows one layer: choose it with --layer")
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
        overview = describe(directory)
        if layer is not None:
            path = _find_layer(layer, [record.path for record in overview.layers])
            _show_histogram(directory, path, clusters if cut_points else None, png)
            return
        points = {}
        if cut_points:
            points = find_cut_points(directory, clusters=clusters, progress=Bars())
    _report(name, overview, points, json_file, each=layers)


def _report(
    name: str,
    overview: Any,
    cut_points: dict[str, tuple[float, ...]],
    json_file: JsonFile,
    *,
    each: bool,
) -> None:
    values = dataclasses.asdict(overview) | ({"cut_points": cut_points} if cut_points else {})
    if console.write_json(json_file, values):
        return
    _print_overview(name, overview)
    if cut_points:
        _print_cut_points(overview.layers, cut_points)
    else:
        _print_layers(overview.layers, each=each)


def _show_histogram(directory: Path, path: str, clusters: int | None, png: Path | None) -> None:
    from splitquant_mlx.inspection.layers import layer_histogram
    from splitquant_mlx.inspection.plots import save_histogram, text_histogram

    histogram = layer_histogram(directory, path, clusters=clusters)
    show(f"{path}\n{text_histogram(histogram)}")
    if png is not None:
        save_histogram(histogram, png)
        show(f"Saved {png}")


def _find_layer(name: str, paths: list[str]) -> str:
    """Return the path of a layer, given its path or an unambiguous suffix of it."""
    if name in paths:
        return name
    matches = [path for path in paths if path.endswith(f".{name}")]
    if len(matches) == 1:
        return matches[0]
    near = matches or get_close_matches(name, paths, n=4, cutoff=0.5) or paths
    raise RecipeError(
        f"--layer: there is no layer {name!r} with a weight matrix, but {', '.join(near[:4])}"
        f"{' and others' if len(near) > 4 else ''}: --layers lists them"
    )


def _print_overview(name: str, overview: Any) -> None:
    def count(value: int | None) -> str:
        return "unknown" if value is None else f"{value:,} tokens"

    source = f", from {console.plain(overview.source)}" if overview.source else ""
    show(
        pairs(
            ("Model", console.plain(name)),
            ("Architecture", console.plain(overview.architecture)),
            ("Parameters", _format_count(overview.parameters)),
            ("Context", count(overview.context)),
            ("Vocabulary", count(overview.vocabulary)),
            ("Chat template", "yes" if overview.has_chat_template else "no: it continues text"),
            ("Quantized", f"{overview.method or 'no'}{source}"),
            ("Size", f"{size(overview.stored_bytes)}, {overview.bits_per_weight:.2f} bits/weight"),
            ("Memory to run", f"about {overview.memory_bytes / 1e9:.1f} GB"),
            ("Runs in", overview.runs_in),
        ),
        "",
    )


def _print_cut_points(layers: Any, cut_points: dict[str, tuple[float, ...]]) -> None:
    table = new_table("", "shape", "cut points")
    for layer in layers:
        points = ", ".join(f"{point:.4g}" for point in cut_points.get(layer.path, ()))
        table.add_row(_name(layer.path), _shape(layer), points)
    show(table)


def _name(path: str) -> str:
    return console.plain(path.removeprefix("model.").removeprefix("layers.*."))


def _shape(layer: Any) -> str:
    return " x ".join(map(str, layer.shape))


def _print_layers(layers: Any, *, each: bool) -> None:
    from splitquant_mlx.inspection.overview import group_layers

    rows = [(layer.path, [layer]) for layer in layers] if each else group_layers(layers)
    has_snr = any(layer.snr_db is not None for layer in layers)
    columns = ["shape", "form", "bits/weight", "size", *(["SNR dB"] if has_snr else [])]
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
            text += f", {first.outliers} outliers per row" if first.outliers else ""
        snr = [layer.snr_db for layer in group if layer.snr_db is not None]
        row = [
            _name(path),
            *([] if each else [str(len(group))]),
            _shape(first),
            text,
            f"{first.bits_per_weight:.2f}",
            size(sum(layer.nbytes for layer in group)),
        ]
        if has_snr:
            row.append(f"{sorted(snr)[len(snr) // 2]:.1f}" if snr else "")
        table.add_row(*row)
    show(table)


def _format_count(count: int) -> str:
    for unit, factor in (("billion", 1e9), ("million", 1e6)):
        if count >= factor:
            return f"{count / factor:.2f} {unit}"
    return f"{count:,}"
