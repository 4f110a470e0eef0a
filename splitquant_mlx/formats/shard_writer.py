"""Write safetensors shards one tensor at a time, with few tensors in memory.

The format is an 8-byte little-endian header length, a JSON header, then the tensors' bytes. The
header lists every offset, so it is written last, into space reserved at the start of the file and
padded with spaces, as the format allows (huggingface/safetensors, "Format"). Shards are hashed
while they are written, after the expected header, and read again only if their header differs.
"""

import hashlib
import json
import math
import os
import re
import struct
from collections import deque
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import mlx.core as mx
import numpy as np

from splitquant_mlx.errors import CheckpointError
from splitquant_mlx.formats.head_file import INDEX
from splitquant_mlx.formats.safetensors import read_header
from splitquant_mlx.quantization.host import host_values
from splitquant_mlx.runtime.disk import remove, sha256, sync_descriptor

MAX_SHARD_BYTES = 5 * 10**9
FLUSH_BYTES = 1 << 27  # written between two calls of fsync
CHUNK_BYTES = 1 << 20
QUEUED_BYTES = 1 << 26  # that may be queued after the tensor that is being written
FINAL_NAME = re.compile(r"model(?:-(\d{5,})-of-\d{5,})?\.safetensors")

SAFETENSORS_NAMES = {
    mx.bool_: "BOOL",
    mx.uint8: "U8",
    mx.int8: "I8",
    mx.uint16: "U16",
    mx.int16: "I16",
    mx.uint32: "U32",
    mx.int32: "I32",
    mx.uint64: "U64",
    mx.int64: "I64",
    mx.float16: "F16",
    mx.bfloat16: "BF16",
    mx.float32: "F32",
}


METADATA: dict[str, Any] = {"__metadata__": {"format": "mlx"}}


def _entry(dtype: mx.Dtype, shape: Sequence[int], offset: int) -> dict[str, Any]:
    """Return the entry of a tensor in a header; its data starts at `offset`."""
    return {
        "dtype": SAFETENSORS_NAMES[dtype],
        "shape": list(shape),
        "data_offsets": [offset, offset + dtype.size * math.prod(shape)],
    }


def _ordered_header(header: dict[str, Any]) -> dict[str, Any]:
    """Return the header of an unfinished shard in file order; a journal sorts its keys."""
    try:
        entries = {
            name: {key: header[name][key] for key in ("dtype", "shape", "data_offsets")}
            for name in header.keys() - METADATA.keys()
        }
        order = sorted(entries, key=lambda name: (entries[name]["data_offsets"], name))
    except (KeyError, TypeError):  # not written by this program: no tensor is named ""
        return {**METADATA, "": None}
    return METADATA | {name: entries[name] for name in order}


def _update(digest: Any, file: BinaryIO, nbytes: int) -> None:
    """Update a digest with the next `nbytes` of a file."""
    while nbytes > 0 and (chunk := file.read(min(nbytes, CHUNK_BYTES))):
        digest.update(chunk)
        nbytes -= len(chunk)


def header_room(names: Iterable[str]) -> int:
    """Return the bytes to reserve for the header of a shard of any of these tensors."""
    room = 64 + sum(len(json.dumps(name)) + 160 for name in names)
    return room + -room % 8


def most_header_bytes(names: Iterable[str], total_bytes: float, max_shard_bytes: int) -> int:
    """Return the maximum size of the headers of all shards, for `total_bytes` of tensors.

    Two consecutive shards hold more than `max_shard_bytes`, so there are at most twice as many
    shards as full ones.
    """
    shards = 1 if total_bytes <= max_shard_bytes else 2 * math.ceil(total_bytes / max_shard_bytes)
    return shards * (8 + header_room(names))


def tensor_bytes(tensor: mx.array) -> memoryview:
    """Return the bytes of a tensor in row-major order."""
    return np.ascontiguousarray(host_values(tensor)).data


@dataclass(frozen=True, kw_only=True)
class UnfinishedShard:
    """State of a shard that is still being written.

    Attributes:
        header: safetensors header of the tensors so far.
        nbytes: size of their data, bytes.
        sha256: SHA-256 of the expected header of the whole shard and their data.
    """

    header: dict[str, Any]
    nbytes: int
    sha256: str


class ShardWriter:
    """Append tensors to `model-0000x-of-0000n.safetensors` files and their index.

    A context manager: leaving it without `close` leaves unfinished files.

    Args:
        directory: an existing directory; the files are complete once `close` returns.
        expected: dtype and shape of each tensor that may be added, in the order in which they will
            probably be added: a shard that differs is hashed after it is written.
        max_shard_bytes: maximum size of a shard with more than one tensor.

    Attributes:
        missing: names of the tensors not yet written.
        total_bytes: size of the tensors written.
        on_finished: called with the number and SHA-256 of each shard after it is synced to disk;
            shards are hashed only if it is set before the first tensor is added.
        hashes: file name -> SHA-256, after `close`.
    """

    def __init__(
        self,
        directory: Path,
        expected: Mapping[str, tuple[mx.Dtype, tuple[int, ...]]],
        max_shard_bytes: int = MAX_SHARD_BYTES,
    ):
        self.directory = directory
        self.max_shard_bytes = max_shard_bytes
        self.total_bytes = 0
        self.on_finished: Callable[[int, str], None] | None = None
        self.hashes: dict[str, str] = {}
        self.missing = set(expected)
        self._resumed: set[str] = set()
        self._digests: list[str] = []
        self._room = header_room(expected)
        self._shards: list[Path] = []
        self._weight_map: dict[str, int] = {}
        self._file: BinaryIO | None = None
        self._writer = ThreadPoolExecutor(1)
        self._writes: deque[tuple[Future[None], int]] = deque()
        self._flusher = ThreadPoolExecutor(1)
        self._flush: Future[None] | None = None
        self._flushed = 0
        self._header: dict[str, Any] = {}
        self._offset = 0
        self._expected = expected
        self._expected_header = b""
        self._digest = hashlib.sha256()

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(self, *exc: object) -> None:
        self._writer.shutdown()
        self._flusher.shutdown()
        if self._file is not None:
            self._file.close()

    def resume(self, digests: Sequence[str], unfinished: UnfinishedShard | None = None) -> int:
        """Continue after the first shards of an interrupted writer; remove all other files.

        `add` ignores the tensors of these shards.

        Args:
            digests: SHA-256 of the finished shards, in order. The first shard that is missing or
                differs, and all after it, are written again.
            unfinished: the shard after those.

        Returns:
            Number of shards that are reused, including the unfinished one.
        """
        self._undo_renaming()
        for digest in digests:
            path = self._path(len(self._shards) + 1)
            if path.is_symlink() or not path.is_file() or sha256(path) != digest:
                break
            try:
                headers = read_header(path)
            except CheckpointError:
                break
            if not headers.keys() <= self.missing:
                break
            self._digests.append(digest)
            self._reuse(path, headers, sum(header.nbytes for header in headers.values()))
        if unfinished and len(self._shards) == len(digests):
            self._reopen(unfinished)
        for path in self.directory.iterdir():
            if path not in self._shards:
                remove(path)
        return len(self._shards)

    def _reopen(self, shard: UnfinishedShard) -> None:
        """Continue an unfinished shard if its file is unchanged."""
        path = self._path(len(self._shards) + 1)
        header = _ordered_header(shard.header)
        names = header.keys() - {"__metadata__"}
        if path.is_symlink() or not path.is_file() or not names <= self.missing:
            return
        self._start_digest()
        start = len(self._expected_header)
        file = path.open("r+b")
        file.seek(start)
        _update(self._digest, file, shard.nbytes)
        if self._digest.hexdigest() != shard.sha256:
            file.close()
            return
        file.truncate(start + shard.nbytes)
        self._file, self._header = file, header
        self._offset, self._flushed = shard.nbytes, start + shard.nbytes
        self._reuse(path, names, shard.nbytes)

    def _reuse(self, path: Path, names: Collection[str], nbytes: int) -> None:
        """Count a shard that is on disk as written, or partly written."""
        self._weight_map.update(dict.fromkeys(names, len(self._shards)))
        self._shards.append(path)
        self._resumed.update(names)
        self.missing.difference_update(names)
        self.total_bytes += nbytes

    @property
    def number(self) -> int:
        """Return the number of the current shard, from 1."""
        return len(self._shards)

    def save_point(self) -> UnfinishedShard | None:
        """Sync all added tensors to disk and return the state from which `resume` continues."""
        if self._file is None:
            return None
        self._await_writes()
        self._await_flush()
        self._file.flush()
        sync_descriptor(self._file.fileno())
        return UnfinishedShard(
            header=dict(self._header), nbytes=self._offset, sha256=self._digest.hexdigest()
        )

    def _undo_renaming(self) -> None:
        """Undo the renaming of `close`."""
        for path in sorted(self.directory.glob("model*.safetensors")):
            if numbered := FINAL_NAME.fullmatch(path.name):
                path.rename(self._path(int(numbered[1] or 1)))

    def add(self, name: str, tensor: mx.array) -> None:
        """Queue `tensor` for writing; blocks while QUEUED_BYTES or more are queued.

        Raises:
            ValueError: when `name` is not expected, or was added before.
            OSError: when a tensor added before cannot be written.
        """
        if name in self._resumed:
            return
        if name not in self.missing:
            raise ValueError(f"tensor {name!r} is not expected, or was added before")
        if self._file is None or (
            self._offset and self._offset + tensor.nbytes > self.max_shard_bytes
        ):
            self._finish_shard()
            self._start_shard()
        self.missing.discard(name)
        file = self._file
        assert file is not None
        content = tensor_bytes(tensor)
        self._writes.append((self._writer.submit(self._append, file, content), tensor.nbytes))
        self._await_writes(QUEUED_BYTES)
        end = self._offset + tensor.nbytes
        self._header[name] = _entry(tensor.dtype, tensor.shape, self._offset)
        self._offset = end
        self.total_bytes += tensor.nbytes
        self._weight_map[name] = len(self._shards) - 1

    def _append(self, file: BinaryIO, content: memoryview) -> None:
        """Write and hash, and sync to disk in another thread after every FLUSH_BYTES."""
        file.write(content)
        if self.on_finished:
            self._digest.update(content)
        written = file.tell()
        if written - self._flushed >= FLUSH_BYTES and (not self._flush or self._flush.done()):
            self._await_flush()
            self._flushed = written
            file.flush()
            self._flush = self._flusher.submit(os.fsync, file.fileno())

    def _await_writes(self, queued_bytes: int = -1) -> None:
        """Wait until at most `queued_bytes` are queued after the current write; -1: for all."""
        writes = self._writes
        while writes and (
            writes[0][0].done() or sum(nbytes for _, nbytes in writes) - writes[0][1] > queued_bytes
        ):
            writes.popleft()[0].result()

    def _await_flush(self) -> None:
        if self._flush is not None:
            self._flush.result()
            self._flush = None

    def close(self) -> dict[str, str]:
        """Finish the last shard, rename the files, write the index; return tensor name -> file."""
        self._finish_shard()
        count = len(self._shards)
        final = []
        for number, path in enumerate(self._shards, start=1):
            stem = f"model-{number:05d}-of-{count:05d}" if count > 1 else "model"
            final.append(path.rename(self.directory / f"{stem}.safetensors").name)
        self.hashes = dict(zip(final, self._digests, strict=False))
        weight_map = {name: final[shard] for name, shard in sorted(self._weight_map.items())}
        index = {"metadata": {"total_size": self.total_bytes}, "weight_map": weight_map}
        (self.directory / INDEX).write_text(json.dumps(index, indent=2), encoding="utf-8")
        return weight_map

    def _start_shard(self) -> None:
        path = self._path(len(self._shards) + 1)
        self._start_digest()
        self._shards.append(path)
        self._file = path.open("wb")
        self._file.seek(8 + self._room)
        self._header = dict(METADATA)
        self._offset = self._flushed = 0

    def _start_digest(self) -> None:
        """Start the hash of a shard with the header that it is expected to have."""
        header, offset = dict(METADATA), 0
        for name, (dtype, shape) in self._expected.items():
            if name in self.missing:
                end = offset + dtype.size * math.prod(shape)
                if offset and end > self.max_shard_bytes:
                    break
                header[name] = _entry(dtype, shape, offset)
                offset = end
        self._expected_header = self._encoded(header)
        self._digest = hashlib.sha256(self._expected_header)

    def _encoded(self, header: dict[str, Any]) -> bytes:
        """Return a header with its length, as it is stored."""
        text = json.dumps(header, separators=(",", ":")).encode()
        return struct.pack("<Q", self._room) + text.ljust(self._room)

    def _finish_shard(self) -> None:
        if self._file is None:
            return
        header = self._encoded(self._header)
        is_hashed = header == self._expected_header
        digest = None
        with self._file as file:
            self._await_writes()
            self._await_flush()
            file.seek(0)
            file.write(header)
            file.flush()
            if self.on_finished and not is_hashed:  # during fsync
                digest = self._flusher.submit(sha256, self._shards[-1])
            sync_descriptor(file.fileno())
        self._file = None
        if self.on_finished:
            self._digests.append(digest.result() if digest else self._digest.hexdigest())
            self.on_finished(len(self._shards), self._digests[-1])

    def _path(self, number: int) -> Path:
        return self.directory / f"shard-{number:05d}.partial"
