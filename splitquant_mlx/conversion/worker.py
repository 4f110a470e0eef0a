"""Take a checkpoint's parameters through their planned steps, and to the disk.

Reading, converting and writing overlap. Only a few weights are in memory at a time, so its peak
depends on the largest tensors and the number of cores, not on the number of layers.
"""

import math
import os
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from functools import cache, partial
from typing import Any
from weakref import WeakSet

import mlx.core as mx

from splitquant_mlx.calibration.statistics import Moments
from splitquant_mlx.conversion.plan import LayerPlan, Plan
from splitquant_mlx.conversion.resume import Ledger
from splitquant_mlx.conversion.weight import Converted, convert_weight, require_finite
from splitquant_mlx.errors import CheckpointError
from splitquant_mlx.formats.manifest import LayerRecord
from splitquant_mlx.formats.shard_writer import ShardWriter
from splitquant_mlx.models.checkpoint import FLOATS, Checkpoint, check_unchanged, parameters
from splitquant_mlx.progress import Progress
from splitquant_mlx.recipe import DTYPES, Recipe
from splitquant_mlx.runtime.blas import one_thread_for_numpy

FLOAT_TYPES = tuple(FLOATS.values())


class Worker:
    """Take every parameter of the model through its planned steps, in model order.

    This thread reads and writes. On the CPU, threads of a pool convert weights in between, one a
    core; a GPU does one weight at a time, in this thread. Either way there are at most two more
    large weights in memory than are being worked on.

    What the ledger holds already is not done again.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        plan: Plan,
        writer: ShardWriter,
        ledger: Ledger,
        moments: Moments | None,
    ):
        self.checkpoint = checkpoint
        self.plan = plan
        self.writer = writer
        self.ledger = ledger
        self.moments = moments
        self.parameters = 0

    def run(self, progress: Progress) -> list[LayerRecord]:
        """Write all tensors; returns a record for each planned layer."""
        splits = self.plan.recipe.method == "splitquant"
        label = "Splitting and quantizing" if splits else "Quantizing"
        on_cpu = mx.default_device() == mx.cpu
        threads = os.cpu_count() or 1 if on_cpu else 1
        total = sum(array.nbytes for array in self.checkpoint.weights.values())
        waiting: deque[tuple[str, float, Callable[[], Converted | mx.array]]] = deque()
        large = 0  # norms and biases would fill the queue while a core has nothing to do
        with (
            progress.task(label, total) as advance,
            one_thread_for_numpy(),
            _pool(threads) as submit,
        ):
            for name in self._names():
                nbytes = self.checkpoint.weights[name].nbytes
                if self.ledger.has(name, self._layer(name)):
                    self.parameters += self.checkpoint.weights.pop(name).size
                    advance(nbytes)
                    continue
                w = self._read(name)
                self.parameters += w.size
                work = partial(self._convert, name, w, self._moment(name))
                waiting.append((name, nbytes, submit(work).result if on_cpu else work))
                large += self._layer(name) is not None
                del w, work
                while large > threads + 1:
                    large -= self._layer(waiting[0][0]) is not None
                    advance(self._finish(*waiting.popleft()))
            while waiting:
                advance(self._finish(*waiting.popleft()))
        with self.ledger.timed("write"):
            self.writer.close()
        return [self.ledger.records[path] for path in self.plan.layers]

    def _read(self, name: str) -> mx.array:
        with self.ledger.timed("read"):
            w = source_weight(self.checkpoint, self.plan.recipe, name)
            try:
                mx.eval(w)
            except Exception as exc:  # a file that changed or became unreadable under us
                raise CheckpointError(
                    f"{self.checkpoint.path}: tensor {name!r} cannot be read: {exc}"
                ) from exc
        return w

    def _layer(self, name: str) -> LayerPlan | None:
        path, _, leaf = name.rpartition(".")
        return self.plan.layers.get(path) if leaf == "weight" else None

    def _names(self) -> list[str]:
        """Return the parameters in model order, but those last that are fed by the last block."""
        last = self.moments.after_blocks if self.moments else ()
        return sorted(
            parameters(self.checkpoint.model), key=lambda name: name.rpartition(".")[0] in last
        )

    def _moment(self, name: str) -> mx.array | None:
        layer = self._layer(name)
        if self.moments is None or layer is None or layer.fit == "rtn":
            return None
        with self.ledger.timed("calibrate"):
            return self.moments[layer.path]

    def _convert(self, name: str, w: mx.array, moment: mx.array | None) -> Converted | mx.array:
        layer = self._layer(name)
        try:
            if layer is not None and layer.action != "keep":
                return convert_weight(w, layer, self.plan.recipe, moment)
            if w.dtype in FLOAT_TYPES:
                require_finite(w)
            return w
        except ValueError as exc:
            check_unchanged(self.checkpoint)
            raise CheckpointError(
                f"{self.checkpoint.path}: tensor {name!r} {exc} as "
                f"{str(w.dtype).rpartition('.')[2]}: the checkpoint is damaged, or needs --dtype "
                "bfloat16 or float32, or this layer is to be kept (--exclude)"
            ) from exc

    def _finish(
        self, name: str, nbytes: float, result: Callable[[], Converted | mx.array]
    ) -> float:
        """Wait for a weight and write it; returns the size of its source."""
        layer, found = self._layer(name), result()
        if isinstance(found, mx.array):
            self._write({name: found})
            if layer is not None:
                self.ledger.add(_record(layer, found.nbytes))
            return nbytes
        assert layer is not None
        for stage, seconds in found.seconds.items():
            self.ledger.seconds[stage] += seconds
        weight, scales, biases = found.quantized
        path = layer.path
        tensors = {name: weight, f"{path}.scales": scales}
        self._write(tensors if biases is None else {**tensors, f"{path}.biases": biases})
        self.ledger.add(
            _record(
                layer,
                found.quantized.nbytes,
                self.plan.recipe.clusters,
                found.cut_points,
                found.snr_db,
            )
        )
        return nbytes

    def _write(self, tensors: dict[str, mx.array]) -> None:
        with self.ledger.timed("write"):
            for name, tensor in tensors.items():
                self.writer.add(name, tensor)


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


def source_weight(checkpoint: Checkpoint, recipe: Recipe, name: str) -> mx.array:
    """Take a parameter out of a checkpoint, in the type that it is converted or stored in."""
    w, config = checkpoint.weights.pop(name), checkpoint.config
    text_config = config.get("text_config") or {}
    dtype = (
        recipe.dtype or config.get("torch_dtype") or config.get("dtype") or text_config.get("dtype")
    )
    casts = getattr(checkpoint.model, "cast_predicate", lambda name: True)
    if dtype in DTYPES and w.dtype in FLOAT_TYPES and casts(name):
        return w.astype(getattr(mx, dtype))
    return w


def _record(
    layer: LayerPlan,
    nbytes: int,
    clusters: int | None = None,
    cut_points: tuple[float, ...] = (),
    snr_db: float | None = None,
) -> LayerRecord:
    return LayerRecord(
        path=layer.path,
        kind=layer.kind,
        action=layer.action,
        shape=layer.shape,
        nbytes=nbytes,
        bits_per_weight=8 * nbytes / math.prod(layer.shape),
        bits=layer.bits,
        group_size=layer.group_size,
        mode=None if layer.action == "keep" else layer.mode,
        clusters=clusters if layer.action == "split" else None,
        cut_points=cut_points,
        snr_db=snr_db,
        note=layer.note,
    )
