"""The commands `models` and `cache`."""

import dataclasses
import shutil
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from splitquant_mlx.cli import console
from splitquant_mlx.cli.console import new_table, plain, show, size
from splitquant_mlx.cli.options import JsonFile
from splitquant_mlx.errors import TargetError

# entries of the cache directory
CONTENT = {
    "reference": "predictions of original models (kl)",
    "demo": "the demo's model and its conversions",
    "calibration": "text sampled from models",
    "answers": "answers to questions (ARC)",
    "sensitivity": "sensitivities of layers (auto)",
    "chat_history": "input history of chat",
}


def models(
    directory: Annotated[
        Path, typer.Argument(metavar="[DIRECTORY]", help="Directory of converted models.")
    ] = Path("."),
    json_file: JsonFile = None,
) -> None:
    """List converted models in a directory, and the models in the hub's cache."""
    from splitquant_mlx.models.library import converted_in, in_hub_cache

    here, cached = converted_in(directory), in_hub_cache()
    values = {"here": _values(here), "hub_cache": _values(cached)}
    if console.write_json(json_file, values):
        return
    if not here and not cached:
        show("No model here or in the hub's cache: create one with splitquant-mlx convert MODEL.")
    for title, group in (("Converted here", here), ("In the hub's cache", cached)):
        if not group:
            continue
        table = new_table(title, "method", "bits/\nweight", "size", "written", "LM Studio")
        table.padding = (0, 1, 0, 0)
        for column in table.columns:
            column.no_wrap = True
        for model in group:
            bits = "" if model.bits_per_weight is None else f"{model.bits_per_weight:.2f}"
            form = model.method or "original"
            runs = "no" if model.needs_code else "yes"
            written = _date(model.modified)
            table.add_row(plain(model.name), form, bits, size(model.nbytes), written, runs)
        show(table)
    if here or cached:
        show("All run here and in mlx-lm (with --trust-remote-code if not in LM Studio).")


def cache(
    clear: Annotated[
        bool, typer.Option("--clear", help="Remove everything; it is computed again when needed.")
    ] = False,
    json_file: JsonFile = None,
) -> None:
    """Show the files that splitquant-mlx caches, or clear them."""
    from splitquant_mlx.runtime.cache import cache_directory

    home = cache_directory()
    entries = sorted(home.iterdir()) if home.is_dir() else []
    sizes = {entry.name: _size(entry) for entry in entries}
    if clear:
        _clear(entries)
    values = {"path": str(home), "bytes": sizes, "cleared": clear}
    if console.write_json(json_file, values):
        return
    if clear:
        show(f"Removed {size(sum(sizes.values()))} from {home}")
        return
    table = new_table("", "size", "content")
    table.columns[-1].justify = "left"
    for name, nbytes in sizes.items():
        table.add_row(plain(name), size(nbytes), CONTENT.get(name, ""))
    table.add_row("all", size(sum(sizes.values())), "splitquant-mlx cache --clear removes it")
    show(f"{home} ($SPLITQUANT_CACHE moves it)", table)
    from huggingface_hub import constants

    show(f"Models of the hub are in {constants.HF_HUB_CACHE}: see `hf cache ls`")


def _date(modified: float) -> str:
    """Return the day of a modification time, s; the year if it is long ago, as ls does."""
    is_old = time.time() - modified > 300 * 86400
    return time.strftime("%Y" if is_old else "%d %b", time.localtime(modified))


def _values(models: Any) -> list[dict[str, Any]]:
    return [dataclasses.asdict(model) for model in models]


def _size(path: Path) -> int:
    files = path.rglob("*") if path.is_dir() and not path.is_symlink() else [path]
    return sum(file.lstat().st_size for file in files if file.is_file() or file.is_symlink())


def _clear(entries: list[Path]) -> None:
    try:
        for entry in entries:
            if entry.is_dir() and not entry.is_symlink():
                shutil.rmtree(entry)
            else:
                entry.unlink()
    except OSError as exc:
        raise TargetError(f"cannot remove {exc.filename}: {exc.strerror or exc}") from exc
