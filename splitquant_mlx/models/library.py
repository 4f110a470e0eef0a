"""List the models that are on this machine: converted here, and in the hub's cache."""

from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from splitquant_mlx.errors import SplitQuantError, meant
from splitquant_mlx.formats.manifest import FILE_NAME, LayerRecord, Manifest, load_manifest


@dataclass(frozen=True, kw_only=True)
class LocalModel:
    """A model on this machine.

    Attributes:
        path: its directory.
        name: of the model: its directory's, or its repo's.
        method: that it was converted with; "" for one that was not.
        bits_per_weight: of the whole model; None where it was not converted.
        nbytes: of its weights, bytes.
        modified: when it was written, s since 1970.
        needs_code: whether it has split layers or lookup tables, which only this program runs as it
            is.
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
    """Return the models in `directory` that splitquant-mlx converted, the newest first."""
    found = []
    for path in _directories(directory):
        with suppress(SplitQuantError, OSError):
            if not path.name.startswith(".") and (manifest := load_manifest(path)) is not None:
                modified = (path / FILE_NAME).stat().st_mtime
                found.append(_local(path, path.name, manifest, manifest.stored_bytes, modified))
    return sorted(found, key=lambda model: model.modified, reverse=True)


def in_hub_cache() -> list[LocalModel]:
    """Return the models in the hub's cache, converted or not, the newest first."""
    from huggingface_hub import scan_cache_dir
    from huggingface_hub.errors import CacheNotFound

    try:
        repos = scan_cache_dir().repos
    except CacheNotFound:
        return []
    found = []
    for repo in repos:
        for revision in repo.revisions:
            if repo.repo_type != "model" or not any(revision.snapshot_path.glob("*.safetensors")):
                continue
            manifest = None
            with suppress(SplitQuantError, OSError):
                manifest = load_manifest(revision.snapshot_path)
            size, modified = revision.size_on_disk, revision.last_modified
            found.append(_local(revision.snapshot_path, repo.repo_id, manifest, size, modified))
    return sorted(found, key=lambda model: model.modified, reverse=True)


def closest(name: str, directory: Path) -> str | None:
    """Return the model in `directory` that `name` looks like a misspelling of."""
    names = [path.name for path in _directories(directory) if (path / "config.json").is_file()]
    return meant(name, names)


def _directories(directory: Path) -> Iterator[Path]:
    with suppress(OSError):
        yield from (path for path in sorted(directory.iterdir()) if path.is_dir())


def _local(
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
