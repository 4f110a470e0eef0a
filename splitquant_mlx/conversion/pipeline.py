"""Convert a model: the stages of a conversion in order."""

import json
import math
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from hashlib import sha256
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from splitquant_mlx.calibration.blocks import in_block_order
from splitquant_mlx.calibration.predictions import predict
from splitquant_mlx.calibration.saved_state import SavedState
from splitquant_mlx.calibration.statistics import InputStatistics, iterate_blocks
from splitquant_mlx.calibration.tokens import calibration_tokens
from splitquant_mlx.conversion.bits import Forecast, choose_bits
from splitquant_mlx.conversion.blockwise import learn_blocks
from splitquant_mlx.conversion.converter import Converter, source_array
from splitquant_mlx.conversion.plan import Plan, make_plan
from splitquant_mlx.conversion.quantizers import QUANTIZERS
from splitquant_mlx.conversion.refine import refine, require_texts, training_texts
from splitquant_mlx.conversion.resume import ConversionState, open_journal, timed
from splitquant_mlx.conversion.save import (
    copy_companions,
    hash_files,
    program_notes,
    require_space,
    write_config,
)
from splitquant_mlx.conversion.staging import (
    JOURNAL,
    MODEL,
    REFINEMENT,
    check_target,
    remove_leftover,
    staged,
)
from splitquant_mlx.errors import SplitQuantWarning
from splitquant_mlx.formats.gguf import gguf_files
from splitquant_mlx.formats.head_file import write_head
from splitquant_mlx.formats.manifest import LayerRecord, Manifest
from splitquant_mlx.formats.model_card import read_source_card
from splitquant_mlx.formats.patch import replace_tensors
from splitquant_mlx.formats.shard_writer import MAX_SHARD_BYTES, ShardWriter
from splitquant_mlx.models.architecture import parameters, widest_input
from splitquant_mlx.models.checkpoint import Checkpoint, check_unchanged, open_checkpoint, stamp
from splitquant_mlx.models.directory import as_directory
from splitquant_mlx.models.lazy import LazyModel
from splitquant_mlx.models.loader import load_model, tokenizer_problem
from splitquant_mlx.models.source import Source, resolve
from splitquant_mlx.progress import SILENT, Progress
from splitquant_mlx.recipe import LEARNED, Recipe
from splitquant_mlx.runtime.environment import versions

ONLY_WEIGHTS = "the result will contain only weights, which chat and eval cannot run"


def convert(
    model: str | Path | Source,
    mlx_path: str | Path = "mlx_model",
    *,
    recipe: Recipe | None = None,
    revision: str | None = None,
    overwrite: bool = False,
    progress: Progress = SILENT,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    on_forecast: Callable[[Forecast], None] | None = None,
) -> Manifest:
    """Quantize a model and save it as a checkpoint that mlx-lm and `load` run.

    After a kill or a power cut, the same call resumes: weights that were written are not converted
    again. Calibrated methods run the model again up to the block where they stopped.

    Args:
        model: hub repo id, directory, .gguf file, or a resolved source.
        mlx_path: directory to write; it is created once it is complete.
        recipe: the settings; None is SplitQuantV2 with 3 clusters, 4 bits, groups of 64.
        revision: branch, tag or commit of a hub repo.
        overwrite: replace `mlx_path` if it exists and is a model directory.
        progress: progress reporter.
        max_shard_bytes: maximum size of a safetensors file, bytes.
        on_forecast: called with the result of an "auto" recipe before the conversion.

    Returns:
        The manifest, which is also saved in `mlx_path` as splitquant.json.

    Warns:
        SplitQuantWarning: the model has no usable tokenizer.

    Raises:
        SplitQuantError: the source cannot be found or used, the recipe is not valid for it, or the
            target cannot be written. Nothing is written in this case.
    """
    recipe, target = recipe or Recipe(), Path(mlx_path)
    started = time.perf_counter()
    remove_leftover(target)
    check_target(target, overwrite=overwrite)
    source = model if isinstance(model, Source) else resolve(str(model), revision=revision)
    with (
        staged(target, overwrite=overwrite, source=source.path) as staging,
        _opened(source, staging, progress) as (original, checkpoint),
    ):
        # with calibration, a missing tokenizer is an error later on
        if recipe.calibration is None and (problem := tokenizer_problem(original.path)):
            warnings.warn(f"{problem}: {ONLY_WEIGHTS}", SplitQuantWarning, stacklevel=2)
        recipe = recipe.for_model(widest_input(checkpoint.model))
        job = Job(original, checkpoint, staging, progress, max_shard_bytes)
        chosen = job.decide_bits(recipe, on_forecast)
        plan = make_plan(chosen, checkpoint.model, checkpoint.config)
        tokens, training = job.texts(chosen, plan)
        written = job.write(chosen, plan, tokens)
        refinement = {} if training is None else job.refine(written, training, chosen)
        for layer in (record for record in written.records if record.head):
            written.nbytes += write_head(job.output, layer.path, layer.head)
        manifest = job.manifest(written, source, recipe, refinement, started)
        manifest.save(job.output)
    return manifest


@dataclass(eq=False)
class Written:
    """Result of writing the tensors of a conversion.

    Attributes:
        records: one per planned layer.
        nbytes: size of all tensors, bytes.
        parameters: number of entries of the source's tensors.
        hashes: file name -> SHA-256.
        state: the conversion's state, with the seconds of each stage.
    """

    records: list[LayerRecord]
    nbytes: int
    parameters: int
    hashes: dict[str, str]
    state: ConversionState


@dataclass(frozen=True)
class Job:
    """The stages of one conversion.

    Attributes:
        original: the model to convert.
        checkpoint: its tensors, loaded lazily.
        staging: directory to write to until the conversion is complete.
        progress: progress reporter.
        max_shard_bytes: maximum size of a safetensors file, bytes.
        seconds: time of each stage before the first weight is written, s.
    """

    original: LazyModel
    checkpoint: Checkpoint
    staging: Path
    progress: Progress
    max_shard_bytes: int
    seconds: dict[str, float] = field(default_factory=dict)

    @property
    def output(self) -> Path:
        """Return the directory of the converted model."""
        return self.staging / MODEL

    def decide_bits(self, recipe: Recipe, on_forecast: Callable[[Forecast], None] | None) -> Recipe:
        """Return the recipe; an "auto" recipe with bits and group size chosen for every layer."""
        if recipe.method != "auto":
            return recipe
        with timed(self.seconds, "choose bits"):
            forecast = choose_bits(self.original, recipe, self.progress, self.max_shard_bytes)
        if on_forecast:
            on_forecast(forecast)
        return forecast.recipe

    def texts(self, recipe: Recipe, plan: Plan) -> tuple[np.ndarray | None, np.ndarray | None]:
        """Return the tokens for calibration and for refinement; None where not needed."""
        tokens = training = None
        if _statistics(plan) or recipe.method in LEARNED:
            with timed(self.seconds, "sample text"):
                tokens = calibration_tokens(self.original, recipe.texts, self.progress)
        if recipe.refine:
            settings = training_texts(recipe.texts)
            with timed(self.seconds, "sample text"):
                training = calibration_tokens(self.original, settings, self.progress)
            require_texts(training)
        return tokens, training

    def write(self, recipe: Recipe, plan: Plan, tokens: np.ndarray | None) -> Written:
        """Convert and write all weights that an interrupted conversion has not written."""
        checkpoint = self.checkpoint
        names = list(parameters(checkpoint.model))
        if tokens is not None:
            names = in_block_order(checkpoint.model, names)
        sources = {name: source_array(checkpoint, plan.dtype, name) for name in names}
        tensors, stored_bytes = plan.tensors(sources), plan.stored_bytes(sources)
        entries = sum(array.size for array in sources.values())
        del sources
        key = {  # everything that the written bytes depend on
            "recipe": {key: v for key, v in recipe.to_dict().items() if key != "refine"},
            "device": mx.default_device().type.name,
            "max_shard_bytes": self.max_shard_bytes,
            "calibration": None if tokens is None else sha256(tokens.tobytes()).hexdigest(),
            "versions": versions(),
            "config": sha256(json.dumps(checkpoint.config, sort_keys=True).encode()).hexdigest(),
            "files": {file.name: list(stamp) for file, stamp in checkpoint.stamps.items()},
        }
        with (
            open_journal(self.staging / JOURNAL, key) as journal,
            ShardWriter(self.output, tensors, self.max_shard_bytes) as writer,
        ):
            state = ConversionState(journal, writer)
            for stage, seconds in self.seconds.items():
                state.seconds[stage] = state.seconds.get(stage, 0.0) + seconds
            require_space(self.staging, stored_bytes - writer.total_bytes)
            copy_companions(self.original.path, self.output)
            converter = Converter(checkpoint, plan, writer, state)
            calibration = self._calibration(recipe, plan, tokens, state)
            records = converter.run(self.progress, calibration)
        check_unchanged(checkpoint)
        write_config(checkpoint.config, records, self.output)
        return Written(records, writer.total_bytes, entries, writer.hashes, state)

    def _calibration(
        self, recipe: Recipe, plan: Plan, tokens: np.ndarray | None, state: ConversionState
    ) -> Iterator[InputStatistics] | None:
        if tokens is None:
            return None
        statistics = {
            path: statistic
            for path, statistic in _statistics(plan).items()
            if not state.is_done(f"{path}.weight", plan.layers[path])
        }
        learned = {
            path: layer
            for path, layer in plan.layers.items()
            if layer.quantizer in LEARNED and not state.is_done(f"{path}.weight", layer)
        }
        if learned:
            sweeps = recipe.sweeps or 0
            return learn_blocks(self._load_lazily, tokens, learned, statistics, sweeps)
        return iterate_blocks(self._load_lazily, tokens, statistics)

    def _load_lazily(self) -> nn.Module:
        return load_model(self.original.path, lazy=True, dequantize=True)

    def refine(self, written: Written, training: np.ndarray, recipe: Recipe) -> dict[str, float]:
        """Refine the converted model in place; return its divergence before and after."""
        seed = recipe.texts.seed
        key = repr((sorted(written.hashes.items()), seed)).encode() + training.tobytes()
        saved_state = SavedState(self.staging / REFINEMENT / sha256(key).hexdigest())
        settings = {"progress": self.progress, "saved_state": saved_state}
        with timed(written.state.seconds, "refine"):
            predictions = predict(self._load_lazily, training, **settings)
            refined = refine(load_model(self.output), predictions, training, seed=seed, **settings)
            written.hashes.update(replace_tensors(self.output, refined.tensors))
        return {"before": refined.before, "after": refined.after}

    def manifest(
        self,
        written: Written,
        source: Source,
        recipe: Recipe,
        refinement: dict[str, float],
        started: float,
    ) -> Manifest:
        """Return the manifest of the conversion, which started at `started`."""
        return Manifest(
            source=source.name,
            revision=source.revision,
            recipe=recipe.to_dict(),
            versions=versions(),
            device=mx.default_device().type.name,
            layers=tuple(written.records),
            linear_bits_per_weight=_linear_bits_per_weight(written.records),
            bits_per_weight=8 * written.nbytes / written.parameters,
            source_bytes=self.checkpoint.source_bytes,
            stored_bytes=written.nbytes,
            refinement=refinement,
            source_card=read_source_card(self.original.path),
            seconds=written.state.seconds_since(started),
            warnings=(
                *self.checkpoint.warnings,
                *program_notes(self.checkpoint.config, written.records),
            ),
            files=hash_files(self.output, written.hashes),
        )


@contextmanager
def _opened(
    source: Source, staging: Path, progress: Progress
) -> Iterator[tuple[LazyModel, Checkpoint]]:
    """Open the original; a GGUF file is imported into `staging`, and checked for changes itself."""
    files = gguf_files(source.path) if source.path.is_file() else []
    stamps = {file: stamp(file) for file in files if file.is_file()}  # missing files: see below
    with as_directory(source, progress, scratch=staging) as directory:
        checkpoint = open_checkpoint(directory)
        checkpoint = replace(checkpoint, stamps=stamps or checkpoint.stamps)
        yield LazyModel(directory, progress=progress), checkpoint


def _statistics(plan: Plan) -> dict[str, Callable[[mx.array], mx.array]]:
    """Return the statistic of the inputs that each layer's quantizer needs, by path."""
    return {
        path: statistic
        for path, layer in plan.layers.items()
        if layer.quantizer and (statistic := QUANTIZERS[layer.quantizer].statistic)
    }


def _linear_bits_per_weight(records: Sequence[LayerRecord]) -> float:
    converted = [r for r in records if r.kind in ("linear", "experts") and r.action != "keep"]
    entries = sum(math.prod(r.shape) for r in converted)
    return 8 * sum(r.nbytes for r in converted) / entries if entries else 0.0
