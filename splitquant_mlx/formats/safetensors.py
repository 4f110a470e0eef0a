"""Read and validate safetensors headers, so that a bad file is refused before any work.

Every declared length and offset is checked against the size of the file before it is used.
"""

import json
import math
import struct
from dataclasses import dataclass
from pathlib import Path

from splitquant_mlx.errors import CheckpointError

MAX_HEADER_BYTES = 100_000_000
MAX_DIMENSIONS = 16
DTYPE_BYTES = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "U16": 2, "I16": 2, "F16": 2,
    "BF16": 2, "U32": 4, "I32": 4, "F32": 4, "U64": 8, "I64": 8, "F64": 8,
}  # fmt: skip
_AGAIN = "download the file again"


@dataclass(frozen=True, kw_only=True)
class TensorHeader:
    """Header entry of one stored tensor.

    Attributes:
        file: the file that stores it.
        dtype: safetensors' name of the dtype.
        shape: its shape.
        nbytes: its size, bytes.
        offset: position of its first byte in the file.
    """

    file: Path
    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    offset: int


def read_header(path: Path) -> dict[str, TensorHeader]:
    """Return the tensors of a safetensors file by name.

    Raises:
        CheckpointError: when the file is missing or truncated, or its header is invalid: offsets
            must cover the data exactly, without overlap.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            prefix = file.read(8)
            if len(prefix) < 8:
                raise CheckpointError(f"{path}: not a safetensors file ({size} bytes): {_AGAIN}")
            length = struct.unpack("<Q", prefix)[0]
            if length > min(size - 8, MAX_HEADER_BYTES):
                raise CheckpointError(
                    f"{path}: not a safetensors file or truncated (header of {length} bytes "
                    f"declared, file has {size}): {_AGAIN}"
                )
            header = json.loads(file.read(length))
    except OSError as exc:
        raise CheckpointError(f"{path}: {exc.strerror or exc}") from exc
    except (ValueError, RecursionError) as exc:
        raise CheckpointError(f"{path}: corrupt safetensors header ({exc}): {_AGAIN}") from exc
    if not isinstance(header, dict):
        raise CheckpointError(f"{path}: corrupt safetensors header (not an object): {_AGAIN}")
    metadata = header.pop("__metadata__", None) or {}  # mlx writes null for none
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise CheckpointError(
            f"{path}: corrupt safetensors header (metadata is not text): {_AGAIN}"
        )
    data = end = 8 + length
    tensors = {name: _check_entry(path, name, entry, data) for name, entry in header.items()}
    for start, nbytes, name in sorted((t.offset, t.nbytes, name) for name, t in tensors.items()):
        if start != end:
            raise CheckpointError(
                f"{path}: tensor {name!r}: expected to start at byte {end - data} of the data, got "
                f"{start - data}: {_AGAIN}"
            )
        end += nbytes
    if end != size:
        raise CheckpointError(
            f"{path}: truncated or corrupt: expected {end - data} bytes of data, got "
            f"{size - data}: {_AGAIN}"
        )
    return tensors


def _check_entry(path: Path, name: str, entry: object, data: int) -> TensorHeader:
    """Return the header of a tensor; `data` is the position of the tensors' bytes in the file."""
    try:
        if not isinstance(entry, dict):
            raise ValueError("it is not an object")
        dtype, shape = entry["dtype"], entry["shape"]
        start, stop = entry["data_offsets"]
        if type(shape) is not list or len(shape) > MAX_DIMENSIONS:
            raise ValueError(f"its shape is not a list of at most {MAX_DIMENSIONS} sizes")
        if not all(type(n) is int and 0 <= n < 2**63 for n in (*shape, start, stop)):
            raise ValueError("its sizes are not all integers from 0")
        nbytes = math.prod(shape) * DTYPE_BYTES.get(dtype, 0)
    except (KeyError, TypeError, ValueError) as exc:
        problem = f"it has no {exc}" if isinstance(exc, KeyError) else exc
        raise CheckpointError(
            f"{path}: corrupt header entry of tensor {name!r}: {problem}: {_AGAIN}"
        ) from exc
    if dtype not in DTYPE_BYTES:
        raise CheckpointError(
            f"{path}: tensor {name!r} has unknown dtype {dtype}: cast the checkpoint to F16, "
            "BF16 or F32 first"
        )
    if stop - start != nbytes:
        raise CheckpointError(
            f"{path}: tensor {name!r} of dtype {dtype} and shape {list(shape)}: expected {nbytes} "
            f"bytes, got {stop - start}: {_AGAIN}"
        )
    offset = data + start
    return TensorHeader(file=path, dtype=dtype, shape=tuple(shape), nbytes=nbytes, offset=offset)
