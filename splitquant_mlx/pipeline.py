"""Convert a checkpoint: the one place that knows the order of the steps.

Reading, converting and writing overlap. Only a few weights are in memory at a time, so its peak
depends on the largest tensors and the number of cores, not on the number of layers.
"""

import math
import os
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from functools import cache, partial
from pathlib import Path
from typing import Any
from weakref import WeakSet

import mlx.core as mx

from splitquant_mlx.checkpoint import (
    FLOATS,
    Checkpoint,
    check_unchanged,
    open_checkpoint,
    parameters,
)
from splitquant_mlx.directory import as_directory
from splitquant_mlx.environment import versions
from splitquant_mlx.errors import CheckpointError
from splitquant_mlx.manifest import LayerRecord, Manifest
from splitquant_mlx.plan import LayerPlan, Plan, make_plan, parameter_names
from splitquant_mlx.progress import Progress, Silent
from splitquant_mlx.recipe import DTYPES, Recipe
from splitquant_mlx.save import check_target, copy_companions, require_space, staged, write_config
from splitquant_mlx.shards import MAX_SHARD_BYTES, ShardWriter
from splitquant_mlx.source import Source, resolve
from splitquant_mlx.weight import Converted, convert_weight, require_finite

FLOAT_TYPES = tuple(FLOATS.values())


def convert(
    model: str | Path | Source,
    mlx_path: str | Path = "mlx_model",
    *,
    recipe: Recipe | None = None,
    revision: str | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> Manifest:
    """Quantize a model and save it as a checkpoint that mlx-lm and `load` run.

    Args:
        model: hub repo id, directory, .gguf file, or a source already resolved.
        mlx_path: directory to write; it appears when it is complete.
        recipe: the settings; None is SplitQuantV2 with 3 clusters, 4 bits, groups of 64.
        revision: branch, tag or commit of a hub repo.
        overwrite: replace `mlx_path` when it exists and is a model directory.
        progress: told how far the work is.
        max_shard_bytes: largest safetensors file to write, bytes.

    Returns:
        The manifest, which is also saved in `mlx_path` as splitquant.json.

    Raises:
        SplitQuantError: when the source cannot be had or used, the recipe does not fit it, or
            the target cannot be written. Nothing is left behind.
    """
    recipe = recipe or Recipe()
    progress = progress or Silent()
    target = Path(mlx_path)
    check_target(target, overwrite=overwrite)
    started = time.perf_counter()
    source = model if isinstance(model, Source) else resolve(str(model), revision=revision)
    with staged(target, overwrite=overwrite, source=source.path) as staging:
        with as_directory(source, progress, scratch=staging.parent) as directory:
            checkpoint = open_checkpoint(directory)
            plan = make_plan(recipe, checkpoint.model, checkpoint.config.get("vocab_size"))
            require_space(staging, _estimated_bytes(plan, checkpoint))
            copy_companions(directory, staging)
            names = parameter_names(plan, checkpoint.model)
            with ShardWriter(staging, names, max_shard_bytes) as writer:
                worker = _Worker(checkpoint, plan, writer)
                records = worker.run(progress)
            check_unchanged(checkpoint)
            write_config(checkpoint.config, records, staging)
            manifest = Manifest(
                source=source.name,
                revision=source.revision,
                recipe=recipe.to_dict(),
                versions=versions(),
                device=str(mx.default_device()),
                layers=tuple(records),
                linear_bits_per_weight=_linear_bits_per_weight(records),
                bits_per_weight=8 * writer.total_bytes / worker.parameters,
                source_bytes=checkpoint.source_bytes,
                stored_bytes=writer.total_bytes,
                seconds={**worker.seconds, "total": time.perf_counter() - started},
            )
            manifest.save(staging)
    return manifest


class _Worker:
    """Take every parameter of the model through its planned steps, in model order.

    This thread reads and writes. On the CPU, threads of a pool convert weights in between, one a
    core; a GPU does one weight at a time, in this thread. Either way there are at most two more
    large weights in memory than are being worked on.
    """

    def __init__(self, checkpoint: Checkpoint, plan: Plan, writer: ShardWriter):
        self.checkpoint = checkpoint
        self.plan = plan
        self.dtype = _storage_dtype(plan.recipe, checkpoint)
        self.casts = getattr(checkpoint.model, "cast_predicate", lambda name: True)
        self.writer = writer
        self.seconds = {"read": 0.0, "cluster": 0.0, "quantize": 0.0, "write": 0.0}
        self.parameters = 0
        self.records: list[LayerRecord] = []

    def run(self, progress: Progress) -> list[LayerRecord]:
        """Write all tensors; returns a record for each planned layer."""
        on_cpu = mx.default_device() == mx.cpu
        threads = os.cpu_count() or 1 if on_cpu else 1
        total = sum(array.nbytes for array in self.checkpoint.weights.values())
        label = {"splitquant": "Splitting and quantizing", "rtn": "Quantizing"}
        waiting: deque[tuple[str, float, Callable[[], Converted | mx.array]]] = deque()
        large = 0  # norms and biases would fill the queue while a core has nothing to do
        with (
            progress.task(label[self.plan.recipe.method], total) as advance,
            _pool(threads) as submit,
        ):
            for name in parameters(self.checkpoint.model):
                nbytes = self.checkpoint.weights[name].nbytes
                w = self._read(name)
                self.parameters += w.size
                work = partial(self._convert, name, w)
                waiting.append((name, nbytes, submit(work).result if on_cpu else work))
                large += self._layer(name) is not None
                del w, work
                while large > threads + 1:
                    large -= self._layer(waiting[0][0]) is not None
                    advance(self._finish(*waiting.popleft()))
            while waiting:
                advance(self._finish(*waiting.popleft()))
        with self._timed("write"):
            self.writer.close()
        return self.records

    def _read(self, name: str) -> mx.array:
        with self._timed("read"):
            w = self.checkpoint.weights.pop(name)
            if self.dtype is not None and w.dtype in FLOAT_TYPES and self.casts(name):
                w = w.astype(self.dtype)
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

    def _convert(self, name: str, w: mx.array) -> Converted | mx.array:
        layer = self._layer(name)
        try:
            if layer is not None and layer.action != "keep":
                return convert_weight(w, layer, self.plan.recipe)
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
                self.records.append(_record(layer, found.nbytes))
            return nbytes
        assert layer is not None
        for stage, seconds in found.seconds.items():
            self.seconds[stage] += seconds
        weight, scales, biases = found.quantized
        path = layer.path
        tensors = {name: weight, f"{path}.scales": scales}
        self._write(tensors if biases is None else {**tensors, f"{path}.biases": biases})
        self.records.append(
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
        with self._timed("write"):
            for name, tensor in tensors.items():
                self.writer.add(name, tensor)

    @contextmanager
    def _timed(self, stage: str) -> Iterator[None]:
        started = time.perf_counter()
        yield
        self.seconds[stage] += time.perf_counter() - started


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


def _storage_dtype(recipe: Recipe, checkpoint: Checkpoint) -> mx.Dtype | None:
    config = checkpoint.config
    text_config = config.get("text_config") or {}
    name = (
        recipe.dtype or config.get("torch_dtype") or config.get("dtype") or text_config.get("dtype")
    )
    return getattr(mx, name) if name in DTYPES else None


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


def _linear_bits_per_weight(records: list[LayerRecord]) -> float:
    converted = [r for r in records if r.kind in ("linear", "experts") and r.action != "keep"]
    entries = sum(math.prod(r.shape) for r in converted)
    return 8 * sum(r.nbytes for r in converted) / entries if entries else 0.0


def _estimated_bytes(plan: Plan, checkpoint: Checkpoint) -> int:
    """Estimate the bytes to be written: scales and biases at 4 bytes, the rest at their own."""
    total = 0
    for name, array in checkpoint.weights.items():
        layer = plan.layers.get(name.removesuffix(".weight"))
        if layer is None or layer.bits is None or layer.group_size is None:
            total += array.nbytes
        else:
            parts = plan.recipe.clusters if layer.action == "split" else 1
            total += array.size * parts * (layer.bits + 64 // layer.group_size) // 8
    return total
