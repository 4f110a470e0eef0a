"""Find the safetensors files of a checkpoint, and read their headers.

The index decides if all its files exist. If not, it may be a leftover from a different sharding of
the same tensors, or from another form of the model: then the existing files are used, if they
contain all tensors of the index.
"""

import json
import os
import re
from collections.abc import Collection
from pathlib import Path

from splitquant_mlx.errors import CheckpointError, abbreviate, one_line
from splitquant_mlx.formats.head_file import HEAD_FILE, INDEX, is_copy
from splitquant_mlx.formats.safetensors import TensorHeader, read_header
from splitquant_mlx.models.config import refuse_special_file

SUFFIX = ".safetensors"
NUMBERED = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.safetensors")
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pickle", ".pkl")


def read_headers(path: Path) -> dict[str, TensorHeader]:
    """Return the checked headers of every tensor of a checkpoint directory.

    Raises:
        CheckpointError: when a file is missing, corrupt or not a regular file, or two files
            contain the same tensor.
    """
    weight_map = read_index(path)
    existing = {file.name for file in path.glob(f"*{SUFFIX}") if not file.name.startswith(".")}
    names = shard_names(existing, set(weight_map.values()))
    if not names:
        if pickles := sorted(f.name for f in path.glob("*") if f.name.endswith(PICKLES)):
            raise CheckpointError(
                f"{path} has only pickled weights ({pickles[0]}), which can run code when loaded "
                "and are never read: convert them to safetensors first"
            )
        others = f" of a model, only {abbreviate(existing)}" if existing else ""
        raise CheckpointError(f"{path} is not a model directory: it has no {SUFFIX} file{others}")
    headers: dict[str, TensorHeader] = {}
    for file in (path / name for name in sorted(names)):
        if os.path.lexists(file) and not file.is_file():
            raise CheckpointError(f"{file} is not a file: download it again")
        if not file.is_file():
            raise CheckpointError(f"{path}: shard {file.name} is missing: download it again")
        for name, header in read_header(file).items():
            if name in headers:
                raise CheckpointError(
                    f"{path}: tensor {name!r} is in both {headers[name].file.name} and {file.name}"
                )
            headers[name] = header
    if not names >= set(weight_map.values()) and (lacking := weight_map.keys() - headers.keys()):
        missing = {weight_map[name] for name in lacking} - names
        raise CheckpointError(
            f"{path}: {INDEX} names {abbreviate(missing)}, which is missing, and the other files "
            f"do not have its tensors ({abbreviate(lacking)}): download it, or remove the index if "
            "it is from another model"
        )
    return headers


def read_index(path: Path) -> dict[str, str]:
    """Return tensor name -> file name by the index; empty without an index.

    The copies in HEAD_FILE are left out if it is missing: mlx-lm does not download or need it.

    Raises:
        CheckpointError: when it is corrupt, or names files that are not of this directory.
    """
    file = path / INDEX
    if not file.exists():
        return {}
    refuse_special_file(file)
    try:
        weight_map = dict(json.loads(file.read_text(encoding="utf-8"))["weight_map"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as exc:
        raise CheckpointError(
            f"{file} is not a valid index: {type(exc).__name__}: {one_line(exc)}: download it again"
        ) from exc
    for name in weight_map.values():
        is_file_name = isinstance(name, str) and name.isprintable() and Path(name).name == name
        if not (is_file_name and name.endswith(SUFFIX)):
            raise CheckpointError(
                f"{file}: {name!r} is not a {SUFFIX} file of this directory: download the index "
                "again"
            )
    if not weight_map:
        raise CheckpointError(f"{file} names no file: download it again")
    if not (path / HEAD_FILE).exists():
        return {n: shard for n, shard in weight_map.items() if not is_copy(n, shard, weight_map)}
    return weight_map


def shard_names(existing: Collection[str], indexed: Collection[str]) -> set[str]:
    """Return the names of a checkpoint's files, including missing ones.

    Args:
        existing: names of the .safetensors files in the directory.
        indexed: names in the index; empty without an index.
    """
    missing = set(indexed).difference(existing)
    if indexed and not missing:
        return set(indexed)
    candidates = {name for name in existing if name.startswith("model")} or {
        name for name in existing if not name.startswith(("adapter", "consolidated"))
    }
    series = [_series(name) for name in candidates]
    if missing:
        complete = set().union(*(names for names in series if names <= candidates))
        return complete if not complete <= set(indexed) else set(indexed)
    return candidates.union(*series)


def _series(name: str) -> set[str]:
    """Return the names of all files of the numbered series of one file."""
    match = NUMBERED.fullmatch(name)
    if match is None:
        return {name}
    stem, _, count = match.groups()
    numbers = range(1, min(int(count), 10_000) + 1)
    return {f"{stem}-{n:05d}-of-{count}{SUFFIX}" for n in numbers}
