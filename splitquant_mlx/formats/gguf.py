"""Read GGUF files without trusting them, with numpy and a memory map alone.

A little-endian GGUF file of version 2 or 3 is, in this order (ggml, docs/gguf.md),

    header        "GGUF", version u32, tensor count u64, metadata count u64
    metadata      key, value type u32, value
    tensor infos  name, rank u32, dimensions u64 (fastest first), type u32, offset u64
    data          at the next multiple of `general.alignment`; offsets count from here

A string is a u64 length and its bytes; an array is an element type u32, a u64 count and the
elements. Each declared length is compared with the bytes that are left before anything is
allocated or looped over, so a corrupt file costs an error, never memory or time.
"""

import math
import mmap
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from splitquant_mlx.errors import CheckpointError, SourceError

# The largest vocabularies in use need some 20 MB of metadata.
MAX_HEADER_BYTES = 1 << 26
MAX_RANK = 4
MAX_ARRAY_DEPTH = 4
DEFAULT_ALIGNMENT = 32

STRING, ARRAY = 8, 9
SCALAR_KINDS = (0, 1, 2, 3, 4, 5, 6, 7, 10, 11, 12)
SCALAR_DTYPES = map(np.dtype, "u1 i1 <u2 <i2 <u4 <i4 <f4 ? <u8 <i8 <f8".split())
SCALARS = dict(zip(SCALAR_KINDS, SCALAR_DTYPES, strict=True))

# The fewest bytes an entry can take: the empty name's length, then the fields it cannot go without.
MIN_METADATA_BYTES = 8 + 4 + 1
MIN_TENSOR_INFO_BYTES = 8 + 4 + 8 + 4 + 8


class TensorInfo(NamedTuple):
    """Describe one tensor: row-major shape (out, in), ggml type, place in the file in bytes."""

    name: str
    shape: tuple[int, ...]
    type: str
    offset: int
    nbytes: int


@dataclass(frozen=True)
class Gguf:
    """Hold an open GGUF file: its metadata, its tensors' places and the mapped bytes."""

    path: Path
    metadata: dict[str, Any]
    tensors: dict[str, TensorInfo]
    data: mmap.mmap = field(repr=False)


def open_gguf(path: Path) -> Gguf:
    """Map `path` and read all of it but the tensors' values.

    Raises:
        SourceError: the file cannot be opened.
        CheckpointError: it is no GGUF file, truncated, corrupt, or of an unsupported tensor type.
    """
    data = _map(path)
    cursor = _Cursor(path, data)
    cursor.claim(4, "the magic number")
    if data[:4] != b"GGUF":
        raise CheckpointError(f"{path}: starts with {data[:4]!r}, wanted b'GGUF'; not a GGUF file")
    version = cursor.scalar("<u4", "the version")
    if version not in (2, 3):
        raise cursor.error(f"GGUF version {version}, wanted 2 or 3 (little-endian)")
    tensor_count = cursor.count(MIN_TENSOR_INFO_BYTES, "the number of tensors")
    entry_count = cursor.count(MIN_METADATA_BYTES, "the number of metadata entries")
    metadata = _read_metadata(cursor, entry_count)
    alignment = metadata.get("general.alignment", DEFAULT_ALIGNMENT)
    return Gguf(path, metadata, _read_tensor_infos(cursor, tensor_count, alignment), data)


def read_tensor(gguf: Gguf, name: str) -> np.ndarray:
    """Return tensor `name`: float16 if it is stored so, else dequantized to float32.

    Raises:
        CheckpointError: the file has no tensor of this name.
    """
    info = gguf.tensors.get(name)
    if info is None:
        raise CheckpointError(f"{gguf.path}: no tensor {name!r}; the file is incomplete")
    _, dtype, decode = TYPES[info.type]
    blocks = np.frombuffer(gguf.data, dtype, info.nbytes // dtype.itemsize, info.offset)
    # Scales of a corrupt file may be infinite; whoever casts the values checks them.
    with np.errstate(all="ignore"):
        return decode(blocks).reshape(info.shape)


class _Cursor:
    """Walk the header; no read goes past what the file holds."""

    def __init__(self, path: Path, data: mmap.mmap):
        self.path = path
        self.data = data
        self.position = 0
        self.end = min(len(data), MAX_HEADER_BYTES)

    def error(self, problem: str) -> CheckpointError:
        return CheckpointError(f"{self.path}: {problem}; truncated or corrupt, fetch it again")

    def claim(self, nbytes: int, what: str) -> int:
        """Move past the next `nbytes` and return where they start."""
        start = self.position
        if nbytes > self.end - start:
            raise self.error(f"{what} takes {nbytes} bytes, {self.end - start} are left")
        self.position = start + nbytes
        return start

    def scalar(self, dtype: str | np.dtype, what: str) -> Any:
        dtype = np.dtype(dtype)
        return np.frombuffer(self.data, dtype, 1, self.claim(dtype.itemsize, what))[0].item()

    def count(self, item_bytes: int, what: str) -> int:
        """Read how many items of at least `item_bytes` each come next, if there is room."""
        count = int.from_bytes(self.data[self.claim(8, what) : self.position], "little")
        if count * item_bytes > self.end - self.position:
            raise self.error(f"{what} counts {count}, {self.end - self.position} bytes are left")
        return count

    def string(self, what: str) -> str:
        start = self.claim(self.count(1, what), what)
        return self.data[start : self.position].decode("utf-8", "replace")


def _map(path: Path) -> mmap.mmap:
    try:
        with path.open("rb") as file:
            if file.seek(0, 2) == 0:
                raise CheckpointError(f"{path}: the file is empty; fetch it again")
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
        raise cursor.error(f"{what} has value type {kind}, wanted 0 to 12")
    if depth == MAX_ARRAY_DEPTH:
        raise cursor.error(f"{what} nests arrays more than {depth} deep")
    kind = cursor.scalar("<u4", what)
    if kind in SCALARS:
        dtype = SCALARS[kind]
        count = cursor.count(dtype.itemsize, what)
        start = cursor.claim(count * dtype.itemsize, what)
        return np.frombuffer(cursor.data, dtype, count, start).tolist()
    # A string is at least its length; an array at least its element type and its count.
    count = cursor.count(8 if kind == STRING else 12, what)
    return [_read_value(cursor, kind, what, depth + 1) for _ in range(count)]


def _read_tensor_infos(cursor: _Cursor, count: int, alignment: Any) -> dict[str, TensorInfo]:
    if type(alignment) is not int or alignment <= 0 or alignment & (alignment - 1):
        raise cursor.error(f"general.alignment is {alignment!r:.80}, wanted a power of two")
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
            wanted = f"wanted a multiple of {alignment} from {end} on"
            raise cursor.error(f"tensor {name!r:.80} has offset {info.offset}, {wanted}")
        end = info.offset + info.nbytes
        if base + end > len(cursor.data):
            raise cursor.error(f"tensor {name!r:.80} ends at {base + end} of {len(cursor.data)}")
    return {name: info._replace(offset=base + info.offset) for name, info in tensors.items()}


def _read_tensor_info(cursor: _Cursor, number: int) -> TensorInfo:
    name = cursor.string(f"the name of tensor {number}")
    what = f"tensor {name!r:.80}"
    rank = cursor.scalar("<u4", what)
    if not 1 <= rank <= MAX_RANK:
        raise cursor.error(f"{what} has {rank} dimensions, wanted 1 to {MAX_RANK}")
    shape = tuple(cursor.scalar("<u8", what) for _ in range(rank))[::-1]
    type_number = cursor.scalar("<u4", what)
    type_name = TYPE_NAMES.get(type_number, f"ggml type {type_number}")
    if type_name not in TYPES:
        wanted = f"one of {', '.join(TYPES)}"
        raise CheckpointError(f"{cursor.path}: {what} is {type_name}; convert it to {wanted}")
    block_size, dtype, _ = TYPES[type_name]
    if 0 in shape or shape[-1] % block_size:
        raise cursor.error(f"{what} has shape {shape}, wanted rows of whole {block_size}s")
    nbytes = math.prod(shape) // block_size * dtype.itemsize
    return TensorInfo(name, shape, type_name, cursor.scalar("<u8", what), nbytes)


class _Type(NamedTuple):
    block_size: int
    dtype: np.dtype
    decode: Callable[[np.ndarray], np.ndarray]


def _scales(blocks: np.ndarray, name: str = "scale") -> np.ndarray:
    return blocks[name].astype(np.float32)[:, None]


def _nibbles(blocks: np.ndarray) -> np.ndarray:
    """Split bytes (blocks, 16) into codes (blocks, 32): the low halves come first."""
    codes = blocks["codes"]
    return np.concatenate([codes & 15, codes >> 4], axis=1).astype(np.float32)


Q8_0 = np.dtype([("scale", "<f2"), ("codes", "i1", 32)])
Q4_0 = np.dtype([("scale", "<f2"), ("codes", "u1", 16)])
Q4_1 = np.dtype([("scale", "<f2"), ("bias", "<f2"), ("codes", "u1", 16)])
TYPES = {
    "F32": _Type(1, np.dtype("<f4"), lambda values: values),
    "F16": _Type(1, np.dtype("<f2"), lambda values: values),
    "BF16": _Type(1, np.dtype("<u2"), lambda bits: (bits.astype("<u4") << 16).view("<f4")),
    "Q8_0": _Type(32, Q8_0, lambda blocks: _scales(blocks) * blocks["codes"]),
    "Q4_0": _Type(32, Q4_0, lambda blocks: _scales(blocks) * (_nibbles(blocks) - 8)),
    "Q4_1": _Type(32, Q4_1, lambda b: _scales(b) * _nibbles(b) + _scales(b, "bias")),
}
TYPE_NAMES = {
    **{0: "F32", 1: "F16", 2: "Q4_0", 3: "Q4_1", 6: "Q5_0", 7: "Q5_1", 8: "Q8_0", 10: "Q2_K"},
    **{11: "Q3_K", 12: "Q4_K", 13: "Q5_K", 14: "Q6_K", 15: "Q8_K", 30: "BF16"},
}
