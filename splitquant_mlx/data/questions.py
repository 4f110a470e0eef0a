"""Read multiple-choice questions in the layout of ARC (Clark et al. 2018, arXiv:1803.05457).

A question is {"id", "question", "choices": {"text": [..], "label": [..]}, "answerKey"}, one per
line of a .jsonl file or per row of a .parquet file, as on the hub. A .csv file has the columns id,
question, choices and answerKey, where choices is that object as JSON.

The files of AI2's archive are supported, too: the .jsonl has question and choices in one object,
{"stem", "choices": [{"text", "label"}, ..]}; the .csv has the columns questionID, question and
AnswerKey, and the options in the question's text: "Which is it? (A) this (B) that".
"""

import csv
import io
import json
import string
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from splitquant_mlx.data.text import Row, check_columns, jsonl_rows, parquet_rows, read_utf8
from splitquant_mlx.errors import RecipeError, SourceError, one_line
from splitquant_mlx.models.hub import fetch_dataset_file

ARC = "allenai/ai2_arc"
FOLDERS = {"arc_challenge": "ARC-Challenge", "arc_easy": "ARC-Easy"}
SPLITS = ("train", "validation", "test")
COLUMNS = ("id", "question", "choices", "answerKey")
AI2_COLUMNS = ("questionID", "question", "AnswerKey")
MAX_CHOICES = 26  # letters A to Z


@dataclass(frozen=True, kw_only=True)
class Question:
    """A multiple-choice question.

    Attributes:
        id: unique id within its file.
        question: text of the question.
        labels: labels of the options in the file: A, B, C, .. or 1, 2, 3, ..
        choices: texts of the options, 2 to 26.
        answer: index of the correct option.
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
            or the row of a .parquet file.
    """
    readers: dict[str, Callable[[Path], Iterable[Row]]] = {
        ".jsonl": jsonl_rows,
        ".parquet": lambda path: parquet_rows(path, COLUMNS),
        ".csv": _csv_rows,
    }
    reader = readers.get(path.suffix.lower())
    if reader is None:
        raise SourceError(f"{path}: expected a .jsonl, .parquet or .csv file, got {path.suffix!r}")
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
                    f"{path}, {where}: the id {question.id!r} is already in use in "
                    f"{first_seen[question.id]}: give every question a unique id"
                )
            first_seen[question.id] = where
            questions.append(question)
    except OSError as exc:
        raise SourceError(f"cannot read {path}: {exc.strerror or one_line(exc)}") from exc
    if not questions:
        raise SourceError(f"{path} contains no questions: give another file")
    return questions


def fetch_questions(task: str, split: str = "test") -> list[Question]:
    """Return the questions of ARC from the hub or its local cache.

    Args:
        task: "arc_challenge" or "arc_easy".
        split: "train", "validation" or "test".

    Raises:
        RecipeError: when the task or the split is unknown.
        SourceError: when the questions cannot be fetched.
    """
    if task not in FOLDERS:
        raise RecipeError(f"expected {' or '.join(FOLDERS)}, got {task!r}", field="task")
    if split not in SPLITS:
        raise RecipeError(f"expected one of {', '.join(SPLITS)}, got {split!r}", field="split")
    name = f"{FOLDERS[task]}/{split}-00000-of-00001.parquet"
    return load_questions(fetch_dataset_file(ARC, name))


def _csv_rows(path: Path) -> Iterator[Row]:
    reader = csv.DictReader(io.StringIO(read_utf8(path), newline=""), strict=True)
    try:
        names = list(reader.fieldnames or ())
        is_ai2 = set(AI2_COLUMNS) <= set(names)
        if not is_ai2:
            check_columns(path, COLUMNS, names)
        for row in reader:
            where = f"line {reader.line_num}"
            try:
                yield where, _ai2_row(row) if is_ai2 else _csv_row(row)
            except ValueError as exc:
                raise SourceError(f"{path}, {where}: {one_line(exc)}") from exc
    except csv.Error as exc:
        raise SourceError(
            f"{path}, near line {reader.line_num}: not CSV ({one_line(exc)})"
        ) from exc


def _csv_row(row: dict[str, str]) -> dict[str, Any]:
    try:
        return {**row, "choices": json.loads(row["choices"] or "")}
    except (ValueError, RecursionError) as exc:
        raise ValueError(f"choices: expected JSON ({one_line(exc)})") from exc


def _ai2_row(row: dict[str, str]) -> dict[str, Any]:
    """Convert a row of AI2's .csv to the layout of the hub."""
    text = row["question"] or ""
    for labels in (string.ascii_uppercase, string.digits[1:]):
        starts = [text.rfind(f"({labels[0]})")]
        for label in labels[1:] if starts[0] >= 0 else "":
            if (start := text.find(f"({label})", starts[-1] + 3)) < 0:
                break
            starts.append(start)
        if len(starts) > 1:
            ends = [*starts[1:], len(text)]
            texts = [text[a + 3 : b].strip() for a, b in zip(starts, ends, strict=True)]
            choices = {"text": texts, "label": list(labels[: len(texts)])}
            question = text[: starts[0]].strip()
            key = (row["AnswerKey"] or "").strip()
            return {
                "id": row["questionID"], "question": question, "choices": choices, "answerKey": key
            }  # fmt: skip
    raise ValueError('expected options such as "(A) this (B) that" in the question, got none')


def _question(row: Any) -> Question:
    """Build a question from a row of a file. Raises ValueError when the row is malformed."""
    if not isinstance(row, dict):
        raise ValueError(
            f"expected an object with {', '.join(COLUMNS)}, got a {type(row).__name__}"
        )
    if isinstance(inner := row.get("question"), dict):  # the layout of AI2's archive
        options = inner.get("choices")
        if not isinstance(options, list) or not all(isinstance(o, dict) for o in options):
            raise ValueError('expected "question" to have a list "choices" of objects')
        choices = {key: [option.get(key) for option in options] for key in ("text", "label")}
        row = {**row, "question": inner.get("stem"), "choices": choices}
    id_, question, answer = (_text(row, key) for key in ("id", "question", "answerKey"))
    choices = row.get("choices")
    if not isinstance(choices, dict):
        raise ValueError('expected "choices" to be an object with the lists "text" and "label"')
    texts, labels = _texts(choices, "text"), _texts(choices, "label")
    if len(texts) != len(labels):
        raise ValueError(f"expected one label per text, got {len(texts)} and {len(labels)}")
    if not 2 <= len(texts) <= MAX_CHOICES:
        raise ValueError(f"expected 2 to {MAX_CHOICES} choices, got {len(texts)}")
    if len(set(labels)) < len(labels):
        raise ValueError(f"expected unique labels, got {', '.join(labels)}")
    if answer not in labels:
        raise ValueError(f"answerKey: expected one of {', '.join(labels)}, got {answer!r}")
    return Question(
        id=id_, question=question, labels=labels, choices=texts, answer=labels.index(answer)
    )


def _texts(choices: dict[str, Any], key: str) -> tuple[str, ...]:
    values = choices.get(key)
    if not isinstance(values, list):
        raise ValueError(f'expected "choices" to have a list "{key}"')
    return tuple(_text({key: value}, key) for value in values)


def _text(row: dict[str, Any], key: str) -> str:
    value = row.get(key)
    if not isinstance(value, str) or not value.strip():
        got = "none" if value is None else repr(value)[:40]
        raise ValueError(f'expected a non-empty string "{key}", got {got}')
    if "\0" in value:
        raise ValueError(f'"{key}" contains a NUL character')
    if not value.isascii():
        value.encode()  # raises UnicodeEncodeError, a ValueError, for a lone surrogate
    return value
