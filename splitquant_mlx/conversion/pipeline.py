"""Convert a checkpoint: the one place that knows the order of the steps."""

import math
import time
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path

import mlx.core as mx
import numpy as np

from splitquant_mlx.calibration.statistics import Moments, gram, mean_square
from splitquant_mlx.calibration.tokens import calibration_tokens
from splitquant_mlx.conversion.bits import Forecast, choose_bits
from splitquant_mlx.conversion.plan import Plan, make_plan, parameter_names
from splitquant_mlx.conversion.refine import refine, training_texts
from splitquant_mlx.conversion.resume import Ledger, conversion_key, open_journal
from splitquant_mlx.conversion.save import copy_companions, hash_files, require_space, write_config
from splitquant_mlx.conversion.staging import JOURNAL, MODEL, check_target, staged, sweep
from splitquant_mlx.conversion.worker import Worker
from splitquant_mlx.formats.manifest import LayerRecord, Manifest
from splitquant_mlx.formats.model_card import read_source_card
from splitquant_mlx.formats.patch import replace_tensors
from splitquant_mlx.formats.shard_writer import MAX_SHARD_BYTES, ShardWriter
from splitquant_mlx.models.checkpoint import Checkpoint, check_unchanged, open_checkpoint, stamp
from splitquant_mlx.models.directory import as_directory
from splitquant_mlx.models.lazy import LazyModel
from splitquant_mlx.models.loader import load_model
from splitquant_mlx.models.source import Source, resolve
from splitquant_mlx.progress import Progress, Silent
from splitquant_mlx.recipe import Calibration, Recipe
from splitquant_mlx.runtime.environment import versions


def convert(
    model: str | Path | Source,
    mlx_path: str | Path = "mlx_model",
    *,
    recipe: Recipe | None = None,
    revision: str | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    on_forecast: Callable[[Forecast], None] | None = None,
) -> Manifest:
    """Quantize a model and save it as a checkpoint that mlx-lm and `load` run.

    After a kill or a power cut, the same call goes on behind the last finished safetensors file.

    Args:
        model: hub repo id, directory, .gguf file, or a source already resolved.
        mlx_path: directory to write; it appears when it is complete.
        recipe: the settings; None is SplitQuantV2 with 3 clusters, 4 bits, groups of 64.
        revision: branch, tag or commit of a hub repo.
        overwrite: replace `mlx_path` when it exists and is a model directory.
        progress: told how far the work is.
        max_shard_bytes: largest safetensors file to write, bytes.
        on_forecast: told what an "auto" recipe chose, before the conversion.

    Returns:
        The manifest, which is also saved in `mlx_path` as splitquant.json.

    Raises:
        SplitQuantError: when the source cannot be had or used, the recipe does not fit it, or
            the target cannot be written. Nothing is left behind.
    """
    recipe = recipe or Recipe()
    progress = progress or Silent()
    target = Path(mlx_path)
    sweep(target)
    check_target(target, overwrite=overwrite)
    started = time.perf_counter()
    source = model if isinstance(model, Source) else resolve(str(model), revision=revision)
    with staged(target, overwrite=overwrite, source=source.path) as staging:
        own = {source.path: stamp(source.path)} if source.path.is_file() else {}
        with as_directory(source, progress, scratch=staging) as directory:
            checkpoint = open_checkpoint(directory)
            opened = LazyModel(directory, progress=progress)
            chosen = recipe
            if recipe.method == "auto":
                forecast = choose_bits(opened, recipe, progress)
                if on_forecast:
                    on_forecast(forecast)
                chosen = forecast.recipe
            plan = make_plan(chosen, checkpoint.model, checkpoint.config.get("vocab_size"))
            calibration = chosen.calibration or Calibration()
            tokens = training = None
            if any(layer.fit != "rtn" for layer in plan.layers.values()):
                tokens = calibration_tokens(opened, calibration, progress)
            if chosen.refine:
                training = calibration_tokens(opened, training_texts(calibration), progress)
            key = conversion_key(
                settings={
                    "recipe": chosen.to_dict(),
                    "device": str(mx.default_device()),
                    "max_shard_bytes": max_shard_bytes,
                    "calibration": None if tokens is None else sha256(tokens.tobytes()).hexdigest(),
                },
                config=checkpoint.config,
                stamps=own or checkpoint.stamps,
            )
            checkpoint.stamps.update(own)
            names = parameter_names(plan, checkpoint.model)
            with (
                open_journal(staging / JOURNAL, key) as journal,
                ShardWriter(staging / MODEL, names, max_shard_bytes) as writer,
            ):
                ledger = Ledger(journal, writer)
                needed_bytes = _estimated_bytes(plan, checkpoint) - writer.total_bytes
                require_space(staging, needed_bytes)
                copy_companions(directory, staging / MODEL)
                moments = _moments(directory, plan, tokens)
                worker = Worker(checkpoint, plan, writer, ledger, moments)
                records = worker.run(progress)
            check_unchanged(checkpoint)
            write_config(checkpoint.config, records, staging / MODEL)
            hashes, refinement = writer.hashes, {}
            if training is not None:
                with ledger.timed("refine"):
                    quantized, original = load_model(staging / MODEL), opened.load()
                    seed = calibration.seed
                    refined = refine(quantized, original, training, seed=seed, progress=progress)
                    hashes |= replace_tensors(staging / MODEL, refined.tensors)
                refinement = {"before": refined.before, "after": refined.after}
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
                refinement=refinement,
                source_card=read_source_card(directory),
                seconds=ledger.seconds_since(started),
                files=hash_files(staging / MODEL, hashes),
            )
            manifest.save(staging / MODEL)
    return manifest


def _moments(directory: Path, plan: Plan, tokens: np.ndarray | None) -> Moments | None:
    """Prepare to measure what the planned layers are fed; None where none asks for it."""
    paths = [path for path, layer in plan.layers.items() if layer.fit != "rtn"]
    if tokens is None or not paths:
        return None
    moment = gram if plan.recipe.method == "gptq" else mean_square
    return Moments(load_model(directory, lazy=True), tokens, paths, moment)


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
