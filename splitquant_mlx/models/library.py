"""List the models on this machine: converted ones, and those in the hub's cache."""

from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from splitquant_mlx.errors import SplitQuantError, closest_word
from splitquant_mlx.formats.manifest import FILE_NAME, LayerRecord, Manifest, load_manifest


@dataclass(frozen=True, kw_only=True)
class LocalModel:
    """A model on this machine.

    Attributes:
        path: its directory.
        name: name of its directory or repo.
        method: conversion method; "" if it was not converted.
        bits_per_weight: average of the model; None if it was not converted.
        nbytes: size of its weights, bytes.
        modified: time of its last change, s since 1970.
        needs_code: whether it has split layers or lookup tables, which mlx-lm runs only with
            --trust-remote-code.
        runs_in: the programs that run it.
    """

    path: Path
    name: str
    method: str
    bits_per_weight: float | None
    nbytes: int
    modified: float
    needs_code: bool
    runs_in: str


def runs_in(layers: Sequence[LayerRecord]) -> str:
    """Return the programs that run a model with these layers."""
    if not any(layer.needs_code for layer in layers):
        return "mlx-lm, LM Studio"
    return "here, mlx-lm --trust-remote-code, mlx-vlm"


def converted_in(directory: Path) -> list[LocalModel]:
    """Return the models in `directory` that splitquant-mlx converted, newest first."""
    models = []
    for path in _directories(directory):
        with suppress(SplitQuantError, OSError):
            if not path.name.startswith(".") and (manifest := load_manifest(path)) is not None:
                modified = (path / FILE_NAME).stat().st_mtime
                models.append(_entry(path, path.name, manifest, manifest.stored_bytes, modified))
    return sorted(models, key=lambda model: model.modified, reverse=True)


def in_hub_cache() -> list[LocalModel]:
    """Return the models in the hub's cache, converted or not, newest first."""
    from huggingface_hub import scan_cache_dir
    from huggingface_hub.errors import CacheNotFound

    try:
        repos = scan_cache_dir().repos
    except CacheNotFound:
        return []
    models = []
    for repo in repos:
        for revision in repo.revisions:
            if repo.repo_type != "model" or not any(revision.snapshot_path.glob("*.safetensors")):
                continue
            manifest = None
            with suppress(SplitQuantError, OSError):
                manifest = load_manifest(revision.snapshot_path)
            size, modified = revision.size_on_disk, revision.last_modified
            models.append(_entry(revision.snapshot_path, repo.repo_id, manifest, size, modified))
    return sorted(models, key=lambda model: model.modified, reverse=True)


def closest(name: str, directory: Path) -> str | None:
    """Return the model in `directory` whose name is most similar to `name`, if any."""
    names = [path.name for path in _directories(directory) if (path / "config.json").is_file()]
    return closest_word(name, names)


def _directories(directory: Path) -> Iterator[Path]:
    with suppress(OSError):
        yield from (path for path in sorted(directory.iterdir()) if path.is_dir())


def _entry(
    path: Path, name: str, manifest: Manifest | None, nbytes: int, modified: float
) -> LocalModel:
    layers = manifest.layers if manifest else ()
    return LocalModel(
        path=path,
        name=name,
        method=str(manifest.recipe.get("method", "splitquant")) if manifest else "",
        bits_per_weight=manifest.bits_per_weight if manifest else None,
        nbytes=nbytes,
        modified=modified,
        needs_code=any(layer.needs_code for layer in layers),
        runs_in=runs_in(layers),
    )
