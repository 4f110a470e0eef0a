"""Overwrite tensors of a finished checkpoint."""

from collections.abc import Mapping
from pathlib import Path

import mlx.core as mx

from splitquant_mlx.formats.safetensors import read_header
from splitquant_mlx.formats.shard_writer import SAFETENSORS_NAMES, tensor_bytes
from splitquant_mlx.runtime.disk import sha256, sync

DTYPES = {name: dtype for dtype, name in SAFETENSORS_NAMES.items()}


def replace_tensors(directory: Path, tensors: Mapping[str, mx.array]) -> dict[str, str]:
    """Overwrite the stored tensors of the same names and shapes, in their stored dtype.

    Returns:
        New SHA-256 of every changed safetensors file, by name.

    Raises:
        ValueError: when the checkpoint has no tensor of that name and shape.
        OSError: when a file cannot be written.
    """
    missing, hashes = set(tensors), {}
    for file in sorted(directory.glob("model*.safetensors")):
        headers = read_header(file)
        if missing.isdisjoint(headers):
            continue
        with file.open("r+b") as stream:
            for name in sorted(missing & headers.keys()):
                header, tensor = headers[name], tensors[name]
                if header.shape != tensor.shape:
                    raise ValueError(
                        f"{name}: expected {list(header.shape)}, got {list(tensor.shape)}"
                    )
                stream.seek(header.offset)
                stream.write(tensor_bytes(tensor.astype(DTYPES[header.dtype])))
        missing -= headers.keys()
        sync(file)
        hashes[file.name] = sha256(file)
    if missing:
        raise ValueError(f"{directory} has no {min(missing)}")
    return hashes
