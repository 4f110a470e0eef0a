"""Convert a checkpoint: the one place that knows the order of the stages."""

import math
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path

import mlx.core as mx
import numpy as np

from splitquant_mlx.calibration.statistics import InputStatistics, iterate_blocks
from splitquant_mlx.calibration.tokens import calibration_tokens
from splitquant_mlx.conversion.bits import Forecast, choose_bits
from splitquant_mlx.conversion.converter import Converter, source_array
from splitquant_mlx.conversion.plan import Plan, make_plan
from splitquant_mlx.conversion.quantizers import QUANTIZERS
from splitquant_mlx.conversion.refine import refine, training_texts
from splitquant_mlx.conversion.resume import ConversionState, conversion_key, open_journal
from splitquant_mlx.conversion.save import copy_companions, hash_files, require_space, write_config
from splitquant_mlx.conversion.staging import JOURNAL, MODEL, check_target, staged, sweep
from splitquant_mlx.errors import SplitQuantWarning
from splitquant_mlx.formats.gguf import gguf_files
from splitquant_mlx.formats.manifest import LayerRecord, Manifest
from splitquant_mlx.formats.model_card import read_source_card
from splitquant_mlx.formats.patch import replace_tensors
from splitquant_mlx.formats.shard_writer import MAX_SHARD_BYTES, ShardWriter
from splitquant_mlx.models.checkpoint import Checkpoint, check_unchanged, open_checkpoint, stamp
from splitquant_mlx.models.directory import as_directory
from splitquant_mlx.models.lazy import LazyModel
from splitquant_mlx.models.loader import load_model, tokenizer_problem
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

    After a kill or a power cut, the same call goes on where it was, up to 20 s before.

    Args:
        model: hub repo id, directory, .gguf file, or a source already resolved.
        mlx_path: directory to write; it appears when it is complete.
        recipe: the settings; None is SplitQuantV2 with 3 clusters, 4 bits, groups of 64.
        revision: branch, tag or commit of a hub repo.
        overwrite: replace `mlx_path` when it exists and is a model directory.
        progress: progress reporter.
        max_shard_bytes: largest safetensors file to write, bytes.
        on_forecast: called with what an "auto" recipe chose, before the conversion.

    Returns:
        The manifest, which is also saved in `mlx_path` as splitquant.json.

    Warns:
        SplitQuantWarning: when the model has no usable tokenizer.

    Raises:
        SplitQuantError: when the source is not found or not usable, the recipe does not fit it, or
            the target cannot be written. Nothing is left behind.
    """
    recipe, progress, target = recipe or Recipe(), progress or Silent(), Path(mlx_path)
    started = time.perf_counter()
    sweep(target)
    check_target(target, overwrite=overwrite)
    source = model if isinstance(model, Source) else resolve(str(model), revision=revision)
    with (
        staged(target, overwrite=overwrite, source=source.path) as staging,
        _opened(source, staging, progress) as (original, checkpoint),
    ):
        output = staging / MODEL
        if problem := tokenizer_problem(original.path):
            note = "the result will hold the weights alone, which chat and eval do not run"
            warnings.warn(f"{problem}: {note}", SplitQuantWarning, stacklevel=2)
        chosen = _decide_bits(recipe, original, progress, on_forecast, max_shard_bytes)
        plan = make_plan(chosen, checkpoint.model, checkpoint.config)
        tokens, training = _texts(chosen, plan, original, progress)
        tensors = plan.tensors(
            {name: source_array(checkpoint, plan.dtype, name) for name in checkpoint.weights}
        )
        stored_bytes = sum(dtype.size * math.prod(shape) for dtype, shape in tensors.values())
        parameters = sum(array.size for array in checkpoint.weights.values())
        settings = {
            "recipe": chosen.to_dict(),
            "device": str(mx.default_device()),
            "max_shard_bytes": max_shard_bytes,
            "calibration": None if tokens is None else sha256(tokens.tobytes()).hexdigest(),
        }
        key = conversion_key(settings=settings, config=checkpoint.config, stamps=checkpoint.stamps)
        with (
            open_journal(staging / JOURNAL, key) as journal,
            ShardWriter(output, list(tensors), max_shard_bytes) as writer,
        ):
            state = ConversionState(journal, writer)
            require_space(staging, stored_bytes - writer.total_bytes)
            copy_companions(original.path, output)
            converter = Converter(checkpoint, plan, writer, state)
            records = converter.run(progress, _calibration(original, plan, tokens, state))
        check_unchanged(checkpoint)
        write_config(checkpoint.config, records, output)
        hashes, refinement = writer.hashes, {}
        if training is not None:
            with state.timed("refine"):
                refined, refinement = _refined(output, original, training, chosen, progress)
            hashes |= refined
        manifest = Manifest(
            source=source.name,
            revision=source.revision,
            recipe=recipe.to_dict(),
            versions=versions(),
            device=str(mx.default_device()),
            layers=tuple(records),
            linear_bits_per_weight=_linear_bits_per_weight(records),
            bits_per_weight=8 * writer.total_bytes / parameters,
            source_bytes=checkpoint.source_bytes,
            stored_bytes=writer.total_bytes,
            refinement=refinement,
            source_card=read_source_card(original.path),
            seconds=state.seconds_since(started),
            warnings=checkpoint.warnings,
            files=hash_files(output, hashes),
        )
        manifest.save(output)
    return manifest


@contextmanager
def _opened(
    source: Source, staging: Path, progress: Progress
) -> Iterator[tuple[LazyModel, Checkpoint]]:
    """Open the original; a GGUF file is unpacked in `staging`, and stamped in place of that."""
    files = gguf_files(source.path) if source.path.is_file() else []
    own = {file: stamp(file) for file in files if file.is_file()}  # a missing part is named below
    with as_directory(source, progress, scratch=staging) as directory:
        checkpoint = open_checkpoint(directory)
        if own:
            checkpoint.stamps.clear()
            checkpoint.stamps.update(own)
        yield LazyModel(directory, progress=progress), checkpoint


def _decide_bits(
    recipe: Recipe,
    original: LazyModel,
    progress: Progress,
    on_forecast: Callable[[Forecast], None] | None,
    max_shard_bytes: int,
) -> Recipe:
    """Return the recipe with bits and group size of every layer, where "auto" has to choose."""
    if recipe.method != "auto":
        return recipe
    forecast = choose_bits(original, recipe, progress, max_shard_bytes)
    if on_forecast:
        on_forecast(forecast)
    return forecast.recipe


def _texts(
    recipe: Recipe, plan: Plan, original: LazyModel, progress: Progress
) -> tuple[np.ndarray | None, np.ndarray | None]:
    """Return the tokens to calibrate on, and those to refine on; None where none are needed."""
    settings = recipe.calibration or Calibration()
    tokens = training = None
    if _statistics(plan):
        tokens = calibration_tokens(original, settings, progress)
    if recipe.refine:
        training = calibration_tokens(original, training_texts(settings), progress)
    return tokens, training


def _statistics(plan: Plan) -> dict[str, Callable[[mx.array], mx.array]]:
    """Return what has to be measured of the inputs of layers, by path."""
    wanted = {
        path: QUANTIZERS[layer.quantizer].statistic
        for path, layer in plan.layers.items()
        if layer.quantizer
    }
    return {path: statistic for path, statistic in wanted.items() if statistic}


def _calibration(
    original: LazyModel, plan: Plan, tokens: np.ndarray | None, state: ConversionState
) -> Iterator[InputStatistics] | None:
    if tokens is None:
        return None
    wanted = {
        path: statistic
        for path, statistic in _statistics(plan).items()
        if not state.is_done(f"{path}.weight", plan.layers[path])
    }
    model = load_model(original.path, lazy=True, dequantize=True)
    return iterate_blocks(model, tokens, wanted)


def _refined(
    output: Path, original: LazyModel, training: np.ndarray, recipe: Recipe, progress: Progress
) -> tuple[dict[str, str], dict[str, float]]:
    """Refine the converted model in place: new hashes of files, divergence before and after."""
    seed = (recipe.calibration or Calibration()).seed
    refined = refine(load_model(output), original.load(), training, seed=seed, progress=progress)
    hashes = replace_tensors(output, refined.tensors)
    return hashes, {"before": refined.before, "after": refined.after}


def _linear_bits_per_weight(records: Sequence[LayerRecord]) -> float:
    converted = [r for r in records if r.kind in ("linear", "experts") and r.action != "keep"]
    entries = sum(math.prod(r.shape) for r in converted)
    return 8 * sum(r.nbytes for r in converted) / entries if entries else 0.0
