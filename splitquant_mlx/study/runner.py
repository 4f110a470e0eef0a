"""Run a study: convert a model by every recipe, measure each variant, and write the results.

Existing results of the same model, settings and data are reused, so that an interrupted study
resumes where it stopped. Measurements whose data cannot be fetched are listed in the report and
skipped.
"""

import dataclasses
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, cached_property, partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from splitquant_mlx.bench.programs import OURS, run_program
from splitquant_mlx.bench.speed import Workload
from splitquant_mlx.conversion.bits import choose_bits
from splitquant_mlx.conversion.staging import remove_leftover
from splitquant_mlx.conversion.verify import check_files
from splitquant_mlx.data.questions import Question, fetch_questions
from splitquant_mlx.data.text import cut_windows, encode, text_hash
from splitquant_mlx.demo.model import fetch_demo_model
from splitquant_mlx.errors import CheckpointError
from splitquant_mlx.evaluation.arc import Exam, evaluate_arc
from splitquant_mlx.evaluation.divergence import Divergence, measure_both
from splitquant_mlx.evaluation.perplexity import Perplexity, measure_perplexity
from splitquant_mlx.evaluation.reference import open_reference
from splitquant_mlx.evaluation.task import window_length
from splitquant_mlx.formats.manifest import load_manifest
from splitquant_mlx.models.architecture import widest_input
from splitquant_mlx.models.checkpoint import open_checkpoint
from splitquant_mlx.models.directory import as_directory
from splitquant_mlx.models.lazy import LazyModel
from splitquant_mlx.models.source import Source, resolve
from splitquant_mlx.progress import SILENT, Progress
from splitquant_mlx.recipe import Recipe
from splitquant_mlx.runtime.disk import as_target_error, remove
from splitquant_mlx.runtime.workspace import empty, workspace
from splitquant_mlx.study.data import Data
from splitquant_mlx.study.results import Result, StudyRecord, load_results, save, save_study
from splitquant_mlx.study.spec import FOREIGN, ORIGINAL, Study, slug
from splitquant_mlx.study.values import (
    convert_values,
    measured_sizes,
    speed_values,
    weights_values,
)

Measurement = Callable[[], dict[str, Any]]  # returns the values of a part
Parts = dict[str, tuple[dict[str, Any], Measurement]]  # settings and measurement, by part


def run_study(
    study: Study,
    directory: Path,
    *,
    data: dict[str, Path] | None = None,
    keep_models: bool = False,
    progress: Progress = SILENT,
) -> None:
    """Run `study` and write its results into `directory`, for `report.load_report`.

    Args:
        study: the study.
        directory: directory of the results; existing results with the same settings are reused.
        data: files to use instead of the hub's data sets, by "arc_challenge", "arc_easy", "text".
        keep_models: keep the converted models in `directory`/models.
        progress: progress reporter.

    Raises:
        SplitQuantError: when the model cannot be fetched, a conversion fails, a data file is
            invalid, or another process uses `directory`.
    """
    source = fetch_demo_model(progress) if study.model == "demo" else None
    source = source or resolve(study.model, revision=study.revision)
    with (
        _locked(directory) as scratch,
        as_directory(source, progress, scratch=scratch) as original,
    ):
        runner = _Runner(
            study=study,
            source=source,
            original=original,
            directory=directory,
            scratch=scratch,
            data=Data(files=data or {}),
            keep_models=keep_models,
            progress=progress,
        )
        with progress.task(study.title, 1 + len(study.variants)) as advance:
            runner.measure_original()
            for name, variant in study.variants.items():
                runner.describe()
                advance(1)
                if isinstance(variant, Recipe):
                    runner.measure(name, variant)
                else:
                    runner.measure_foreign(name, variant)
            runner.describe()
            advance(1)
        runner.finish()


@contextmanager
def _locked(directory: Path) -> Iterator[Path]:
    """Lock `directory` against other studies; yield a directory in it for temporary files."""
    scratch = directory / ".running"
    with as_target_error(directory):
        directory.mkdir(parents=True, exist_ok=True)
        with workspace(scratch, f"a study in {directory}"):
            empty(scratch)
            yield scratch


@dataclass(eq=False, kw_only=True)
class _Runner:
    study: Study
    source: Source
    original: Path
    directory: Path
    scratch: Path
    data: Data
    keep_models: bool
    progress: Progress

    def __post_init__(self) -> None:
        self.reference = LazyModel(self.original, progress=self.progress)
        self.reused = 0  # results of an earlier run that were reused
        results = load_results(self.directory) if any(self.directory.glob("*.*.json")) else []
        self.done = {(result.variant, result.part): result.settings for result in results}

    def measure_original(self) -> None:
        """Measure the original model."""
        original = self.original
        parts: Parts = {
            "convert": ({}, lambda: measured_sizes(original, original, ORIGINAL)),
            **self._answers(LazyModel(original), ORIGINAL),
            **self._speed(original),
        }
        if windows := self._windows:
            parts["perplexity"] = (windows.settings, lambda: self._perplexity(windows))
        self._measure_parts(ORIGINAL, parts)

    def measure(self, name: str, recipe: Recipe) -> None:
        """Convert the model by one recipe and measure the result."""
        path = self.directory / "models" / slug(name)
        remove_leftover(path)
        model = LazyModel(path)
        parts: Parts = {
            "convert": ({}, lambda: self._convert(recipe, path)),
            **self._answers(model, name, recipe),
            **self._text(model),
            **self._speed(path),
        }
        if recipe.method == "splitquant":
            parts["weights"] = ({}, lambda: weights_values(self.original, path))
        try:
            self._measure_parts(name, parts, recipe, path)
        finally:
            if not self.keep_models:
                remove(path)

    def measure_foreign(self, name: str, source: str) -> None:
        """Measure a checkpoint of the same model that another program converted."""
        with as_directory(resolve(source), self.progress, scratch=self.scratch) as path:
            model = LazyModel(path)
            parts: Parts = {
                "convert": ({}, lambda: measured_sizes(path, self.original, FOREIGN)),
                **self._answers(model, name),
                **self._text(model),
                **self._speed(path),
            }
            parts = {p: ({**s, "foreign": model.hash}, f) for p, (s, f) in parts.items()}
            self._measure_parts(name, parts)

    def describe(self) -> None:
        """Write the study record, for the report."""
        study = self.study
        missing = [f"{name} was not measured: {why}" for name, why in self.data.missing.items()]
        record = StudyRecord(
            title=study.title,
            model=self.source.name,
            reference_variant=ORIGINAL,
            notes=(*study.notes, *missing),
            paper=study.paper,
            order=(ORIGINAL, *study.variants),
        )
        save_study(record, self.directory)

    def finish(self) -> None:
        """Remove the journals, which only an interrupted study needs."""
        self._report_reused("nothing is left to measure")
        for task in self.study.measure.arc:
            for protocol in self.study.measure.protocols:
                self._journal(task, protocol).unlink(missing_ok=True)

    def _journal(self, task: str, protocol: str) -> Path:
        return self.directory / f"{task}.{protocol}.journal"

    def _measure_parts(
        self, name: str, parts: Parts, recipe: Recipe | None = None, path: Path | None = None
    ) -> None:
        """Measure and save the parts without a result of the same settings.

        Args:
            name: name of the variant.
            parts: parts to measure.
            recipe: recipe of a variant that the study converts.
            path: directory of the converted model.
        """
        shared = {"model_hash": self.reference.hash, "recipe": recipe.to_dict() if recipe else {}}
        shared["device"] = mx.default_device().type.name
        converted = False
        for part, (part_settings, measurement) in parts.items():
            settings = {**shared, **part_settings}
            if self.done.get((name, part)) == settings:
                self.reused += 1
                continue
            self._report_reused(f"continuing with {part} of {name}")
            if path and recipe and part != "convert" and not converted:
                if not self._is_complete(path, recipe):
                    self._convert(recipe, path)
            converted = True
            with self.progress.task(f"{name}: {part}"):
                start = time.perf_counter()
                values = measurement()
                seconds = time.perf_counter() - start
            result = Result(
                study=self.study.name,
                variant=name,
                part=part,
                settings=settings,
                values=values,
                seconds=seconds,
            )
            save(result, self.directory)

    def _report_reused(self, status: str) -> None:
        """Report once how many results were reused."""
        if self.reused:
            self.progress.note(f"{self.reused} results of an earlier run reused: {status}")
        self.reused = 0

    def _is_complete(self, path: Path, recipe: Recipe) -> bool:
        """Return whether an interrupted study left a complete model of this recipe."""
        try:
            manifest = load_manifest(path)
        except CheckpointError:
            return False
        if manifest is None:
            return False
        resolved = recipe.for_model(widest_input(open_checkpoint(self.original).model))
        if manifest.recipe != resolved.to_dict():
            return False
        return not check_files(path, manifest, self.progress).problems

    def _convert(self, recipe: Recipe, path: Path) -> dict[str, Any]:
        """Convert in a separate process, to measure its peak memory."""
        file = self.scratch / "recipe.toml"
        file.write_text(recipe.to_toml(), encoding="utf-8")
        command = [*OURS, "convert", "--model", str(self.original), "--recipe", str(file)]
        command += ["--mlx-path", str(path), "--overwrite"]
        run = run_program([*command, "--device", mx.default_device().type.name])
        manifest = load_manifest(path)
        if manifest is None:
            raise CheckpointError(f"{path} was converted without a manifest")
        values = convert_values(manifest, recipe, path, run.peak_bytes)
        if recipe.method == "auto":  # the conversion cached the sensitivities
            planned = choose_bits(self.reference, recipe, self.progress)
            values["forecast_kl"] = sum(planned.divergence.values())
        return {**values, "model_hash": LazyModel(path, progress=self.progress).hash}

    def _answers(self, model: LazyModel, name: str, recipe: Recipe | None = None) -> Parts:
        measure = self.study.measure
        parts: Parts = {}
        for task in measure.arc:
            questions = self.data.questions(task, measure.questions)
            settings: dict[str, Any] = {"num_shots": measure.num_shots}
            settings["questions"] = [question.id for question in questions]
            if task in self.data.files:  # files can change under the same ids
                settings["content"] = text_hash(repr(questions))
            for protocol in measure.protocols if questions else ():
                parts[f"{task}.{protocol}"] = (
                    settings,
                    partial(self._arc, model, task, protocol, questions, f"{name} {recipe}"),
                )
        return parts

    def _text(self, model: LazyModel) -> Parts:
        """Return the parts for KL divergence and perplexity, which share one pass of the model."""
        windows = self._windows
        if windows is None:
            return {}

        @cache
        def both() -> tuple[Divergence, Perplexity]:
            reference = open_reference(
                windows.tokens,
                model_hash=self.reference.hash,
                load=self.reference.load,
                progress=self.progress,
            )
            return measure_both(model.model, reference, progress=self.progress)

        return {
            "kl": (windows.settings, lambda: dataclasses.asdict(both()[0])),
            "perplexity": (windows.settings, lambda: dataclasses.asdict(both()[1])),
        }

    def _speed(self, path: Path) -> Parts:
        measure = self.study.measure
        if not measure.prompt_tokens:
            return {}
        workload = Workload(
            prompt_tokens=measure.prompt_tokens, generation_tokens=measure.generation_tokens
        )
        settings = {**dataclasses.asdict(workload), "trials": measure.trials}
        return {"speed": (settings, lambda: speed_values(path, workload, measure.trials))}

    def _arc(
        self, model: LazyModel, task: str, protocol: str, questions: list[Question], variant: str
    ) -> dict[str, Any]:
        num_shots = self.study.measure.num_shots if protocol == "loglikelihood" else 0
        exam = Exam(
            task=task,
            questions=questions,
            protocol=protocol,
            shots=fetch_questions(task, "train") if num_shots else (),
            num_shots=num_shots,
        )
        result = evaluate_arc(
            model.model,
            self.reference.tokenizer,
            exam,
            journal=self._journal(task, protocol),
            model_hash=f"{self.reference.hash} {variant}",
            progress=self.progress,
        )
        values = dataclasses.asdict(result)
        return {name: values[name] for name in values if name not in ("task", "protocol", "ids")}

    def _perplexity(self, windows: "_Windows") -> dict[str, Any]:
        result = measure_perplexity(
            LazyModel(self.original).model,
            windows.tokens.reshape(-1),
            context_length=windows.tokens.shape[1],
            progress=self.progress,
        )
        return dataclasses.asdict(result)

    @cached_property
    def _windows(self) -> "_Windows | None":
        measure = self.study.measure
        text = self.data.text() if measure.text_tokens else None
        if text is None:
            return None
        tokens = encode(self.reference.tokenizer, text[: 16 * measure.text_tokens])
        length = window_length(measure.context_length, [self.reference])
        windows = cut_windows(tokens, length, max(1, measure.text_tokens // length))
        return _Windows(windows, {"text": text_hash(text), "windows": list(windows.shape)})


@dataclass(frozen=True, eq=False)
class _Windows:
    tokens: np.ndarray
    settings: dict[str, Any]
