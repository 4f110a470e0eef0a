"""Read and check safetensors headers, so that a bad file is found before any work is done.

Nothing here trusts a declared size: every length and offset is checked against the file's own
length before it is used.
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


@dataclass(frozen=True, kw_only=True)
class TensorHeader:
    """Describe one stored tensor: its file, dtype (safetensors' name), shape, size and place.

    Attributes:
        offset: of its first byte in the file.
    """

    file: Path
    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    offset: int


def read_header(path: Path) -> dict[str, TensorHeader]:
    """Return the tensors of a safetensors file by name.

    Raises:
        CheckpointError: when the file is missing, truncated, or its header is not what the
            format says: offsets must cover the data exactly, without overlap.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            prefix = file.read(8)
            if len(prefix) < 8:
                raise CheckpointError(f"{path}: {size} bytes are no safetensors file: {_AGAIN}")
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
        raise CheckpointError(f"{path}: corrupt safetensors header (no table): {_AGAIN}")
    metadata = header.pop("__metadata__", None) or {}  # null is what mlx writes for none
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise CheckpointError(f"{path}: corrupt safetensors header (metadata is no text): {_AGAIN}")
    tensors, spans = {}, []
    for name, entry in header.items():
        tensors[name], span = _check_entry(path, name, entry, 8 + length)
        spans.append((*span, name))
    end = 0
    for start, stop, name in sorted(spans):
        if start != end:
            raise CheckpointError(
                f"{path}: tensor {name!r}: expected to start at byte {end} of the "
                f"data, got {start}: {_AGAIN}"
            )
        end = stop
    if end != size - 8 - length:
        raise CheckpointError(
            f"{path}: truncated or corrupt: tensors need {end} bytes of data, the file holds "
            f"{size - 8 - length}: {_AGAIN}"
        )
    return tensors


_AGAIN = "download the file again"


def _check_entry(
    path: Path, name: str, entry: object, data: int
) -> tuple[TensorHeader, tuple[int, int]]:
    try:
        if not isinstance(entry, dict):
            raise ValueError("it is no table")
        dtype, shape = entry["dtype"], entry["shape"]
        start, stop = entry["data_offsets"]
        if type(shape) is not list or len(shape) > MAX_DIMENSIONS:
            raise ValueError(f"its shape is no list of at most {MAX_DIMENSIONS} sizes")
        if not all(type(n) is int and 0 <= n < 2**63 for n in (*shape, start, stop)):
            raise ValueError("its sizes must be whole numbers")
        nbytes = math.prod(shape) * DTYPE_BYTES.get(dtype, 0)
    except KeyError as exc:
        message = f"{path}: corrupt header entry of tensor {name!r}: it has no {exc}: {_AGAIN}"
        raise CheckpointError(message) from exc
    except (TypeError, ValueError) as exc:
        message = f"{path}: corrupt header entry of tensor {name!r}: {exc}: {_AGAIN}"
        raise CheckpointError(message) from exc
    if dtype not in DTYPE_BYTES:
        raise CheckpointError(
            f"{path}: tensor {name!r} has the unknown dtype {dtype}: cast the checkpoint to F16, "
            "BF16 or F32 first"
        )
    if stop - start != nbytes:
        raise CheckpointError(
            f"{path}: tensor {name!r} of dtype {dtype} and shape {list(shape)} needs {nbytes} "
            f"bytes, its header gives it {stop - start}: {_AGAIN}"
        )
    found = TensorHeader(
        file=path, dtype=dtype, shape=tuple(shape), nbytes=nbytes, offset=data + start
    )
    return found, (start, stop)
