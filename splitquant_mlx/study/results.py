"""Results of a study on disk: one JSON file for each measured part of each variant.

A study converts one model by several recipes, its variants, and measures parts of each: the
conversion itself, ARC, perplexity, KL divergence, speed. Every file names the machine and the
versions that it was made with. Numbers that JSON lacks are written as "inf", "-inf" and "nan".
"""

import dataclasses
import hashlib
import json
import math
import re
from collections.abc import Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import Field

from splitquant_mlx.errors import SplitQuantError, one_line
from splitquant_mlx.runtime.disk import as_target_error, write_atomic
from splitquant_mlx.runtime.environment import describe_machine, versions
from splitquant_mlx.settings import load_json, nested, record, settings
from splitquant_mlx.study.schema import Line, Number, check_values

SCHEMA = 1
STUDY_FILE = "study.json"
T = TypeVar("T")


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


@settings
class Result:
    """Result of measuring one part of one variant.

    Attributes:
        study: name of the study.
        variant: name of the variant.
        part: what was measured, a name in `schema.PARTS`.
        settings: what it was measured with.
        values: what was measured, the fields of the part's class in `schema.PARTS`.
        seconds: time of the measurement, s.
        created: ISO 8601 time of its end, UTC.
        machine: as from `describe_machine`.
        versions: of Python and the packages.
        schema: version of the file format.
    """

    study: Line
    variant: Line
    part: Line
    settings: dict[str, Any]
    values: dict[str, Any]
    seconds: float
    created: Line = Field(default_factory=_now)
    machine: dict[str, Any] = Field(default_factory=describe_machine)
    versions: dict[str, str] = Field(default_factory=versions)
    schema: Literal[1] = SCHEMA

    def __post_init__(self) -> None:
        values = check_values(self.part, encode(self.values))
        object.__setattr__(self, "values", values)


@record
class Claim:
    """A figure that a paper states."""

    what: str
    value: Number
    unit: str


@record
class Paper:
    """A paper's figures, to stand beside those measured here."""

    source: str
    claims: Annotated[tuple[Annotated[Claim, nested(Claim)], ...], Field(strict=False)]


@record
class StudyRecord:
    """Description of the study that a directory of results belongs to.

    Attributes:
        title: heading of its report.
        model: repo id or path of the model.
        reference_variant: the unquantized variant that the others are compared with.
        notes: what a reader should know.
        paper: a publication whose figures are shown beside those measured here.
        order: the variants in the order of the study.
    """

    title: str
    model: str
    reference_variant: Line
    notes: tuple[str, ...] = ()
    paper: Paper | None = None
    order: tuple[Line, ...] = ()


def result_file(directory: Path, variant: str, part: str) -> Path:
    """Return the file of one measurement: `<variant-slug>.<part>.json`.

    A slug that differs from the name ends in a few digits of the name's hash, so that no two
    variants share a file.
    """
    slug = re.sub(r"[^a-z0-9]+", "-", variant.lower()).strip("-")[:60]
    if slug != variant:
        slug = f"{slug}-{hashlib.sha256(variant.encode()).hexdigest()[:6]}".lstrip("-")
    return directory / f"{slug}.{part}.json"


def save(result: Result, directory: Path) -> Path:
    """Write a result into `directory` atomically and return its file.

    Raises:
        SplitQuantError: when its settings cannot be written as JSON.
        TargetError: when the file cannot be written.
    """
    file = result_file(directory, result.variant, result.part)
    _write(encode(dataclasses.asdict(result)), file)
    return file


def save_study(study: StudyRecord, directory: Path) -> Path:
    """Write `directory`/study.json and return it. Raises TargetError when that fails."""
    file = directory / STUDY_FILE
    _write(encode(dataclasses.asdict(study)), file)
    return file


def load_results(directory: Path) -> list[Result]:
    """Read every result of a directory, sorted by file name.

    Raises:
        SplitQuantError: when there is none, when a file is broken or unknown, when two hold the
            same measurement, or when they are of different studies; it names the file.
    """
    if not directory.is_dir():
        raise SplitQuantError(f"{directory} is not a directory of results")
    found: dict[tuple[str, str], Path] = {}
    results: list[Result] = []
    for file in sorted(directory.glob("*.json")):
        if file.name == STUDY_FILE:
            continue
        result = load_result(file)
        other = found.setdefault((result.variant, result.part), file)
        if other != file:
            raise broken(file, f"{other.name} holds the same measurement, remove one of them")
        results.append(result)
        if result.study != results[0].study:
            raise broken(file, f"study {result.study!r}, the others are of {results[0].study!r}")
    if not results:
        raise SplitQuantError(f"{directory} holds no results: run a study first")
    return results


def load_result(file: Path) -> Result:
    """Read one result. Raises SplitQuantError, naming the file, when it is not valid."""
    return _load(Result, file)


def load_study_record(directory: Path) -> StudyRecord:
    """Read `directory`/study.json. Raises SplitQuantError when it is missing or not valid."""
    return _load(StudyRecord, directory / STUDY_FILE)


def broken(file: Path, reason: str) -> SplitQuantError:
    """Return the error that says what is wrong with a results file."""
    return SplitQuantError(f"{file} is not a usable result: {reason}")


def _load(kind: type[T], file: Path) -> T:
    try:
        return load_json(kind, read_content(file))
    except ValueError as exc:
        raise broken(file, str(exc)) from exc


def read_content(file: Path) -> dict[str, Any]:
    """Read a JSON object. Raises SplitQuantError, naming the file, when that cannot be done."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except OSError as exc:
        raise SplitQuantError(f"{file} cannot be read: {exc.strerror or exc}") from exc
    except (ValueError, RecursionError) as exc:
        raise broken(file, f"not valid JSON ({exc})") from exc
    if not isinstance(content, dict):
        raise broken(file, "expected a JSON object")
    return content


def _write(content: Any, file: Path) -> None:
    try:
        written = json.dumps(content, indent=2, allow_nan=False, ensure_ascii=False) + "\n"
    except (TypeError, ValueError) as exc:
        raise SplitQuantError(f"{file.name} cannot be written as JSON: {one_line(exc)}") from exc
    with as_target_error(file):
        file.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(file, written.encode())


def encode(value: Any) -> Any:
    """Return a value as JSON has it: numbers that JSON lacks as strings."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, Mapping):
        return {key: encode(item) for key, item in value.items()}
    return [encode(item) for item in value] if isinstance(value, list | tuple) else value
