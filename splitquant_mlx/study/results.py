"""Keep the results of a study: one JSON file for each measured part of each variant.

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
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from splitquant_mlx.errors import SplitQuantError, TargetError, one_line
from splitquant_mlx.runtime.disk import write_atomic
from splitquant_mlx.runtime.environment import describe_machine, versions
from splitquant_mlx.study.schema import (
    Checks,
    broken,
    check,
    check_values,
    each,
    finite,
    line,
    number,
    optional,
    table,
    text,
)

SCHEMA = 1
STUDY_FILE = "study.json"
NOT_FINITE = {"inf": math.inf, "-inf": -math.inf, "nan": math.nan}


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


@dataclass(frozen=True, kw_only=True)
class Result:
    """Record one measured part of one variant.

    Attributes:
        study: name of the study.
        variant: name of the variant.
        part: what was measured, a name in `result_parts.PARTS`.
        settings: what it was measured with.
        values: what was found; `result_parts.PARTS` lists the entries of each part.
        seconds: time the measurement took, s.
        created: ISO 8601 time of its end, UTC.
        machine: as from `describe_machine`.
        versions: of Python and the packages.
    """

    study: str
    variant: str
    part: str
    settings: Mapping[str, Any]
    values: Mapping[str, Any]
    seconds: float
    created: str = field(default_factory=_now)
    machine: Mapping[str, Any] = field(default_factory=describe_machine)
    versions: Mapping[str, str] = field(default_factory=versions)


@dataclass(frozen=True, kw_only=True)
class Claim:
    """Hold one figure that a paper states."""

    what: str
    value: float
    unit: str


@dataclass(frozen=True, kw_only=True)
class Paper:
    """Hold a paper's figures, to stand beside ours."""

    source: str
    claims: tuple[Claim, ...]


@dataclass(frozen=True, kw_only=True)
class StudyRecord:
    """Describe the study that a directory of results belongs to.

    Attributes:
        title: heading of its report.
        model: repo id or path of the model.
        reference_variant: the unquantized variant that the others are compared with.
        notes: what a reader should know.
        paper: a publication whose figures are shown beside ours.
        order: the variants in the order of the tables; others follow.
    """

    title: str
    model: str
    reference_variant: str
    notes: tuple[str, ...] = ()
    paper: Paper | None = None
    order: tuple[str, ...] = ()


_RESULT: Checks = {
    "study": line,
    "variant": line,
    "part": line,
    "settings": table,
    "values": table,
    "seconds": finite,
    "created": line,
    "machine": table,
    "versions": table,
}
_STUDY: Checks = {
    "title": text,
    "model": text,
    "reference_variant": line,
    "notes": optional(each(text)),
    "paper": optional(table),
    "order": optional(each(line)),
}
_CLAIM: Checks = {"what": text, "value": number, "unit": text}
_PAPER: Checks = {"source": text, "claims": each(table)}


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
    """Write a result into `directory`, all of it or nothing, and return its file.

    Raises:
        SplitQuantError: when the result is not of the form that `load_results` reads.
        TargetError: when the file cannot be written.
    """
    if not line(result.variant):
        raise SplitQuantError(f"variant: wanted a name of one printable line: {result.variant!r}")
    file = result_file(directory, result.variant, result.part)
    content = _encode({"schema": SCHEMA, **dataclasses.asdict(result)})
    _parse(content, file)
    _write(content, file)
    return file


def save_study(study: StudyRecord, directory: Path) -> Path:
    """Write `directory`/study.json and return it. Raises TargetError when that fails."""
    file = directory / STUDY_FILE
    _write(_encode(dataclasses.asdict(study)), file)
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
    """Read one result. Raises SplitQuantError, naming the file, when it is broken or unknown."""
    return _parse(read_content(file), file)


def load_study(directory: Path) -> StudyRecord:
    """Read `directory`/study.json. Raises SplitQuantError when it is missing or broken."""
    file = directory / STUDY_FILE
    content = read_content(file)
    check(content, _STUDY, file)
    found = _decode(content.get("paper"))
    if found is not None:
        check(found, _PAPER, file, "paper.")
        for claim in found["claims"]:
            check(claim, _CLAIM, file, "paper.claims.")
    return StudyRecord(
        title=content["title"],
        model=content["model"],
        reference_variant=content["reference_variant"],
        notes=tuple(content.get("notes") or ()),
        paper=found and Paper(source=found["source"], claims=tuple(map(_claim, found["claims"]))),
        order=tuple(content.get("order") or ()),
    )


def _claim(content: Mapping[str, Any]) -> Claim:
    return Claim(**{name: content[name] for name in _CLAIM})


def _parse(content: dict[str, Any], file: Path) -> Result:
    if content.get("schema") != SCHEMA:
        raise broken(file, f"schema {content.get('schema')!r}, wanted {SCHEMA}")
    check(content, _RESULT, file)
    values = _decode(content["values"])
    check_values(content["part"], values, file)
    return Result(**{**{name: content[name] for name in _RESULT}, "values": values})


def read_content(file: Path) -> dict[str, Any]:
    """Read a JSON object. Raises SplitQuantError, naming the file, when that cannot be done."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except OSError as exc:
        raise SplitQuantError(f"{file} cannot be read: {exc.strerror or exc}") from exc
    except (ValueError, RecursionError) as exc:
        raise broken(file, f"no valid JSON ({exc})") from exc
    if not isinstance(content, dict):
        raise broken(file, "wanted a JSON object")
    return content


def _write(content: Any, file: Path) -> None:
    try:
        written = json.dumps(content, indent=2, allow_nan=False, ensure_ascii=False) + "\n"
    except (TypeError, ValueError) as exc:
        raise SplitQuantError(f"{file.name} cannot be kept as JSON: {one_line(exc)}") from exc
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(file, written.encode())
    except OSError as exc:
        raise TargetError(f"cannot write {file}: {exc.strerror or exc}") from exc


def _encode(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, Mapping):
        return {key: _encode(item) for key, item in value.items()}
    return [_encode(item) for item in value] if isinstance(value, list | tuple) else value


def _decode(value: Any) -> Any:
    if isinstance(value, str):
        return NOT_FINITE.get(value, value)
    if isinstance(value, Mapping):
        return {key: _decode(item) for key, item in value.items()}
    return [_decode(item) for item in value] if isinstance(value, list) else value
