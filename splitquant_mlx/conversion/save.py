"""Write the files of a converted checkpoint other than weights: config, tokenizer, licence."""

import shutil
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from splitquant_mlx.conversion.plan import HEAD_FROM_EMBEDDING
from splitquant_mlx.errors import CheckpointError, TargetError
from splitquant_mlx.formats.manifest import MODEL_FILE, OWN_MODES, LayerRecord
from splitquant_mlx.models.companions import companions
from splitquant_mlx.models.config import to_json
from splitquant_mlx.runtime.disk import sha256
from splitquant_mlx.sizes import size

# deviations of mlx-vlm from transformers, by model type
DEVIATIONS = {
    "internlm3": "doubles the angles of rotary embeddings unless they are scaled linearly",
    "lfm2_moe": "weights experts by softmax instead of sigmoid",
}
BUILD_IMPORT = b"from splitquant_mlx.nn.build_model import build_model\n"  # in the model files
TABLES = ("quantization", "quantization_config", "splitquant", "model_file")


def require_space(directory: Path, needed_bytes: int) -> None:
    """Raise TargetError if the disk of `directory` has less than `needed_bytes` free."""
    free = shutil.disk_usage(directory).free
    if free < needed_bytes:
        raise TargetError(
            f"not enough disk space in {directory.parent}: the converted model needs "
            f"{size(needed_bytes)}, {size(free)} are free"
        )


def copy_companions(source: Path, directory: Path) -> None:
    """Copy tokenizer, chat templates, generation settings and licence, but no code or weights.

    Raises:
        CheckpointError: a file cannot be read, or is a link that is not followed.
    """
    for file in companions(source):
        target = directory / file.relative_to(source)
        target.parent.mkdir(exist_ok=True)
        try:
            content = file.read_bytes()
        except OSError as exc:
            raise CheckpointError(f"{file} cannot be read: {exc.strerror}") from exc
        target.write_bytes(content)


def write_config(config: dict[str, Any], layers: list[LayerRecord], directory: Path) -> None:
    """Write config.json, and the model file if mlx lacks some of the layers."""
    config = {**config, **config_tables(layers)}
    config.pop("_name_or_path", None)
    if "model_file" in config:
        (directory / MODEL_FILE).write_bytes(model_code(layers))
    (directory / "config.json").write_text(to_json(config), encoding="utf-8")


def model_code(layers: Sequence[LayerRecord]) -> bytes:
    """Return the model file for these layers, with `build_model` inlined."""
    is_custom = any(layer.mode in OWN_MODES for layer in layers)
    sources = resources.files("splitquant_mlx.nn")
    name = "lut_model_file.py" if is_custom else "split_model_file.py"
    code = sources.joinpath(name).read_bytes()
    return code.replace(BUILD_IMPORT, sources.joinpath("build_model.py").read_bytes())


def config_tables(layers: Sequence[LayerRecord]) -> dict[str, Any]:
    """Return the entries of config.json that specify how layers are stored: those of TABLES.

    mlx's `quantization` table lists the layers that mlx supports, the `splitquant` table split,
    lookup-table and mixed-bit layers.
    """
    tables: dict[str, Any] = {}
    plain = [layer for layer in layers if layer.action == "quantize" and not layer.needs_code]
    split = [layer for layer in layers if layer.action == "split"]
    if plain:
        settings = [_settings(layer) for layer in plain]
        default = max(settings, key=settings.count)
        table: dict[str, Any] = dict(default)
        table.update(
            {
                path: entry
                for layer, entry in zip(plain, settings, strict=True)
                for path in filter(None, (layer.path, layer.head))
                if entry != default
            }
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
    for mode, setting in OWN_MODES.items():
        if custom := [layer for layer in layers if layer.mode == mode]:
            tables["model_file"] = MODEL_FILE
            tables["splitquant"] = {
                mode: {x.path: {"bits": x.bits, setting: getattr(x, setting) or 0} for x in custom}
            }
    return tables


def hash_files(directory: Path, known: dict[str, str]) -> dict[str, str]:
    """Return the SHA-256 of every file in `directory`, by name; `known` hashes are reused."""
    files = sorted(file for file in directory.rglob("*") if file.is_file())
    names = {file.relative_to(directory).as_posix(): file for file in files}
    return {name: known.get(name) or sha256(file) for name, file in names.items()}


def _settings(layer: LayerRecord) -> dict[str, Any]:
    return {"group_size": layer.group_size, "bits": layer.bits, "mode": layer.mode}


def program_notes(config: dict[str, Any], layers: Sequence[LayerRecord]) -> list[str]:
    """Return a warning for each program that does not run a conversion of these layers correctly.

    mlx-vlm's Gemma 3 always uses the embedding as head, even if the head is not tied. Some of its
    other models deviate from transformers and mlx-lm.
    """
    kind = config["model_type"]
    name = f"mlx-vlm's {kind}"
    if kind in DEVIATIONS:
        return [f"{name} {DEVIATIONS[kind]}: use mlx-lm"]
    if kind in HEAD_FROM_EMBEDDING and any(layer.kind == "lm_head" for layer in layers):
        return [f"{name} uses the embedding as head and ignores the stored head: use mlx-lm"]
    return []
