"""Record the progress of a conversion, and resume an interrupted one.

A journal next to the shards has one record per finished shard, and one for the unfinished shard,
appended every `SAVE_S` seconds. Only a conversion of the same source with the same settings and
versions resumes it. A shard is reused only if its hash equals the recorded one.
"""

import dataclasses
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import field
from pathlib import Path
from typing import Any

from splitquant_mlx.conversion.plan import LayerPlan
from splitquant_mlx.conversion.quantizers import LEAVES
from splitquant_mlx.errors import TargetError
from splitquant_mlx.formats.manifest import LayerRecord
from splitquant_mlx.formats.shard_writer import ShardWriter, UnfinishedShard
from splitquant_mlx.runtime.journal import Journal
from splitquant_mlx.settings import load_json, record

SAVE_S = 20.0
STAGES = ("read", "cluster", "quantize", "write")


@record
class SavedShard:
    """Record of a finished or unfinished shard on disk.

    Attributes:
        number: number of the shard, from 1.
        sha256: hash of its file; see `UnfinishedShard` if it is unfinished.
        layers: records of the layers completed by this shard.
        seconds: time of each stage so far, and wall time in "total", s.
        header: tensors written so far if it is unfinished, else empty.
        nbytes: size of their data.
    """

    number: int
    sha256: str
    layers: tuple[LayerRecord, ...]
    seconds: dict[str, float]
    header: dict[str, Any] = field(default_factory=dict)
    nbytes: int = 0


def open_journal(path: Path, key: Mapping[str, Any]) -> Journal:
    """Open a conversion's journal, replacing an invalid file. Raises TargetError."""
    try:
        return Journal(path, key)
    except TargetError:
        path.unlink(missing_ok=True)
        return Journal(path, key)


class ConversionState:
    """Progress of a conversion, initialized from the journal of an interrupted one.

    Attributes:
        records: records of the finished layers, by path, in model order.
        seconds: time of each stage, s.
    """

    def __init__(self, journal: Journal, writer: ShardWriter) -> None:
        self.records: dict[str, LayerRecord] = {}
        self.seconds: dict[str, float] = dict.fromkeys(STAGES, 0.0)
        self._journal = journal
        self._writer = writer
        self._earlier_s = 0.0
        self._journaled = 0  # records of finished shards
        shards = _saved_shards(journal.done)
        last = shards[-1] if shards and shards[-1].header else None
        unfinished = last and UnfinishedShard(
            header=last.header, nbytes=last.nbytes, sha256=last.sha256
        )
        digests = [shard.sha256 for shard in shards if not shard.header]
        resumed = writer.resume(digests, unfinished)
        for shard in shards[:resumed]:
            self.records.update({layer.path: layer for layer in shard.layers})
            self.seconds.update(shard.seconds)
            self._earlier_s = self.seconds.pop("total", 0.0)
            if not shard.header:
                self._journaled = len(self.records)
        self._started = self._saved = time.perf_counter()
        writer.on_finished = self._record_finished

    def add(self, record: LayerRecord) -> None:
        """Add a layer whose tensors were all passed to the writer."""
        self.records[record.path] = record
        if time.perf_counter() - self._saved > SAVE_S:
            if shard := self._writer.save_point():
                header = {"header": shard.header, "nbytes": shard.nbytes}
                self._append(self._writer.number, shard.sha256, **header)
            self._saved = time.perf_counter()

    def is_done(self, name: str, layer: LayerPlan | None) -> bool:
        """Return whether all tensors of parameter `name`, the weight of `layer`, are written."""
        if layer is None:
            return name not in self._writer.missing
        names = {f"{layer.path}.{leaf}" for leaf in LEAVES}
        return layer.path in self.records and not names & self._writer.missing

    def seconds_since(self, started: float) -> dict[str, float]:
        """Return the seconds of each stage and in total; this process started at `started`."""
        return {**self.seconds, "total": self._earlier_s + time.perf_counter() - started}

    def _record_finished(self, number: int, sha256: str) -> None:
        self._append(number, sha256)
        self._journaled = len(self.records)

    def _append(self, number: int, sha256: str, **unfinished: Any) -> None:
        shard = SavedShard(
            number=number,
            sha256=sha256,
            layers=tuple(self.records.values())[self._journaled :],
            seconds=self.seconds_since(self._started),
            **unfinished,
        )
        self._journal.append(dataclasses.asdict(shard))


@contextmanager
def timed(seconds: dict[str, float], stage: str) -> Iterator[None]:
    """Add the time of the block to `seconds[stage]`."""
    started = time.perf_counter()
    yield
    seconds[stage] = seconds.get(stage, 0.0) + time.perf_counter() - started


def _saved_shards(records: Iterable[Mapping[str, Any]]) -> list[SavedShard]:
    """Return the shards of a journal in order, up to the first missing or invalid record.

    The last record of a shard counts. No shard follows an unfinished one.
    """
    by_number: dict[int, SavedShard] = {}
    for entry in records:
        try:
            shard = load_json(SavedShard, entry)
        except ValueError:
            break
        by_number[shard.number] = shard
    shards = []
    while len(shards) + 1 in by_number and not (shards and shards[-1].header):
        shards.append(by_number[len(shards) + 1])
    return shards
