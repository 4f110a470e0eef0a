"""Convert a checkpoint's parameters as planned, and write them.

Reading, converting and writing overlap. Only a few weights are in memory at a time, so its peak
depends on the largest tensors and the number of cores, not on the number of layers.
"""

import math
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager, nullcontext
from functools import cache, partial
from typing import Any
from weakref import WeakSet

import mlx.core as mx

from splitquant_mlx.calibration.statistics import InputStatistics, Mean
from splitquant_mlx.conversion.plan import LayerPlan, Plan
from splitquant_mlx.conversion.quantizers import is_large_stack, uses_cpu
from splitquant_mlx.conversion.resume import ConversionState
from splitquant_mlx.conversion.weight import Converted, convert_weight, require_finite
from splitquant_mlx.errors import CheckpointError
from splitquant_mlx.formats.manifest import LayerRecord
from splitquant_mlx.formats.shard_writer import ShardWriter
from splitquant_mlx.models.architecture import parameters
from splitquant_mlx.models.checkpoint import FLOATS, Checkpoint, check_unchanged
from splitquant_mlx.progress import Progress
from splitquant_mlx.runtime.blas import one_thread

FLOAT_TYPES = tuple(FLOATS.values())
SIDE_BY_SIDE_BYTES = 2 << 30  # of the statistics of a block that waits for the next one's


class Converter:
    """Convert every parameter of the model as planned, and write it.

    This thread reads, calibrates and writes. Threads of a pool, one per core, convert weights
    meanwhile: on the CPU all of them, so that one block is calibrated while the one before it is
    quantized; beside a GPU those whose quantizer computes with numpy, while the GPU runs the next
    block. What a GPU quantizes it does in this thread, one weight at a time. At most one block's
    weights wait, without calibration two more large ones than are being worked on. A block whose
    statistics are large, such as the Hessians of a hundred experts, is finished before the next.

    What the conversion's state holds already is not done again.
    """

    def __init__(
        self, checkpoint: Checkpoint, plan: Plan, writer: ShardWriter, state: ConversionState
    ):
        self.checkpoint = checkpoint
        self.plan = plan
        self.writer = writer
        self.state = state
        self._threads = os.cpu_count() or 1
        self._limit = 1  # large weights that may wait
        self._rare: dict[str, list[int]] = {}

    def run(
        self, progress: Progress, calibration: Iterable[InputStatistics] | None = None
    ) -> list[LayerRecord]:
        """Write all tensors, the layers of one block after the other.

        Args:
            progress: progress reporter.
            calibration: statistics of the layers' inputs; None where no quantizer needs any.

        Returns:
            A record of each planned layer.
        """
        splits = any(layer.action == "split" for layer in self.plan.layers.values())
        label = "Splitting and quantizing" if splits else "Quantizing"
        on_cpu = mx.default_device() == mx.cpu
        side_by_side = on_cpu or any(uses_cpu(x.quantizer) for x in self.plan.layers.values())
        self._limit = self._threads + 1 if on_cpu else 1
        total = sum(array.nbytes for array in self.checkpoint.weights.values())
        waiting: deque[tuple[str, float, Callable[[], Converted]]] = deque()
        if resumed := len(self.state.records):
            progress.note(f"Resuming: {resumed} of {len(self.plan.layers)} layers done")
        large = 0  # norms and biases would fill the queue while a core has nothing to do
        with (
            progress.task(label, total) as advance,
            one_thread(numpy_only=True) if side_by_side else nullcontext(),
            _pool(self._threads) as submit,
        ):
            for name, inputs in self._inputs(calibration):
                nbytes, layer = self.checkpoint.weights[name].nbytes, self.plan.layer_of(name)
                if self.state.is_done(name, layer):
                    del self.checkpoint.weights[name]
                    advance(nbytes)
                else:
                    work = partial(self._convert, name, self._read(name), inputs)
                    apart = on_cpu or (layer is not None and uses_cpu(layer.quantizer))
                    done = submit(partial(work, on_cpu=True)).result if apart else work
                    waiting.append((name, nbytes, done))
                    large += layer is not None
                    del work, done
                del inputs
                alone = layer is not None and is_large_stack(layer)
                while large > (0 if alone else self._limit):
                    large -= self.plan.layer_of(waiting[0][0]) is not None
                    advance(self._finish(*waiting.popleft()))
            while waiting:
                advance(self._finish(*waiting.popleft()))
        with self.state.timed("write"):
            self.writer.close()
        return [self.state.records[path] for path in self.plan.layers]

    def _inputs(
        self, calibration: Iterable[InputStatistics] | None
    ) -> Iterator[tuple[str, Mean | None]]:
        """Yield the parameters in the order of conversion, with what their layers are fed."""
        left = list(parameters(self.checkpoint.model))
        if calibration is None:
            yield from ((name, None) for name in left)
            return
        blocks, limit = iter(calibration), self._limit
        while True:
            with self.state.timed("calibrate"):
                block = next(blocks, None)
            if block is None:
                return
            names = [name for name in left if name.startswith(block.prefix)]
            left = [name for name in left if not name.startswith(block.prefix)]
            planned = sum(self.plan.layer_of(name) is not None for name in names)
            self._limit = limit = max(limit, planned)
            self._rare |= block.rare
            for name in names:
                if name == names[-1] and block.nbytes > SIDE_BY_SIDE_BYTES:
                    self._limit = 0
                yield name, block.means.get(name.removesuffix(".weight"))
            del block  # before the next one is run

    def _read(self, name: str) -> mx.array:
        with self.state.timed("read"):
            w = source_array(self.checkpoint, self.plan.dtype, name)
            del self.checkpoint.weights[name]
            try:
                mx.eval(w)
            except Exception as exc:  # a file that changed or became unreadable under us
                raise CheckpointError(
                    f"{self.checkpoint.path}: tensor {name!r} cannot be read: {exc}"
                ) from exc
        return w

    def _convert(
        self, name: str, w: mx.array, inputs: Mean | None, *, on_cpu: bool = False
    ) -> Converted:
        try:
            with mx.stream(mx.cpu) if on_cpu else nullcontext():
                if layer := self.plan.layer_of(name):
                    return convert_weight(w, layer, inputs)
                require_finite(w)
                return Converted(tensors={name: w})
        except ValueError as exc:
            check_unchanged(self.checkpoint)
            raise CheckpointError(
                f"{self.checkpoint.path}: tensor {name!r} {exc} as "
                f"{str(w.dtype).rpartition('.')[2]}: the checkpoint is damaged, or needs --dtype "
                "bfloat16 or float32, or this layer is to be kept (--exclude)"
            ) from exc

    def _finish(self, name: str, nbytes: float, result: Callable[[], Converted]) -> float:
        """Wait for a weight and write it; returns the size of its source."""
        found, layer = result(), self.plan.layer_of(name)
        for stage, seconds in found.seconds.items():
            self.state.seconds[stage] += seconds
        prefix = f"{layer.path}." if layer else ""
        with self.state.timed("write"):
            for leaf, tensor in found.tensors.items():
                self.writer.add(prefix + leaf, tensor)
        if layer:
            self.state.add(_record(layer, found, self._rare.get(layer.path, [])))
        return nbytes


@cache
def _threads(number: int) -> ThreadPoolExecutor:
    """Return threads that stay: each in which mlx computes leaves one of mlx's own behind."""
    return ThreadPoolExecutor(number)


@contextmanager
def _pool(threads: int) -> Iterator[Callable[[Callable[[], Any]], Future[Any]]]:
    """Yield a function that has work done; drop, on an error or Ctrl-C, what has not begun."""
    futures: WeakSet[Future[Any]] = WeakSet()

    def submit(work: Callable[[], Any]) -> Future[Any]:
        future = _threads(threads).submit(work)
        futures.add(future)
        return future

    try:
        yield submit
    finally:
        left = tuple(futures)
        for future in left:
            future.cancel()
        wait(left)


def source_array(checkpoint: Checkpoint, dtype: mx.Dtype | None, name: str) -> mx.array:
    """Return a parameter of a checkpoint, unread, cast to `dtype` where that applies to it."""
    w = checkpoint.weights[name]
    casts = getattr(checkpoint.model, "cast_predicate", lambda name: True)
    return w.astype(dtype) if dtype and w.dtype in FLOAT_TYPES and casts(name) else w


def _record(layer: LayerPlan, found: Converted, rare: list[int]) -> LayerRecord:
    notes = [layer.note] if layer.note else []
    if rare:
        named = f"expert{'s' * (len(rare) > 1)} {', '.join(map(str, rare))}"
        notes.append(f"{named} saw few tokens: calibrated mostly on those of all experts")
    nbytes = sum(tensor.nbytes for tensor in found.tensors.values())
    kept = layer.action == "keep"
    return LayerRecord(
        path=layer.path,
        kind=layer.kind,
        action=layer.action,
        shape=layer.shape,
        nbytes=nbytes,
        bits_per_weight=8 * nbytes / math.prod(layer.shape),
        bits=None if kept else layer.bits,
        group_size=None if kept else layer.group_size,
        mode=None if kept else layer.mode,
        clusters=layer.clusters if layer.action == "split" else None,
        cut_points=found.cut_points,
        snr_db=found.snr_db,
        outliers=layer.outliers or None,
        note="; ".join(notes),
        head=layer.head,
    )
