"""Read multiple-choice questions in the layout of ARC (Clark et al. 2018, arXiv:1803.05457).

A question is {"id", "question", "choices": {"text": [..], "label": [..]}, "answerKey"}, one on
every line of a .jsonl file or in every row of a .parquet file, as on the hub. A .csv file has the
columns id, question, choices and answerKey, where choices is that object as JSON.
"""

import csv
import io
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from splitquant_mlx.data.text import _read_utf8
from splitquant_mlx.errors import RecipeError, SourceError, one_line
from splitquant_mlx.models.hub import fetch_dataset_file

ARC = "allenai/ai2_arc"
FOLDERS = {"arc_challenge": "ARC-Challenge", "arc_easy": "ARC-Easy"}
ARC_TASKS = tuple(FOLDERS)
SPLITS = ("train", "validation", "test")
COLUMNS = ("id", "question", "choices", "answerKey")
MAX_CHOICES = 26  # as many as there are letters

Row = tuple[str, Any]  # where in the file, and what stands there


@dataclass(frozen=True, kw_only=True)
class Question:
    """Hold a question, its options and which of them is right.

    Attributes:
        id: its name, unique in its file.
        question: its text.
        labels: what the file calls the options: A, B, C, .. or 1, 2, 3, ..
        choices: the options' texts, 2 to 26.
        answer: index of the right one.
    """

    id: str
    question: str
    labels: tuple[str, ...]
    choices: tuple[str, ...]
    answer: int


def load_questions(path: Path) -> list[Question]:
    """Read questions from a .jsonl, .parquet or .csv file.

    Raises:
        SourceError: when the file cannot be read or a question is malformed; it names the line,
            of .parquet the row.
    """
    readers: dict[str, Callable[[Path], Iterable[Row]]] = {
        ".jsonl": _jsonl_rows,
        ".parquet": _parquet_rows,
        ".csv": _csv_rows,
    }
    reader = readers.get(path.suffix.lower())
    if reader is None:
        raise SourceError(f"{path}: wanted a .jsonl, .parquet or .csv file, got {path.suffix!r}")
    first_seen: dict[str, str] = {}
    questions = []
    try:
        for where, row in reader(path):
            try:
                question = _question(row)
            except ValueError as exc:
                raise SourceError(f"{path}, {where}: {exc}") from exc
            if question.id in first_seen:
                raise SourceError(
                    f"{path}, {where}: the id {question.id!r} is taken by "
                    f"{first_seen[question.id]}: give every question its own"
                )
            first_seen[question.id] = where
            questions.append(question)
    except OSError as exc:
        raise SourceError(f"cannot read {path}: {exc.strerror or one_line(exc)}") from exc
    if not questions:
        raise SourceError(f"{path} holds no questions: give a file with some")
    return questions


def fetch_questions(task: str, split: str = "test") -> list[Question]:
    """Return the questions of ARC from the hub, or from the hub's cache on this machine.

    Args:
        task: "arc_challenge" or "arc_easy".
        split: "train", "validation" or "test".

    Raises:
        RecipeError: when there is no such task or split.
        SourceError: when they cannot be fetched.
    """
    if task not in FOLDERS:
        raise RecipeError(f"task: wanted {' or '.join(FOLDERS)}, got {task!r}")
    if split not in SPLITS:
        raise RecipeError(f"{task}: wanted the split {', '.join(SPLITS)}, got {split!r}")
    name = f"{FOLDERS[task]}/{split}-00000-of-00001.parquet"
    return load_questions(fetch_dataset_file(ARC, name))


def _jsonl_rows(path: Path) -> Iterator[Row]:
    for number, line in enumerate(_read_utf8(path).split("\n"), start=1):
        if line.strip():
            try:
                yield f"line {number}", json.loads(line)
            except (ValueError, RecursionError) as exc:
                raise SourceError(f"{path}, line {number}: not JSON ({one_line(exc)})") from exc


def _csv_rows(path: Path) -> Iterator[Row]:
    reader = csv.DictReader(io.StringIO(_read_utf8(path), newline=""), strict=True)
    try:
        _check_columns(path, list(reader.fieldnames or ()))
        for row in reader:
            where = f"line {reader.line_num}"
            try:
                yield where, {**row, "choices": json.loads(row["choices"] or "")}
            except (ValueError, RecursionError) as exc:
                raise SourceError(
                    f"{path}, {where}: choices is not JSON ({one_line(exc)})"
                ) from exc
    except csv.Error as exc:
        raise SourceError(
            f"{path}, near line {reader.line_num}: not CSV ({one_line(exc)})"
        ) from exc


def _parquet_rows(path: Path) -> Iterator[Row]:
    from pyarrow import ArrowException, parquet

    path.open("rb").close()  # pyarrow's own message for a file that cannot be opened is long
    try:
        table = parquet.ParquetFile(path)
        _check_columns(path, table.schema_arrow.names)
        rows = table.read(columns=list(COLUMNS)).to_pylist()
    except (ArrowException, ValueError, KeyError, OSError) as exc:
        raise SourceError(f"{path}: not a sound parquet file ({one_line(exc)})") from exc
    for number, row in enumerate(rows, start=1):
        yield f"row {number}", row


def _check_columns(path: Path, names: list[str]) -> None:
    if missing := [name for name in COLUMNS if name not in names]:
        raise SourceError(
            f"{path}: wanted the columns {', '.join(COLUMNS)}, got {', '.join(names) or 'none'}: "
            f"add {', '.join(missing)}"
        )


def _question(row: Any) -> Question:
    """Build a question from a row of the file. Raises ValueError saying what is wrong with it."""
    if not isinstance(row, dict):
        raise ValueError(f"wanted an object with {', '.join(COLUMNS)}, got a {type(row).__name__}")
    name, question, answer = (_text(row, key) for key in ("id", "question", "answerKey"))
    choices = row.get("choices")
    if not isinstance(choices, dict):
        raise ValueError('wanted "choices" to be an object with the lists "text" and "label"')
    texts, labels = _texts(choices, "text"), _texts(choices, "label")
    if len(texts) != len(labels):
        raise ValueError(f"the choices have {len(texts)} texts and {len(labels)} labels")
    if not 2 <= len(texts) <= MAX_CHOICES:
        raise ValueError(f"wanted 2 to {MAX_CHOICES} choices, got {len(texts)}")
    if len(set(labels)) < len(labels):
        raise ValueError(f"two choices have the same label: {', '.join(labels)}")
    if answer not in labels:
        raise ValueError(f"the answerKey {answer!r} is none of the labels {', '.join(labels)}")
    return Question(
        id=name, question=question, labels=labels, choices=texts, answer=labels.index(answer)
    )


def _texts(choices: dict[str, Any], key: str) -> tuple[str, ...]:
    values = choices.get(key)
    if not isinstance(values, list):
        raise ValueError(f'wanted "choices" to have a list "{key}"')
    return tuple(_text({key: value}, key) for value in values)


def _text(row: dict[str, Any], key: str) -> str:
    value = row.get(key)
    if not isinstance(value, str) or not value.strip():
        got = "none" if value is None else "an empty one" if value == "" else repr(value)[:40]
        raise ValueError(f'wanted a "{key}" that is a string with some text, got {got}')
    if "\0" in value:
        raise ValueError(f'the "{key}" holds a NUL character')
    if not value.isascii():
        value.encode()  # JSON can write half a character; its error is a ValueError
    return value
