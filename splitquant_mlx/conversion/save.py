"""Write what stands beside the weights of a converted checkpoint: config, tokenizer, licence."""

import json
import shutil
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from splitquant_mlx.errors import CheckpointError, TargetError
from splitquant_mlx.formats.manifest import FILE_NAME, MODEL_FILE, LayerRecord
from splitquant_mlx.runtime.disk import sha256

COPIED = (
    "*.json", "*.txt", "*.jinja", "*.tiktoken", "*.model", "LICENSE*", "NOTICE*", "USE_POLICY*",
)  # fmt: skip
NOT_COPIED = ("config.json", FILE_NAME)
TABLES = ("quantization", "quantization_config", "splitquant", "model_file")


def require_space(directory: Path, needed_bytes: int) -> None:
    """Raise TargetError when the disk of `directory` has less than `needed_bytes` free."""
    free = shutil.disk_usage(directory).free
    if free < needed_bytes:
        raise TargetError(
            f"disk of {directory.parent} is too full: the converted model needs "
            f"{needed_bytes / 1e6:,.1f} MB, {free / 1e6:,.1f} MB are free"
        )


def copy_companions(source: Path, directory: Path) -> None:
    """Copy tokenizer, chat template, generation settings and licence; no code, no weights.

    Raises:
        CheckpointError: when a file cannot be read, or is a link to elsewhere. A model that was
            unpacked or cloned could so have any file of the user's published with the result.
    """
    for pattern in COPIED:
        for file in sorted(source.glob(pattern)):
            known = file.name in NOT_COPIED or file.name.endswith(".index.json")
            if not file.is_file() or known or file.name.startswith("."):
                continue
            refuse_link_outside(source, file)
            try:
                content = file.read_bytes()
            except OSError as exc:
                raise CheckpointError(f"{file} cannot be read: {exc.strerror}") from exc
            (directory / file.name).write_bytes(content)


def refuse_link_outside(source: Path, file: Path) -> None:
    """Raise CheckpointError unless a file really lies in `source`, or with its hub snapshot."""
    snapshot, found = source.resolve(), file.resolve()
    # the cache's layout is <repo>/snapshots/<commit hash>/<link to ../../blobs/...>
    blobs = snapshot.parent.with_name("blobs")
    is_snapshot = snapshot.parent.name == "snapshots"
    if not (found.is_relative_to(snapshot) or (is_snapshot and found.is_relative_to(blobs))):
        raise CheckpointError(
            f"{file} links to a file outside of the model's directory, which is not copied: put "
            "the file itself there, or remove the link"
        )


def write_config(config: dict[str, Any], layers: list[LayerRecord], directory: Path) -> None:
    """Write config.json, and the model file where there are split layers."""
    config = {**config, **config_tables(layers)}
    config.pop("_name_or_path", None)
    if "model_file" in config:
        code = resources.files("splitquant_mlx.nn").joinpath("model_file.py").read_bytes()
        (directory / MODEL_FILE).write_bytes(code)
    text = json.dumps(dict(sorted(config.items())), indent=4)
    (directory / "config.json").write_text(text + "\n", encoding="utf-8")


def config_tables(layers: Sequence[LayerRecord]) -> dict[str, Any]:
    """Return the entries of config.json that say how layers are stored, those of TABLES.

    Plainly quantized layers are listed in mlx's `quantization` table, split layers in a
    `splitquant` table of their own.
    """
    tables: dict[str, Any] = {}
    plain = [layer for layer in layers if layer.action == "quantize"]
    split = [layer for layer in layers if layer.action == "split"]
    if plain:
        settings = [_settings(layer) for layer in plain]
        usual = max(settings, key=settings.count)
        table: dict[str, Any] = dict(usual)
        table.update(
            {layer.path: own for layer, own in zip(plain, settings, strict=True) if own != usual}
        )
        tables["quantization"] = tables["quantization_config"] = table
    if split:
        tables["model_file"] = MODEL_FILE
        tables["splitquant"] = {
            "layers": {
                layer.path: {
                    "clusters": layer.clusters,
                    "group_size": layer.group_size,
                    "bits": layer.bits,
                }
                for layer in split
            }
        }
    return tables


def hash_files(directory: Path, known: dict[str, str]) -> dict[str, str]:
    """Return the SHA-256 of every file of `directory`; those in `known` are not read again."""
    return {file.name: known.get(file.name) or sha256(file) for file in sorted(directory.iterdir())}


def _settings(layer: LayerRecord) -> dict[str, Any]:
    return {"group_size": layer.group_size, "bits": layer.bits, "mode": layer.mode}
