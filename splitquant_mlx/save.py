"""Put a converted checkpoint in its place: all of it, or nothing.

Everything is written into a directory beside the target, and renamed at the end.
"""

import errno
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib import resources
from pathlib import Path
from typing import Any

from splitquant_mlx.errors import CheckpointError, TargetError
from splitquant_mlx.manifest import FILE_NAME, LayerRecord

MODEL_FILE = "splitquant_model.py"
COPIED = (
    "*.json", "*.txt", "*.jinja", "*.tiktoken", "*.model", "LICENSE*", "NOTICE*", "USE_POLICY*",
)  # fmt: skip
NOT_COPIED = ("config.json", FILE_NAME)


@contextmanager
def staged(target: Path, *, overwrite: bool = False, source: Path | None = None) -> Iterator[Path]:
    """Yield an empty directory that becomes `target` when the block ends without an error.

    On an error or an interrupt the directory is removed and `target` is as it was.

    Raises:
        TargetError: when `target` exists and `overwrite` is not set, when it exists and is not a
            model directory or holds `source`, or when it cannot be written or the disk is full.
    """
    target = _absolute(target)
    check_target(target, overwrite=overwrite, source=source)
    with _as_target_error(target):
        # the nearest directory that exists is on the target's own disk, so that a rename will do
        home = next(parent for parent in target.parents if os.path.lexists(parent))
        staging = home / f".{target.name}.partial-{os.getpid()}"
        staging.mkdir()
        try:
            yield staging
            _sync(staging)
            check_target(target, overwrite=overwrite, source=source)  # hours may have passed
            with _made_parents(target):
                _replace(staging, target)
        finally:
            _remove(staging)


def check_target(target: Path, *, overwrite: bool = False, source: Path | None = None) -> None:
    """Raise TargetError when `target` may not be written; see `staged`."""
    target = _absolute(target)
    with _as_target_error(target):
        parent = next((p for p in target.parents if os.path.lexists(p)), target)
        if not parent.is_dir():
            raise TargetError(f"cannot write {target}: {parent} is not a directory")
        try:
            target.lstat()
        except FileNotFoundError:
            return
        if not overwrite:
            raise TargetError(
                f"{target} exists already: choose another --mlx-path, or pass --overwrite to "
                "replace it"
            )
        if target.is_symlink() or not target.is_dir():
            raise TargetError(
                f"{target} is not a directory: it is never overwritten, remove it first"
            )
        if any(target.iterdir()) and not (target / "config.json").is_file():
            raise TargetError(
                f"{target} is not a model directory (it has no config.json): it is never "
                "overwritten, remove it first or choose another --mlx-path"
            )
        if os.path.ismount(target):
            raise TargetError(f"{target} is a mount point: give a directory inside it")
        if source is not None and source.resolve().is_relative_to(target.resolve()):
            raise TargetError(
                f"{target} holds the model to convert: it is never overwritten, choose another "
                "--mlx-path"
            )


def _absolute(target: Path) -> Path:
    try:
        return Path(os.path.abspath(target.expanduser()))
    except RuntimeError as exc:
        raise TargetError(f"cannot write {target}: there is no such user's home") from exc


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
            {layer.path: own for layer, own in zip(plain, settings, strict=True) if own != usual}
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
        if isinstance(exc, BrokenPipeError):
            raise
        if exc.errno in (errno.ENOSPC, errno.EDQUOT):
            raise TargetError(f"disk full while writing {target}: free some space") from exc
        at = f" ({exc.filename})" if exc.filename else ""
        raise TargetError(f"cannot write {target}: {exc.strerror or exc}{at}") from exc


def _sync(directory: Path) -> None:
    for path in [*directory.iterdir(), directory]:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


@contextmanager
def _made_parents(target: Path) -> Iterator[None]:
    """Make the directories above `target`; they go again when the block ends with an error."""
    made = [parent for parent in target.parents if not parent.exists()]
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        yield
    except BaseException:
        for parent in made:
            with suppress(OSError):
                parent.rmdir()
        raise


def _replace(staging: Path, target: Path) -> None:
    if not target.exists():
        staging.rename(target)
        return
    old = staging.with_name(staging.name + "-old")
    try:
        target.rename(old)
        staging.rename(target)
    except BaseException:
        if old.exists() and not target.exists():
            old.rename(target)
        raise
    finally:
        _remove(old)


def _remove(directory: Path) -> None:
    """Remove a directory, also when the user presses Ctrl-C a second time."""
    try:
        shutil.rmtree(directory, ignore_errors=True)
    except KeyboardInterrupt:
        shutil.rmtree(directory, ignore_errors=True)
        raise
