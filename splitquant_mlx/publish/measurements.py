"""Measurements of a checkpoint, from files that `eval --json` and `run` wrote.

A figure belongs to a checkpoint when it was measured on files of the same content (the hash that
`eval` writes, and `run` for each conversion), or, of a study, on a conversion of the same original
by the same recipe. Anything else is some other model's, and refused.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
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
    """What `eval --json` writes."""

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
        part: as in `study.schema.PARTS`, or a task of lm-eval.
        values: what was measured.
        settings: what it was measured with.
        device: "cpu" or "gpu".
        machine: as from `environment.describe_machine`.
        versions: of Python and the packages.
        reference: what it was compared with; empty if nothing.
        reference_values: the same of the reference; empty if nothing.
    """

    part: str
    values: Mapping[str, Any]
    settings: Mapping[str, Any]
    device: str
    machine: Mapping[str, Any]
    versions: Mapping[str, Any]
    reference: str = ""
    reference_values: Mapping[str, Any]


def find_measurements(
    converted: Converted, given: Sequence[Path], progress: Progress
) -> list[Measurement]:
    """Read the measurements of a checkpoint.

    Args:
        converted: the checkpoint.
        given: files, each of which must be about this checkpoint, and directories, of which
            those that are about it are taken; a study's own where the checkpoint lies in its
            `models` and nothing is given.
        progress: progress reporter, for the hashing of the checkpoint.

    Raises:
        SplitQuantError: when a file cannot be used or is about another model, or a directory
            holds nothing about this one.
    """
    owner = _Owner(converted, progress)
    found: list[Measurement] = []
    for path in given:
        if not path.is_dir():
            found.append(owner.read(path))
            continue
        before, reason = len(found), ""
        for file in sorted(path.glob("*.json")):
            try:
                found.append(owner.read(file))
            except _OtherModel as exc:
                if exc.is_near or not reason:
                    reason = f"of {file.name} {exc.reason}"
        if len(found) == before:
            reason = reason or "there is no .json file in it"
            raise SplitQuantError(f"{path} holds no result of {converted.path}: {reason}")
    home = converted.path.resolve().parent
    if not given and home.name == "models" and (home.parent / STUDY_FILE).is_file():
        for file in sorted(home.parent.glob("*.json")):
            try:
                found.append(owner.read(file))
            except SplitQuantError:  # nobody asked for this one
                continue
    shown = [measured for measured in found if measured.part in SHOWN or measured.part not in PARTS]
    order = {part: number for number, part in enumerate(SHOWN)}
    return sorted(shown, key=lambda measured: order.get(measured.part, len(order)))


class _OtherModel(SplitQuantError):
    """Report that a result is not about the checkpoint, though it may be near."""

    def __init__(self, file: Path, converted: Converted, reason: str, *, is_near: bool):
        super().__init__(f"{file} is no result of {converted.path}: {reason}")
        self.reason = reason
        self.is_near = is_near


class _Owner:
    """Read results that belong to one checkpoint."""

    def __init__(self, converted: Converted, progress: Progress):
        self.converted = converted
        self.progress = progress

    def read(self, file: Path) -> Measurement:
        """Read a file. Raises _OtherModel when it is about something else."""
        content = read_content(file)
        if "schema" in content:
            return self._of_study(file)
        if "task" in content:
            return self._of_evaluation(file, content)
        raise self._other(file, "it was written neither by eval nor by run", is_near=False)

    def _other(self, file: Path, reason: str, *, is_near: bool = True) -> _OtherModel:
        return _OtherModel(file, self.converted, reason, is_near=is_near)

    def _of_study(self, file: Path) -> Measurement:
        result = load_result(file)
        settings = dict(result.settings)
        recipe, source_hash = settings.pop("recipe", None), settings.pop("model_hash", None)
        if not isinstance(recipe, dict) or not recipe or not self._same_recipe(recipe):
            reason = f"the variant {result.variant!r:.60} has another recipe"
            raise self._other(file, reason, is_near=False)
        converted_hash = _converted_hash(file, result)
        if converted_hash is None or converted_hash != self.hash:
            if self.source_hash is None:
                raise self._other(
                    file,
                    "it is unknown whether it has the same original, which is not on this "
                    f"machine ({self.converted.manifest.source!r:.80})",
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
            reference="the original",
            reference_values=_original_values(file, result.part, result.settings),
        )

    def _of_evaluation(self, file: Path, content: Mapping[str, Any]) -> Measurement:
        try:
            found = load_json(Evaluation, _known(Evaluation, content))
        except ValueError as exc:
            raise broken(file, str(exc)) from exc
        if found.model_hash is None:
            raise self._other(file, "it names no model hash: measure again with this eval")
        if found.model_hash != self.hash:
            raise self._other(file, "it measured a model of other content")
        part, protocol = found.task, found.values.get("protocol")
        part = f"{part}.{protocol}" if part in ARC_TASKS else part
        other = found.values.get("reference")
        return Measurement(
            part=part,
            values=_part_values(file, part, found.values),
            settings={**found.settings, "text": found.values.get("text_sha256")},
            device=found.device,
            machine=found.machine,
            versions=found.versions,
            reference=found.reference or "",
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
        """Return the hash of the original; None where it is not on this machine."""
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


def _known(kind: Any, content: Mapping[str, Any]) -> dict[str, Any]:
    """Return the entries that are fields of a class: files of other versions may have more."""
    names = {field.name for field in dataclasses.fields(kind)}
    return {name: value for name, value in content.items() if name in names}


def _part_values(file: Path, part: str, values: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the values that a part has, checked. Raises SplitQuantError, naming `file`."""
    if part not in PARTS:  # a task of lm-eval
        numbers = {name: v for name, v in values.items() if isinstance(v, int | float)}
        if not all(map(math.isfinite, numbers.values())) or len(numbers) != len(values):
            raise broken(file, "expected values that are finite numbers")
        return numbers
    try:
        return check_values(part, _known(PARTS[part], values))
    except ValueError as exc:
        raise broken(file, str(exc)) from exc


def _converted_hash(file: Path, result: Result) -> str | None:
    """Return the hash of the converted model that a result is about."""
    sibling = result_file(file.parent, result.variant, "convert")
    if not sibling.is_file():
        return None
    conversion = load_result(sibling)
    same = all(
        conversion.settings.get(name) == result.settings.get(name)
        for name in ("model_hash", "recipe")
    )
    return conversion.values.get("model_hash") if same else None


def _original_values(file: Path, part: str, settings: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the original's values with the same settings; empty if it was not measured."""
    original = result_file(file.parent, ORIGINAL, part)
    if not original.is_file():
        return {}
    result = load_result(original)
    return result.values if dict(result.settings) == {**settings, "recipe": {}} else {}
