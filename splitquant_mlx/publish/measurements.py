"""Measurements of a checkpoint, from result files of `eval --json` and `run`.

A result belongs to a checkpoint if it was measured on files of equal content (`eval` stores their
hash, `run` that of each conversion) or, in a study, on a conversion of the same original with the
same recipe. Other results are refused.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from splitquant_mlx.errors import RecipeError, SplitQuantError
from splitquant_mlx.evaluation.settings import ARC_TASKS
from splitquant_mlx.models.directory import as_directory
from splitquant_mlx.models.lazy import model_hash
from splitquant_mlx.models.source import Source, cached
from splitquant_mlx.progress import Progress
from splitquant_mlx.publish.files import Converted
from splitquant_mlx.recipe import Recipe
from splitquant_mlx.settings import load_json, record
from splitquant_mlx.study.results import (
    STUDY_FILE,
    Result,
    broken,
    load_result,
    read_content,
    result_file,
)
from splitquant_mlx.study.schema import PARTS, Line, check_values
from splitquant_mlx.study.spec import ORIGINAL

SHOWN = ("kl", "perplexity", *(part for part in PARTS if part.startswith(ARC_TASKS)))


@record
class Evaluation:
    """Content of a file written by `eval --json`."""

    model: str
    task: Line
    settings: dict[str, Any]
    values: dict[str, Any]
    device: Line
    machine: dict[str, Any]
    versions: dict[str, Any]
    reference: str | None = None
    model_hash: Line | None = None


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """One measured part of a checkpoint.

    Attributes:
        part: a part of `study.schema.PARTS`, or a task of lm-eval.
        values: measured values.
        settings: settings of the measurement.
        device: "cpu" or "gpu".
        machine: machine, as of `environment.describe_machine`.
        versions: versions of Python and the packages.
        reference: model it was compared with, or "".
        is_study: the result is of a study, which compares with the original.
        reference_values: values of the reference; empty without one.
    """

    part: str
    values: Mapping[str, Any]
    settings: Mapping[str, Any]
    device: str
    machine: Mapping[str, Any]
    versions: Mapping[str, Any]
    reference: str = ""
    is_study: bool = False
    reference_values: Mapping[str, Any]


def find_measurements(
    converted: Converted, paths: Sequence[Path], progress: Progress
) -> list[Measurement]:
    """Read the measurements of a checkpoint.

    Args:
        converted: the checkpoint.
        paths: result files, each of this checkpoint, and directories with some of this checkpoint.
            If empty and the checkpoint is in `models` of a study, the results of the study.
        progress: progress reporter for hashing the checkpoint.

    Raises:
        SplitQuantError: when a file is unusable or of another model, or a directory has no result
            of this checkpoint.
    """
    reader = _ResultReader(converted, progress)
    measurements: list[Measurement] = []
    for path in paths:
        if not path.is_dir():
            measurements.append(reader.read(path))
            continue
        before, reason = len(measurements), ""
        for file in sorted(path.glob("*.json")):
            try:
                measurements.append(reader.read(file))
            except _OtherModel as exc:
                if exc.is_similar or not reason:
                    reason = f"{file.name}: {exc.reason}"
        if len(measurements) == before:
            reason = reason or "it has no .json file"
            raise SplitQuantError(f"{path} has no result of {converted.path}: {reason}")
    home = converted.path.resolve().parent
    if not paths and home.name == "models" and (home.parent / STUDY_FILE).is_file():
        for file in sorted(home.parent.glob("*.json")):
            with suppress(SplitQuantError):
                measurements.append(reader.read(file))
    shown = [m for m in measurements if m.part in SHOWN or m.part not in PARTS]
    order = {part: index for index, part in enumerate(SHOWN)}
    return sorted(shown, key=lambda measurement: order.get(measurement.part, len(order)))


class _OtherModel(SplitQuantError):
    """Report that a result is of another model, which may be a similar one."""

    def __init__(self, file: Path, converted: Converted, reason: str, *, is_similar: bool):
        super().__init__(f"{file} is not a result of {converted.path}: {reason}")
        self.reason = reason
        self.is_similar = is_similar


class _ResultReader:
    """A reader of the results of one checkpoint."""

    def __init__(self, converted: Converted, progress: Progress):
        self.converted = converted
        self.progress = progress

    def read(self, file: Path) -> Measurement:
        """Read a file. Raises _OtherModel when it is of another model."""
        content = read_content(file)
        if "schema" in content:
            return self._read_study_result(file)
        if "task" in content:
            return self._read_evaluation(file, content)
        raise self._other(file, "it was written neither by eval nor by run", is_similar=False)

    def _other(self, file: Path, reason: str, *, is_similar: bool = True) -> _OtherModel:
        return _OtherModel(file, self.converted, reason, is_similar=is_similar)

    def _read_study_result(self, file: Path) -> Measurement:
        result = load_result(file)
        settings = dict(result.settings)
        recipe, source_hash = settings.pop("recipe", None), settings.pop("model_hash", None)
        if not isinstance(recipe, dict) or not recipe or not self._same_recipe(recipe):
            reason = f"the variant {result.variant!r:.60} has another recipe"
            raise self._other(file, reason, is_similar=False)
        converted_hash = _converted_hash(file, result)
        if converted_hash is None or converted_hash != self.hash:
            if self.source_hash is None:
                raise self._other(
                    file,
                    "its original cannot be compared with that of the checkpoint, which is not on "
                    f"this machine ({self.converted.manifest.source!r:.80})",
                )
            if source_hash != self.source_hash:
                raise self._other(file, "it has another original")
        return Measurement(
            part=result.part,
            values=result.values,
            settings=settings,
            device=str(settings.get("device")),
            machine=result.machine,
            versions=result.versions,
            is_study=True,
            reference_values=_original_values(file, result.part, result.settings),
        )

    def _read_evaluation(self, file: Path, content: Mapping[str, Any]) -> Measurement:
        try:
            evaluation = load_json(Evaluation, _known_fields(Evaluation, content))
        except ValueError as exc:
            raise broken(file, str(exc)) from exc
        if evaluation.model_hash is None:
            raise self._other(file, "it has no model hash: evaluate the model again")
        if evaluation.model_hash != self.hash:
            raise self._other(file, "it is of a model with other content")
        part, values = evaluation.task, evaluation.values
        part = f"{part}.{values.get('protocol')}" if part in ARC_TASKS else part
        other = values.get("reference")
        return Measurement(
            part=part,
            values=_part_values(file, part, values),
            settings={**evaluation.settings, "text": values.get("text_sha256")},
            device=evaluation.device,
            machine=evaluation.machine,
            versions=evaluation.versions,
            reference=evaluation.reference or "",
            reference_values=_part_values(file, part, other) if isinstance(other, dict) else {},
        )

    def _same_recipe(self, values: dict[str, Any]) -> bool:
        try:
            return Recipe.from_dict(values) == self.converted.recipe
        except RecipeError:
            return False

    @cached_property
    def hash(self) -> str:
        """Return the hash of the checkpoint."""
        return model_hash(self.converted.path, self.progress)

    @cached_property
    def source_hash(self) -> str | None:
        """Return the hash of the original; None if it is not on this machine."""
        manifest = self.converted.manifest
        try:
            if manifest.revision is not None:
                source = cached(manifest.source, revision=manifest.revision)
            else:
                path = Path(manifest.source).expanduser()
                source = Source(name=manifest.source, path=path, revision=None)
            if source is None or not source.path.exists():
                return None
            with as_directory(source, self.progress) as directory:
                return model_hash(directory, self.progress)
        except (SplitQuantError, OSError, ValueError, RuntimeError):
            return None


def _known_fields(class_: Any, content: Mapping[str, Any]) -> dict[str, Any]:
    """Return the entries that are fields of a class; files of other versions may have more."""
    names = {field.name for field in dataclasses.fields(class_)}
    return {name: value for name, value in content.items() if name in names}


def _part_values(file: Path, part: str, values: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the checked values of a part. Raises SplitQuantError that names `file`."""
    if part not in PARTS:  # a task of lm-eval
        numbers = {name: v for name, v in values.items() if isinstance(v, int | float)}
        if not all(map(math.isfinite, numbers.values())) or len(numbers) != len(values):
            raise broken(file, "expected finite numbers as values")
        return numbers
    try:
        return check_values(part, _known_fields(PARTS[part], values))
    except ValueError as exc:
        raise broken(file, str(exc)) from exc


def _converted_hash(file: Path, result: Result) -> str | None:
    """Return the hash of the converted model that a result was measured on; None if unknown."""
    sibling = result_file(file.parent, result.variant, "convert")
    if not sibling.is_file():
        return None
    conversion = load_result(sibling)
    for name in ("model_hash", "recipe"):
        if conversion.settings.get(name) != result.settings.get(name):
            return None
    return conversion.values.get("model_hash")


def _original_values(file: Path, part: str, settings: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the original's values with the same settings; empty if not measured."""
    original = result_file(file.parent, ORIGINAL, part)
    if not original.is_file():
        return {}
    result = load_result(original)
    return result.values if dict(result.settings) == {**settings, "recipe": {}} else {}
