"""Results of a study on disk: one JSON file for each part of each variant.

The parts are the conversion itself, ARC, perplexity, KL divergence, speed and a weight histogram;
see `schema.PARTS`. Every file names the machine and the package versions. Non-finite numbers, which
JSON lacks, are written as "inf", "-inf" and "nan".
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
    """Result of one part of one variant.

    Attributes:
        study: name of the study.
        variant: name of the variant.
        part: name of the part in `schema.PARTS`.
        settings: settings of the measurement.
        values: fields of the part's class in `schema.PARTS`.
        seconds: duration of the measurement, s.
        created: ISO 8601 time of the end of the measurement, UTC.
        machine: see `describe_machine`.
        versions: versions of Python and the packages.
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
    """A published figure."""

    what: str
    value: Number
    unit: str


@record
class Paper:
    """Published figures to compare with."""

    source: str
    claims: Annotated[tuple[Annotated[Claim, nested(Claim)], ...], Field(strict=False)]


@record
class StudyRecord:
    """Description of a study, stored with its results.

    Attributes:
        title: title of the report.
        model: repo id or path of the model.
        reference_variant: the unquantized variant that the others are compared with.
        notes: sentences for the report.
        paper: published figures to compare with.
        order: names of the variants in the order of the study.
    """

    title: str
    model: str
    reference_variant: Line
    notes: tuple[str, ...] = ()
    paper: Paper | None = None
    order: tuple[Line, ...] = ()


def result_file(directory: Path, variant: str, part: str) -> Path:
    """Return the file of a result: `<variant-slug>.<part>.json`.

    A slug that differs from the name ends with part of the name's hash, so that file names are
    unique.
    """
    slug = re.sub(r"[^a-z0-9]+", "-", variant.lower()).strip("-")[:60]
    if slug != variant:
        slug = f"{slug}-{hashlib.sha256(variant.encode()).hexdigest()[:6]}".lstrip("-")
    return directory / f"{slug}.{part}.json"


def save(result: Result, directory: Path) -> Path:
    """Write a result into `directory` atomically and return its file.

    Raises:
        SplitQuantError: when the settings cannot be written as JSON.
        TargetError: when the file cannot be written.
    """
    file = result_file(directory, result.variant, result.part)
    _write(encode(dataclasses.asdict(result)), file)
    return file


def save_study(study: StudyRecord, directory: Path) -> Path:
    """Write `directory`/study.json and return it. Raises TargetError."""
    file = directory / STUDY_FILE
    _write(encode(dataclasses.asdict(study)), file)
    return file


def load_results(directory: Path) -> list[Result]:
    """Read all results of a directory, sorted by file name.

    Raises:
        SplitQuantError: when there are none, a file is invalid, two files contain the same part of
            the same variant, or the files are of different studies.
    """
    if not directory.is_dir():
        raise SplitQuantError(f"{directory} is not a directory of results")
    files: dict[tuple[str, str], Path] = {}
    results: list[Result] = []
    for file in sorted(directory.glob("*.json")):
        if file.name == STUDY_FILE:
            continue
        result = load_result(file)
        other = files.setdefault((result.variant, result.part), file)
        if other != file:
            raise broken(file, f"{other.name} contains the same measurement: remove one of them")
        results.append(result)
        if result.study != results[0].study:
            raise broken(file, f"expected study {results[0].study!r}, got {result.study!r}")
    if not results:
        raise SplitQuantError(f"{directory} contains no results: run a study first")
    return results


def load_result(file: Path) -> Result:
    """Read one result. Raises SplitQuantError, naming the file, when it is invalid."""
    return _load(Result, file)


def load_study_record(directory: Path) -> StudyRecord:
    """Read `directory`/study.json. Raises SplitQuantError when it is missing or invalid."""
    return _load(StudyRecord, directory / STUDY_FILE)


def broken(file: Path, reason: str) -> SplitQuantError:
    """Return the error for an invalid results file."""
    return SplitQuantError(f"{file} is not a valid result: {reason}")


def _load(kind: type[T], file: Path) -> T:
    try:
        return load_json(kind, read_content(file))
    except ValueError as exc:
        raise broken(file, str(exc)) from exc


def read_content(file: Path) -> dict[str, Any]:
    """Read a JSON object. Raises SplitQuantError, naming the file."""
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
    """Convert a value to JSON types, and non-finite numbers to strings."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, Mapping):
        return {key: encode(item) for key, item in value.items()}
    return [encode(item) for item in value] if isinstance(value, list | tuple) else value
