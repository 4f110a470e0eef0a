"""Run a study: convert a model by every recipe, measure each variant, and write every result.

An existing result of the same model, settings and data is not measured again, so an interrupted
study resumes where it stopped. Data that cannot be fetched is named in the report; the rest is
measured.
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
from splitquant_mlx.conversion.staging import sweep
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
from splitquant_mlx.models.directory import as_directory
from splitquant_mlx.models.lazy import LazyModel
from splitquant_mlx.models.source import Source, resolve
from splitquant_mlx.progress import SILENT, Progress
from splitquant_mlx.recipe import Recipe
from splitquant_mlx.runtime.disk import as_target_error, remove
from splitquant_mlx.runtime.workspace import empty, workspace
from splitquant_mlx.study.data import Data
from splitquant_mlx.study.results import (
    Result,
    StudyRecord,
    load_results,
    save,
    save_study,
)
from splitquant_mlx.study.spec import FOREIGN, ORIGINAL, Study, slug
from splitquant_mlx.study.values import (
    convert_values,
    measured_sizes,
    speed_values,
    weights_values,
)

Measurement = Callable[[], dict[str, Any]]


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
        study: what to do.
        directory: of the results; existing ones are kept where their settings still hold.
        data: files in place of the hub's data sets, by "arc_challenge", "arc_easy" and "text".
        keep_models: leave the converted models in `directory`/models.
        progress: progress reporter.

    Raises:
        SplitQuantError: when the model cannot be fetched, a conversion fails, a data file is not
            valid, or another process is at work in `directory`.
    """
    source = fetch_demo_model(progress) if study.model == "demo" else None
    source = source or resolve(study.model, revision=study.revision)
    with (
        _held(directory) as scratch,
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
def _held(directory: Path) -> Iterator[Path]:
    """Lock `directory` against other studies; yields a directory in it for temporary files."""
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
        self.before = 0  # measurements that are not made again
        found = load_results(self.directory) if any(self.directory.glob("*.*.json")) else []
        self.done = {(result.variant, result.part): result.settings for result in found}

    def measure_original(self) -> None:
        """Measure the model as it is."""
        original = self.original
        parts = {
            "convert": ({}, lambda: measured_sizes(original, original, ORIGINAL)),
            **self._answers(LazyModel(original), ORIGINAL),
            **self._speed(original),
        }
        if windows := self._windows:
            parts["perplexity"] = (windows.settings, lambda: self._perplexity(windows))
        self._take(ORIGINAL, parts)

    def measure(self, name: str, recipe: Recipe) -> None:
        """Convert the model by one recipe and measure the result."""
        home = self.directory / "models" / slug(name)
        sweep(home)
        opened = LazyModel(home)
        parts: dict[str, tuple[dict[str, Any], Measurement]] = {
            "convert": ({}, lambda: self._convert(recipe, home)),
            **self._answers(opened, name, recipe),
            **self._text(opened),
            **self._speed(home),
        }
        if recipe.method == "splitquant":
            parts["weights"] = ({}, lambda: weights_values(self.original, home))
        with _removed(home, self.keep_models):
            self._take(name, parts, recipe, home)

    def measure_foreign(self, name: str, path: str) -> None:
        """Measure a checkpoint that another program made of the same model."""
        source = resolve(path)
        with as_directory(source, self.progress, scratch=self.scratch) as home:
            model = LazyModel(home)
            parts: dict[str, tuple[dict[str, Any], Measurement]] = {
                "convert": ({}, lambda: measured_sizes(home, self.original, FOREIGN)),
                **self._answers(model, name),
                **self._text(model),
                **self._speed(home),
            }
            self._take(
                name,
                {part: ({**own, "foreign": model.hash}, f) for part, (own, f) in parts.items()},
            )

    def describe(self) -> None:
        """Write the description of the study, for the report."""
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
        """Remove what only an interrupted study needs."""
        self._tell_what_was_done("nothing is left to measure")
        for task in self.study.measure.arc:
            for protocol in self.study.measure.protocols:
                self._journal(task, protocol).unlink(missing_ok=True)

    def _journal(self, task: str, protocol: str) -> Path:
        return self.directory / f"{task}.{protocol}.journal"

    def _take(
        self,
        name: str,
        parts: dict[str, tuple[dict[str, Any], Measurement]],
        recipe: Recipe | None = None,
        home: Path | None = None,
    ) -> None:
        """Measure the parts that no result with the same settings holds."""
        shared = {"model_hash": self.reference.hash, "recipe": recipe.to_dict() if recipe else {}}
        shared["device"] = mx.default_device().type.name
        ready = False
        for part, (own, measurement) in parts.items():
            settings = {**shared, **own}
            if self.done.get((name, part)) == settings:
                self.before += 1
                continue
            self._tell_what_was_done(f"going on with {part} of {name}")
            if home and recipe and part != "convert" and not ready:
                if not self._is_whole(home, recipe):
                    self._convert(recipe, home)
            ready = True
            with self.progress.task(f"{name}: {part}"):
                started = time.perf_counter()
                values = measurement()
                seconds = time.perf_counter() - started
            result = Result(
                study=self.study.name,
                variant=name,
                part=part,
                settings=settings,
                values=values,
                seconds=seconds,
            )
            save(result, self.directory)

    def _tell_what_was_done(self, rest: str) -> None:
        """Say, once, from where an interrupted study goes on."""
        if self.before:
            self.progress.note(f"{self.before} measurements were made before: {rest}")
        self.before = 0

    def _is_whole(self, home: Path, recipe: Recipe) -> bool:
        """Tell whether an interrupted study left a whole model of this recipe."""
        try:
            manifest = load_manifest(home)
        except CheckpointError:
            return False
        if manifest is None or manifest.recipe != recipe.to_dict():
            return False
        return not check_files(home, manifest, self.progress).problems

    def _convert(self, recipe: Recipe, home: Path) -> dict[str, Any]:
        """Convert in a process of its own, to measure its peak memory."""
        file = self.scratch / "recipe.toml"
        file.write_text(recipe.to_toml(), encoding="utf-8")
        command = [*OURS, "convert", "--model", str(self.original), "--recipe", str(file)]
        command += ["--mlx-path", str(home), "--overwrite"]
        run = run_program([*command, "--device", mx.default_device().type.name])
        manifest = load_manifest(home)
        if manifest is None:
            raise CheckpointError(f"{home} was converted without a manifest")
        values = convert_values(manifest, recipe, home, run.peak_bytes)
        if recipe.method == "auto":  # whose sensitivities the conversion left in the cache
            planned = choose_bits(self.reference, recipe, self.progress)
            values["forecast_kl"] = sum(planned.divergence.values())
        return {**values, "model_hash": LazyModel(home, progress=self.progress).hash}

    def _answers(
        self, opened: LazyModel, name: str, recipe: Recipe | None = None
    ) -> dict[str, tuple[dict[str, Any], Measurement]]:
        measure = self.study.measure
        parts: dict[str, tuple[dict[str, Any], Measurement]] = {}
        for task in measure.arc:
            questions = self.data.questions(task, measure.questions)
            asked: dict[str, Any] = {"num_shots": measure.num_shots}
            asked["questions"] = [question.id for question in questions]
            if task in self.data.files:  # which may say anything else under the same ids
                asked["content"] = text_hash(repr(questions))
            for protocol in measure.protocols if questions else ():
                parts[f"{task}.{protocol}"] = (
                    asked,
                    partial(self._arc, opened, task, protocol, questions, f"{name} {recipe}"),
                )
        return parts

    def _text(self, opened: LazyModel) -> dict[str, tuple[dict[str, Any], Measurement]]:
        """Divergence and perplexity of a variant, of which one run of the model is enough."""
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
            return measure_both(opened.model, reference, progress=self.progress)

        return {
            "kl": (windows.settings, lambda: dataclasses.asdict(both()[0])),
            "perplexity": (windows.settings, lambda: dataclasses.asdict(both()[1])),
        }

    def _speed(self, path: Path) -> dict[str, tuple[dict[str, Any], Measurement]]:
        measure = self.study.measure
        if not measure.prompt_tokens:
            return {}
        workload = Workload(
            prompt_tokens=measure.prompt_tokens, generation_tokens=measure.generation_tokens
        )
        settings = {**dataclasses.asdict(workload), "trials": measure.trials}
        return {"speed": (settings, lambda: speed_values(path, workload, measure.trials))}

    def _arc(
        self, opened: LazyModel, task: str, protocol: str, questions: list[Question], variant: str
    ) -> dict[str, Any]:
        journal = self._journal(task, protocol)
        shots = self.study.measure.num_shots if protocol == "loglikelihood" else 0
        exam = Exam(
            task=task,
            questions=questions,
            protocol=protocol,
            shots=fetch_questions(task, "train") if shots else (),
            num_shots=shots,
        )
        found = evaluate_arc(
            opened.model,
            self.reference.tokenizer,
            exam,
            journal=journal,
            model_hash=f"{self.reference.hash} {variant}",
            progress=self.progress,
        )
        values = dataclasses.asdict(found)
        return {name: values[name] for name in values if name not in ("task", "protocol", "ids")}

    def _perplexity(self, windows: "_Windows") -> dict[str, Any]:
        found = measure_perplexity(
            LazyModel(self.original).model,
            windows.tokens.reshape(-1),
            context_length=windows.tokens.shape[1],
            progress=self.progress,
        )
        return dataclasses.asdict(found)

    @cached_property
    def _windows(self) -> "_Windows | None":
        measure = self.study.measure
        text = self.data.text() if measure.text_tokens else None
        if text is None:
            return None
        tokens = encode(self.reference.tokenizer, text[: 16 * measure.text_tokens])
        length = window_length(measure.context_length, [self.reference])
        cut = cut_windows(tokens, length, max(1, measure.text_tokens // length))
        return _Windows(cut, {"text": text_hash(text), "windows": list(cut.shape)})


@dataclass(frozen=True, eq=False)
class _Windows:
    tokens: np.ndarray
    settings: dict[str, Any]


@contextmanager
def _removed(home: Path, keep: bool) -> Iterator[None]:
    try:
        yield
    finally:
        if not keep:
            remove(home)
