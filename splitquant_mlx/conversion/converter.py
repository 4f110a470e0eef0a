"""Convert the parameters of a checkpoint as planned, and write them.

Reading, converting and writing overlap. Only a few weights are in memory at a time, so peak memory
depends on the largest tensors and the number of cores, not on the number of layers.
"""

import math
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, wait
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any
from weakref import WeakSet

import mlx.core as mx

from splitquant_mlx.calibration.statistics import InputStatistics, Mean
from splitquant_mlx.conversion.plan import LayerPlan, Plan
from splitquant_mlx.conversion.quantizers import is_large_stack, uses_cpu
from splitquant_mlx.conversion.resume import ConversionState, timed
from splitquant_mlx.conversion.weight import (
    Converted,
    UnusableWeightError,
    convert_weight,
    require_finite,
)
from splitquant_mlx.errors import CheckpointError
from splitquant_mlx.formats.manifest import LayerRecord
from splitquant_mlx.formats.packed import dtype_name
from splitquant_mlx.formats.shard_writer import ShardWriter
from splitquant_mlx.models.architecture import parameters
from splitquant_mlx.models.checkpoint import FLOATS, Checkpoint, check_unchanged
from splitquant_mlx.progress import QUANTIZING, Progress
from splitquant_mlx.runtime.blas import MMAP_THRESHOLD_BYTES, one_thread, release_freed_memory
from splitquant_mlx.runtime.cores import executor

FLOAT_TYPES = tuple(FLOATS.values())
OVERLAP_BYTES = 2 << 30  # max. statistics of a block to keep while the next block is run


class Converter:
    """Convert and write all parameters of a model as planned.

    The calling thread reads, calibrates and writes. A thread pool, one thread per core, converts
    weights: on the CPU all weights, so that a block is calibrated while the previous one is
    quantized; with a GPU those whose quantizer uses numpy, while the GPU runs the next block. Other
    weights are quantized on the GPU by the calling thread, one at a time. The queue is limited to
    the weights of one block; without calibration, to one large weight more than threads. A block
    with large statistics, such as the Hessians of a hundred experts, is finished before the next.

    Parameters that `state` records as done are skipped.
    """

    def __init__(
        self, checkpoint: Checkpoint, plan: Plan, writer: ShardWriter, state: ConversionState
    ):
        self.checkpoint = checkpoint
        self.plan = plan
        self.writer = writer
        self.state = state
        self._threads = os.cpu_count() or 1

    def run(
        self, progress: Progress, calibration: Iterable[InputStatistics] | None = None
    ) -> list[LayerRecord]:
        """Convert and write all tensors, block by block.

        Args:
            progress: progress reporter.
            calibration: statistics of layer inputs; None if no quantizer needs them.

        Returns:
            A record of each planned layer.
        """
        on_cpu = mx.default_device() == mx.cpu
        uses_pool = on_cpu or any(uses_cpu(x.quantizer) for x in self.plan.layers.values())
        least = self._threads + 1 if on_cpu else 1
        total = sum(array.nbytes for array in self.checkpoint.weights.values())
        queue: deque[tuple[str, float, list[int], Callable[[], Converted]]] = deque()
        if resumed := len(self.state.records):
            progress.note(f"Resuming: {resumed} of {len(self.plan.layers)} layers done")
        large = 0  # weights of layers in the queue; norms and biases do not count
        with (
            progress.task(QUANTIZING, total) as advance,
            one_thread(numpy_only=True) if uses_pool else nullcontext(),
            _pool(self._threads) as submit,
        ):
            for name, inputs, rare, limit in self._inputs(calibration, least):
                nbytes, layer = self.checkpoint.weights[name].nbytes, self.plan.layer_of(name)
                if self.state.is_done(name, layer):
                    del self.checkpoint.weights[name]
                    advance(nbytes)
                else:
                    work = partial(self._convert, name, self._read(name), inputs)
                    in_pool = on_cpu or (layer is not None and uses_cpu(layer.quantizer))
                    result = submit(partial(work, on_cpu=True)).result if in_pool else work
                    queue.append((name, nbytes, rare, result))
                    large += layer is not None
                    del work, result
                del inputs
                if layer is not None and is_large_stack(layer):
                    limit = 0
                while large > limit:
                    large -= self.plan.layer_of(queue[0][0]) is not None
                    advance(self._finish(*queue.popleft()))
            while queue:
                advance(self._finish(*queue.popleft()))
        with timed(self.state.seconds, "write"):
            self.writer.close()
        return [self.state.records[path] for path in self.plan.layers]

    def _inputs(
        self, calibration: Iterable[InputStatistics] | None, limit: int
    ) -> Iterator[tuple[str, Mean | None, list[int], int]]:
        """Yield parameter names in the order of conversion.

        Each with the statistics of its inputs, the experts that saw few tokens, and the maximum
        number of layers in the queue: at least `limit`, but 0 after a block of large statistics.
        """
        remaining = list(parameters(self.checkpoint.model))
        if calibration is None:
            yield from ((name, None, [], limit) for name in remaining)
            return
        blocks = iter(calibration)
        while True:
            with timed(self.state.seconds, "calibrate"):
                block = next(blocks, None)
            if block is None:
                return
            names = [name for name in remaining if name.startswith(block.prefix)]
            remaining = [name for name in remaining if not name.startswith(block.prefix)]
            planned = sum(self.plan.layer_of(name) is not None for name in names)
            limit = max(limit, planned)
            for name in names:
                path = name.removesuffix(".weight")
                drain = name == names[-1] and block.nbytes > OVERLAP_BYTES
                most = 0 if drain else limit
                yield name, block.means.get(path), block.rare.get(path, []), most
            del block  # release memory before the next block is run

    def _read(self, name: str) -> mx.array:
        with timed(self.state.seconds, "read"):
            w = source_array(self.checkpoint, self.plan.dtype, name)
            del self.checkpoint.weights[name]
            if w.nbytes >= MMAP_THRESHOLD_BYTES:
                release_freed_memory()
            try:
                mx.eval(w)
            except Exception as exc:  # the file was changed or became unreadable
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
        except UnusableWeightError as exc:
            check_unchanged(self.checkpoint)
            raise CheckpointError(
                f"{self.checkpoint.path}: tensor {name!r} has {exc} as "
                f"{dtype_name(w.dtype)}: the checkpoint is damaged, or use --dtype bfloat16 or "
                "float32, or keep this layer (--exclude)"
            ) from exc

    def _finish(
        self, name: str, nbytes: float, rare: list[int], result: Callable[[], Converted]
    ) -> float:
        """Wait for a converted weight and write it; returns the size of its source."""
        converted, layer = result(), self.plan.layer_of(name)
        for stage, seconds in converted.seconds.items():
            self.state.seconds[stage] += seconds
        prefix = f"{layer.path}." if layer else ""
        with timed(self.state.seconds, "write"):
            for leaf, tensor in converted.tensors.items():
                self.writer.add(prefix + leaf, tensor)
        if layer:
            self.state.add(_record(layer, converted, rare))
        return nbytes


@contextmanager
def _pool(threads: int) -> Iterator[Callable[[Callable[[], Any]], Future[Any]]]:
    """Yield a function that submits work; pending work is cancelled at the end of the block."""
    futures: WeakSet[Future[Any]] = WeakSet()

    def submit(work: Callable[[], Any]) -> Future[Any]:
        future = executor("converter", threads).submit(work)
        futures.add(future)
        return future

    try:
        yield submit
    finally:
        unfinished = tuple(futures)
        for future in unfinished:
            future.cancel()
        wait(unfinished)


def source_array(checkpoint: Checkpoint, dtype: mx.Dtype | None, name: str) -> mx.array:
    """Return a parameter of a checkpoint lazily, cast to `dtype` if the model allows it."""
    w = checkpoint.weights[name]
    casts = getattr(checkpoint.model, "cast_predicate", lambda name: True)
    return w.astype(dtype) if dtype and w.dtype in FLOAT_TYPES and casts(name) else w


def _record(layer: LayerPlan, converted: Converted, rare: list[int]) -> LayerRecord:
    notes = [layer.note] if layer.note else []
    if rare:
        named = f"expert{'s' * (len(rare) > 1)} {', '.join(map(str, rare))}"
        notes.append(f"{named} saw few tokens: calibrated mostly on those of all experts")
    nbytes = sum(tensor.nbytes for tensor in converted.tensors.values())
    is_kept = layer.action == "keep"
    return LayerRecord(
        path=layer.path,
        kind=layer.kind,
        action=layer.action,
        shape=layer.shape,
        nbytes=nbytes,
        bits_per_weight=8 * nbytes / math.prod(layer.shape),
        bits=None if is_kept else layer.bits,
        group_size=None if is_kept else layer.group_size,
        mode=None if is_kept else layer.mode,
        clusters=layer.clusters if layer.action == "split" else None,
        cut_points=converted.cut_points,
        snr_db=converted.snr_db,
        outliers=layer.outliers or None,
        note="; ".join(notes),
        head=layer.head,
    )
