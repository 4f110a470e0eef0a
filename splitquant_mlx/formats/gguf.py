"""Read untrusted GGUF files: checked headers, and the gguf package's block formats.

A little-endian GGUF file of version 2 or 3 consists of (ggml, docs/gguf.md)

    header        "GGUF", version u32, tensor count u64, metadata count u64
    metadata      key, value type u32, value
    tensor infos  name, rank u32, dimensions u64 (fastest first), type u32, offset u64
    data          at the next multiple of `general.alignment`; offsets are relative to it

A string is a u64 length and its bytes; an array is an element type u32, a u64 count and the
elements. Each declared length is checked against the remaining bytes before any allocation or
loop, so a corrupt file raises an error and uses neither memory nor time. A model in several files,
`NAME-00001-of-0000N.gguf`, has its metadata in the first.
"""

import math
import mmap
import os
import re
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from splitquant_mlx.errors import CheckpointError, SourceError, abbreviate

# The largest vocabularies in use need about 20 MB of metadata.
MAX_HEADER_BYTES = 1 << 26
MAX_RANK = 4
MAX_ARRAY_DEPTH = 4
DEFAULT_ALIGNMENT = 32
CHUNK_ENTRIES = 1 << 20
PART = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.gguf", re.IGNORECASE)

STRING, ARRAY = 8, 9
SCALAR_KINDS = (0, 1, 2, 3, 4, 5, 6, 7, 10, 11, 12)
SCALAR_DTYPES = map(np.dtype, "u1 i1 <u2 <i2 <u4 <i4 <f4 ? <u8 <i8 <f8".split())
SCALARS = dict(zip(SCALAR_KINDS, SCALAR_DTYPES, strict=True))

# minimum size of an entry: the length of an empty name, then the required fields
MIN_METADATA_BYTES = 8 + 4 + 1
MIN_TENSOR_INFO_BYTES = 8 + 4 + 8 + 4 + 8


class TensorInfo(NamedTuple):
    """Location of a tensor: row-major shape (..., out, in), ggml type, offset and size in bytes."""

    name: str
    shape: tuple[int, ...]
    type: str
    offset: int
    nbytes: int
    part: int = 0


@dataclass(frozen=True)
class Gguf:
    """An open GGUF model: metadata, tensor locations and the memory map of each file."""

    path: Path
    metadata: dict[str, Any]
    tensors: dict[str, TensorInfo]
    parts: tuple[mmap.mmap, ...] = field(repr=False)


def gguf_files(path: Path) -> list[Path]:
    """Return all files of the model that `path` belongs to, by name; they need not exist.

    A file named `NAME-0000K-of-0000N.gguf` is one of N; any other is a model by itself.
    """
    match = PART.fullmatch(path.name)
    if match is None:
        return [path]
    stem, count = match[1], match[3]
    return [path.with_name(f"{stem}-{n:05d}-of-{count}.gguf") for n in range(1, int(count) + 1)]


def open_gguf(path: Path) -> Gguf:
    """Map the file `path`, or all files of the model it is part of; tensors are not read.

    Raises:
        SourceError: a file cannot be opened.
        CheckpointError: a file is not a GGUF file, is truncated or corrupt, has an unsupported
            tensor type, or is not part of the same model.
    """
    files = gguf_files(path)
    count = len(files)
    if count > 1 and (missing := [file.name for file in files if not file.exists()]):
        raise SourceError(
            f"{path}: expected {count} files by its name, {abbreviate(missing)} not found: "
            "download all into the same directory"
        )
    first = _open_file(files[0])
    if (declared := first.metadata.get("split.count", 1)) != count:
        raise CheckpointError(
            f"{files[0]}: expected {declared!r:.80} files by its metadata, got {count} by its "
            "name: rename the files, such as model-00001-of-00003.gguf"
        )
    tensors, parts = dict(first.tensors), list(first.parts)
    for number, file in enumerate(files[1:], start=1):
        part = _open_file(file)
        order = (part.metadata.get("split.no"), part.metadata.get("split.count"))
        if order != (number, count) or tensors.keys() & part.tensors.keys():
            raise CheckpointError(
                f"{file}: expected part {number} of {count} (counted from 0) by its name, got "
                f"{order!r:.80} by its metadata; it was renamed, or is from another model: "
                "download all parts again"
            )
        parts += part.parts
        tensors |= {name: info._replace(part=number) for name, info in part.tensors.items()}
    return Gguf(files[0], first.metadata, tensors, tuple(parts))


def read_tensor(gguf: Gguf, name: str, dtype: type[np.floating] = np.float32) -> np.ndarray:
    """Return tensor `name` dequantized to `dtype`, converted in chunks of rows.

    Raises:
        CheckpointError: the file has no tensor of this name.
    """
    from gguf import GGMLQuantizationType
    from gguf.quants import dequantize

    info = gguf.tensors.get(name)
    if info is None:
        raise CheckpointError(f"{gguf.path}: tensor {name!r} not found; the file is incomplete")
    kind, width = GGMLQuantizationType[info.type], info.shape[-1]
    stored = np.frombuffer(gguf.parts[info.part], np.uint8, info.nbytes, info.offset)
    rows = stored.reshape(math.prod(info.shape[:-1]), -1)
    values = np.empty((len(rows), width), dtype)

    def convert(start: int) -> None:
        # scales of a corrupt file may be infinite; the caller checks the values
        with np.errstate(all="ignore"):
            values[start : start + step] = dequantize(rows[start : start + step], kind)

    step = max(1, CHUNK_ENTRIES // width)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(convert, range(0, len(rows), step)))
    return values.reshape(info.shape)


@cache
def block_types() -> dict[int, tuple[str, int, int]]:
    """Return the types that the gguf package dequantizes: number -> name, entries, bytes."""
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
    from gguf.quants import dequantize

    types = {}
    for kind in GGMLQuantizationType:
        block_size, nbytes = GGML_QUANT_SIZES[kind]
        try:
            dequantize(np.zeros((1, nbytes), np.uint8), kind)
        except NotImplementedError:
            continue
        types[kind.value] = (kind.name, block_size, nbytes)
    return types


def _open_file(path: Path) -> Gguf:
    data = _map(path)
    cursor = _Cursor(path, data)
    cursor.advance(4, "the magic number")
    if data[:4] != b"GGUF":
        raise CheckpointError(f"{path}: not a GGUF file: expected b'GGUF' first, got {data[:4]!r}")
    version = cursor.scalar("<u4", "the version")
    if version not in (2, 3):
        raise cursor.error(f"expected GGUF version 2 or 3 (little-endian), got {version}")
    tensor_count = cursor.count(MIN_TENSOR_INFO_BYTES, "the number of tensors")
    entry_count = cursor.count(MIN_METADATA_BYTES, "the number of metadata entries")
    metadata = _read_metadata(cursor, entry_count)
    alignment = metadata.get("general.alignment", DEFAULT_ALIGNMENT)
    return Gguf(path, metadata, _read_tensor_infos(cursor, tensor_count, alignment), (data,))


class _Cursor:
    """A position in the header; reads are checked against the size of the file."""

    def __init__(self, path: Path, data: mmap.mmap):
        self.path = path
        self.data = data
        self.position = 0
        self.end = min(len(data), MAX_HEADER_BYTES)

    def error(self, problem: str) -> CheckpointError:
        return CheckpointError(f"{self.path}: {problem}; truncated or corrupt, download it again")

    def advance(self, nbytes: int, what: str) -> int:
        """Skip the next `nbytes` and return their offset."""
        start = self.position
        if nbytes > self.end - start:
            raise self.error(f"{what}: expected {nbytes} bytes, {self.end - start} remain")
        self.position = start + nbytes
        return start

    def scalar(self, dtype: str | np.dtype, what: str) -> Any:
        dtype = np.dtype(dtype)
        return np.frombuffer(self.data, dtype, 1, self.advance(dtype.itemsize, what))[0].item()

    def count(self, item_bytes: int, what: str) -> int:
        """Read a count of items of at least `item_bytes` each, checked against the file size."""
        count = int.from_bytes(self.data[self.advance(8, what) : self.position], "little")
        if count * item_bytes > self.end - self.position:
            raise self.error(f"{what} is {count}, but {self.end - self.position} bytes remain")
        return count

    def string(self, what: str) -> str:
        start = self.advance(self.count(1, what), what)
        return self.data[start : self.position].decode("utf-8", "replace")


def _map(path: Path) -> mmap.mmap:
    try:
        with path.open("rb") as file:
            if file.seek(0, 2) == 0:
                raise CheckpointError(f"{path}: the file is empty; download it again")
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except OSError as exc:
        raise SourceError(f"{path}: cannot be read ({exc.strerror}); check the path") from exc


def _read_metadata(cursor: _Cursor, count: int) -> dict[str, Any]:
    metadata: dict[str, Any] = {}
    for number in range(count):
        key = cursor.string(f"the key of metadata entry {number}")
        what = f"metadata {key!r:.80}"
        if key in metadata:
            raise cursor.error(f"{what} occurs twice")
        metadata[key] = _read_value(cursor, cursor.scalar("<u4", what), what)
    return metadata


def _read_value(cursor: _Cursor, kind: int, what: str, depth: int = 0) -> Any:
    if kind in SCALARS:
        return cursor.scalar(SCALARS[kind], what)
    if kind == STRING:
        return cursor.string(what)
    if kind != ARRAY:
        raise cursor.error(f"{what}: expected a value type from 0 to 12, got {kind}")
    if depth == MAX_ARRAY_DEPTH:
        raise cursor.error(f"{what} nests arrays more than {depth} deep")
    kind = cursor.scalar("<u4", what)
    if kind in SCALARS:
        dtype = SCALARS[kind]
        count = cursor.count(dtype.itemsize, what)
        start = cursor.advance(count * dtype.itemsize, what)
        return np.frombuffer(cursor.data, dtype, count, start).tolist()
    # a string has at least its length, an array its element type and count
    count = cursor.count(8 if kind == STRING else 12, what)
    return [_read_value(cursor, kind, what, depth + 1) for _ in range(count)]


def _read_tensor_infos(cursor: _Cursor, count: int, alignment: Any) -> dict[str, TensorInfo]:
    if type(alignment) is not int or alignment <= 0 or alignment & (alignment - 1):
        raise cursor.error(f"general.alignment: expected a power of two, got {alignment!r:.80}")
    tensors: dict[str, TensorInfo] = {}
    for number in range(count):
        info = _read_tensor_info(cursor, number)
        if info.name in tensors:
            raise cursor.error(f"tensor {info.name!r:.80} occurs twice")
        tensors[info.name] = info
    base = -(-cursor.position // alignment) * alignment
    end = 0
    for name, info in sorted(tensors.items(), key=lambda item: item[1].offset):
        if info.offset % alignment or info.offset < end:
            expected = f"expected an offset of at least {end}, a multiple of {alignment}"
            raise cursor.error(f"tensor {name!r:.80}: {expected}, got {info.offset}")
        end = info.offset + info.nbytes
        if base + end > len(cursor.data):
            raise cursor.error(
                f"tensor {name!r:.80} ends at byte {base + end} of {len(cursor.data)}"
            )
    return {name: info._replace(offset=base + info.offset) for name, info in tensors.items()}


def _read_tensor_info(cursor: _Cursor, number: int) -> TensorInfo:
    name = cursor.string(f"the name of tensor {number}")
    what = f"tensor {name!r:.80}"
    rank = cursor.scalar("<u4", what)
    if not 1 <= rank <= MAX_RANK:
        raise cursor.error(f"{what}: expected 1 to {MAX_RANK} dimensions, got {rank}")
    shape = tuple(cursor.scalar("<u8", what) for _ in range(rank))[::-1]
    type_number = cursor.scalar("<u4", what)
    if type_number not in block_types():
        known = " or ".join(name for name, _, _ in block_types().values())
        raise CheckpointError(
            f"{cursor.path}: {what}: expected ggml type {known}, got {type_number}: use a file of "
            "another type, or a newer gguf package (pip install -U gguf)"
        )
    type_name, block_size, block_bytes = block_types()[type_number]
    if 0 in shape or shape[-1] % block_size:
        raise cursor.error(
            f"{what}: expected rows of a multiple of {block_size} entries, got {shape}"
        )
    nbytes = math.prod(shape) // block_size * block_bytes
    return TensorInfo(name, shape, type_name, cursor.scalar("<u8", what), nbytes)
