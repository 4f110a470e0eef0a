"""Put a converted checkpoint in its place: all of it, or nothing.

Everything is written into a directory beside the target, and renamed at the end.
"""

import errno
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import resources
from pathlib import Path
from typing import Any

from splitquant_mlx.errors import TargetError
from splitquant_mlx.manifest import FILE_NAME, LayerRecord

MODEL_FILE = "splitquant_model.py"
COPIED = (
    "*.json", "*.txt", "*.jinja", "*.tiktoken", "*.model", "LICENSE*", "NOTICE*", "USE_POLICY*",
)  # fmt: skip
NOT_COPIED = ("config.json", FILE_NAME)


@contextmanager
def staged(target: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """Yield an empty directory that becomes `target` when the block ends without an error.

    On an error or an interrupt the directory is removed and `target` is as it was.

    Raises:
        TargetError: when `target` exists and `overwrite` is not set, when it exists and is not a
            model directory, or when it cannot be written or the disk is full.
    """
    target = Path(os.path.abspath(target.expanduser()))
    check_target(target, overwrite=overwrite)
    # the nearest directory that exists is on the target's own disk, so that a rename will do
    home = next(parent for parent in target.parents if parent.exists())
    staging = home / f".{target.name}.partial-{os.getpid()}"
    try:
        with _as_target_error(target):
            staging.mkdir()
            yield staging
            _sync(staging)
            target.parent.mkdir(parents=True, exist_ok=True)
            _replace(staging, target)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def check_target(target: Path, *, overwrite: bool = False) -> None:
    """Raise TargetError when `target` may not be written; see `staged`."""
    if not os.path.lexists(target):
        return
    if not overwrite:
        raise TargetError(
            f"{target} exists already: choose another --mlx-path, or pass --overwrite to replace it"
        )
    if target.is_symlink() or not target.is_dir():
        raise TargetError(f"{target} is not a directory: it is never overwritten, remove it first")
    if any(target.iterdir()) and not (target / "config.json").is_file():
        raise TargetError(
            f"{target} is not a model directory (it has no config.json): it is never overwritten, "
            "remove it first or choose another --mlx-path"
        )


def require_space(directory: Path, needed_bytes: int) -> None:
    """Raise TargetError when the disk of `directory` has less than `needed_bytes` free."""
    free = shutil.disk_usage(directory).free
    if free < needed_bytes:
        raise TargetError(
            f"disk of {directory.parent} is too full: the converted model needs "
            f"{needed_bytes / 1e9:.2f} GB, {free / 1e9:.2f} GB are free"
        )


def copy_companions(source: Path, directory: Path) -> None:
    """Copy tokenizer, chat template, generation settings and licence; no code, no weights."""
    for pattern in COPIED:
        for file in sorted(source.glob(pattern)):
            known = file.name in NOT_COPIED or file.name.endswith(".index.json")
            if file.is_file() and not known:
                shutil.copyfile(file, directory / file.name)


def write_config(config: dict[str, Any], layers: list[LayerRecord], directory: Path) -> None:
    """Write config.json, and the model file where there are split layers.

    Plainly quantized layers are listed in mlx's `quantization` table, split layers in a
    `splitquant` table of their own.
    """
    config = dict(config)
    config.pop("_name_or_path", None)
    plain = [layer for layer in layers if layer.action == "quantize"]
    split = [layer for layer in layers if layer.action == "split"]
    if plain:
        settings = [_settings(layer) for layer in plain]
        usual = max(settings, key=settings.count)
        table: dict[str, Any] = dict(usual)
        table.update(
            {
                layer.path: own
                for layer, own in zip(plain, settings, strict=True)
                if own != usual
            }
        )
        config["quantization"] = config["quantization_config"] = table
    if split:
        config["model_file"] = MODEL_FILE
        config["splitquant"] = {
            "layers": {
                layer.path: {
                    "clusters": layer.clusters,
                    "group_size": layer.group_size,
                    "bits": layer.bits,
                }
                for layer in split
            }
        }
        code = resources.files("splitquant_mlx").joinpath("model_file.py").read_bytes()
        (directory / MODEL_FILE).write_bytes(code)
    text = json.dumps(dict(sorted(config.items())), indent=4)
    (directory / "config.json").write_text(text + "\n", encoding="utf-8")


def _settings(layer: LayerRecord) -> dict[str, Any]:
    return {"group_size": layer.group_size, "bits": layer.bits, "mode": layer.mode}


@contextmanager
def _as_target_error(target: Path) -> Iterator[None]:
    try:
        yield
    except OSError as exc:
        if exc.errno in (errno.ENOSPC, errno.EDQUOT):
            raise TargetError(f"disk full while writing {target}: free some space") from exc
        if exc.errno in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EFBIG):
            raise TargetError(f"cannot write {exc.filename or target}: {exc.strerror}") from exc
        raise


def _sync(directory: Path) -> None:
    for path in [*directory.iterdir(), directory]:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _replace(staging: Path, target: Path) -> None:
    if not target.exists():
        staging.rename(target)
        return
    old = staging.with_name(staging.name + "-old")
    target.rename(old)
    try:
        staging.rename(target)
    except OSError:
        old.rename(target)
        raise
    shutil.rmtree(old, ignore_errors=True)
