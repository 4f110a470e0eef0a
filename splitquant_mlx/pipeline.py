"""Convert a checkpoint: the one place that knows the order of the steps.

One weight at a time is read, clustered, quantized and written, so memory depends on the largest
tensor and not on the number of layers.
"""

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import mlx.core as mx

from splitquant_mlx.affine import Quantized, dequantize, quantize, quantize_parts
from splitquant_mlx.checkpoint import FLOATS, Checkpoint, open_checkpoint, parameters
from splitquant_mlx.directory import as_directory
from splitquant_mlx.environment import versions
from splitquant_mlx.errors import CheckpointError
from splitquant_mlx.layers import scale_dtype
from splitquant_mlx.manifest import LayerRecord, Manifest
from splitquant_mlx.parts import cluster_weight, parts_of
from splitquant_mlx.plan import LayerPlan, Plan, make_plan, parameter_names
from splitquant_mlx.progress import Progress, Silent
from splitquant_mlx.recipe import DTYPES, Recipe
from splitquant_mlx.save import check_target, copy_companions, require_space, staged, write_config
from splitquant_mlx.shards import MAX_SHARD_BYTES, ShardWriter
from splitquant_mlx.source import Source, resolve

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
            require_space(staging, _upper_bound_bytes(plan, checkpoint))
            copy_companions(directory, staging)
            names = parameter_names(plan, checkpoint.model)
            with ShardWriter(staging, names, max_shard_bytes) as writer:
                worker = _Worker(checkpoint, plan, writer)
                records = worker.run(progress)
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
    """Take every parameter of the model through its planned steps, in model order."""

    def __init__(self, checkpoint: Checkpoint, plan: Plan, writer: ShardWriter):
        self.checkpoint = checkpoint
        self.plan = plan
        self.dtype = _storage_dtype(plan.recipe, checkpoint)
        self.casts = getattr(checkpoint.model, "cast_predicate", lambda name: True)
        self.writer = writer
        self.seconds = {"read": 0.0, "cluster": 0.0, "quantize": 0.0, "write": 0.0}
        self.parameters = 0

    def run(self, progress: Progress) -> list[LayerRecord]:
        """Write all tensors; returns a record for each planned layer."""
        records = []
        names = list(parameters(self.checkpoint.model))
        total = sum(array.nbytes for array in self.checkpoint.weights.values())
        label = {"splitquant": "Splitting and quantizing", "rtn": "Quantizing"}
        with progress.task(label[self.plan.recipe.method], total) as advance:
            for name in names:
                source_bytes = self.checkpoint.weights[name].nbytes
                w = self._read(name)
                self.parameters += w.size
                path, _, leaf = name.rpartition(".")
                if leaf == "weight" and path in self.plan.layers:
                    records.append(self._convert_layer(self.plan.layers[path], name, w))
                else:
                    self._write({name: w})
                del w
                advance(source_bytes)
        with self._timed("write"):
            self.writer.close()
        return records

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
            if w.dtype in FLOAT_TYPES and not mx.all(mx.isfinite(w)).item():
                raise CheckpointError(
                    f"{self.checkpoint.path}: tensor {name!r} holds NaN or infinite values as "
                    f"{str(w.dtype).rpartition('.')[2]}: the checkpoint is damaged, or needs "
                    "--dtype bfloat16 or float32"
                )
        return w

    def _convert_layer(self, layer: LayerPlan, name: str, w: mx.array) -> LayerRecord:
        if layer.action == "keep":
            self._write({name: w})
            return _record(layer, w.nbytes)
        assert layer.bits is not None and layer.group_size is not None
        recipe = self.plan.recipe
        cut_points: tuple[float, ...] = ()
        if layer.action == "split":
            with self._timed("cluster"):
                clustering = cluster_weight(w, recipe.clusters, recipe.kmeans)
                cut_points = clustering.cut_points
            with self._timed("quantize"):
                quantized = quantize_parts(
                    parts_of(w, clustering, recipe.clusters),
                    bits=layer.bits,
                    group_size=layer.group_size,
                    granularity=recipe.granularity,
                    scale_dtype=scale_dtype(w.dtype),
                )
                snr_db = _snr_db(w, quantized, layer, recipe.clusters)
        else:
            with self._timed("quantize"):
                quantized = quantize(
                    w,
                    bits=layer.bits,
                    group_size=layer.group_size,
                    granularity=recipe.granularity,
                    mode=layer.mode,
                )
                snr_db = _snr_db(w, quantized, layer, 1)
        path = name.removesuffix("weight")
        tensors = {name: quantized.weight, f"{path}scales": quantized.scales}
        if quantized.biases is not None:
            tensors[f"{path}biases"] = quantized.biases
        self._write(tensors)
        return _record(layer, quantized.nbytes, recipe.clusters, cut_points, snr_db)

    def _write(self, tensors: dict[str, mx.array]) -> None:
        with self._timed("write"):
            for name, tensor in tensors.items():
                self.writer.add(name, tensor)

    @contextmanager
    def _timed(self, stage: str) -> Iterator[None]:
        started = time.perf_counter()
        yield
        self.seconds[stage] += time.perf_counter() - started


def _storage_dtype(recipe: Recipe, checkpoint: Checkpoint) -> mx.Dtype | None:
    config = checkpoint.config
    text_config = config.get("text_config") or {}
    name = (
        recipe.dtype or config.get("torch_dtype") or config.get("dtype") or text_config.get("dtype")
    )
    return getattr(mx, name) if name in DTYPES else None


def _snr_db(w: mx.array, quantized: Quantized, layer: LayerPlan, parts: int) -> float | None:
    """Return the signal-to-noise ratio of a quantized weight in dB; None without any noise."""
    assert layer.bits is not None and layer.group_size is not None
    w_hat = dequantize(quantized, bits=layer.bits, group_size=layer.group_size, mode=layer.mode)
    w_hat = w_hat.reshape(*w.shape[:-1], parts, w.shape[-1]).sum(axis=-2)
    w = w.astype(mx.float32)
    # over the peak, squares neither overflow nor vanish; row sums first: float32 loses digits in
    # one long sum
    peak = mx.maximum(mx.max(mx.abs(w)), 1e-37)
    signal, noise = (mx.sum(mx.sum(x * x, axis=-1)) for x in (w / peak, (w - w_hat) / peak))
    mx.eval(*(array for array in quantized if array is not None), signal, noise)
    if not mx.isfinite(noise).item():
        raise CheckpointError(
            f"tensor '{layer.path}.weight' holds values up to {peak.item():g}, too large to "
            "quantize: exclude this layer (--exclude)"
        )
    if not signal.item() or not noise.item():
        return None
    return (10 * mx.log10(signal / noise)).item()  # type: ignore[return-value]


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
    bits = sum(8 * r.nbytes for r in converted)
    return bits / sum(8 * r.nbytes / r.bits_per_weight for r in converted)


def _upper_bound_bytes(plan: Plan, checkpoint: Checkpoint) -> int:
    """Bound the bytes to be written: scales and biases of at most 4 bytes, kept tensors at 4."""
    total = 0
    for name, array in checkpoint.weights.items():
        layer = plan.layers.get(name.removesuffix(".weight"))
        if layer is None or layer.bits is None or layer.group_size is None:
            total += array.nbytes
        else:
            parts = plan.recipe.clusters if layer.action == "split" else 1
            total += array.size * parts * (layer.bits + 64 // layer.group_size) // 8
    return total
