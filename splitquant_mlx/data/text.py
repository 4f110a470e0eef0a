"""Load the text for perplexity and KL divergence, and cut it into windows.

The rows of a data set are joined, unchanged, with blank lines. GPTQ and the documentation of
transformers do the same on WikiText-2, so that results are comparable.
"""

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from splitquant_mlx.errors import RecipeError, SourceError, one_line
from splitquant_mlx.models.hub import fetch_dataset_file

Row = tuple[str, Any]  # location in the file, and content
SEPARATOR = "\n\n"
NOT_TEXT = re.compile("[\0\ud800-\udfff]")  # NUL, and surrogates, which JSON can escape singly
WIKITEXT = "Salesforce/wikitext"


def load_text(path: Path) -> str:
    """Read a text from a file.

    Args:
        path: .jsonl (an object with a "text" per line), .parquet (a column "text"), or any other
            file, which is read as UTF-8 text. Rows are joined with a blank line.

    Raises:
        SourceError: when the file cannot be read, is empty, or is not text.
    """
    try:
        if (suffix := path.suffix.lower()) in (".jsonl", ".parquet"):
            rows = jsonl_rows(path) if suffix == ".jsonl" else parquet_rows(path, ["text"])
            text = _join(path, rows)
        else:
            text = read_utf8(path)
    except OSError as exc:
        raise SourceError(f"cannot read {path}: {exc.strerror or one_line(exc)}") from exc
    if not text.strip():
        raise SourceError(f"{path} contains no text: give another file")
    return text


def fetch_wikitext() -> str:
    """Return the test split of WikiText-2 (raw) from the hub or its local cache.

    Raises:
        SourceError: when it cannot be fetched.
    """
    return load_text(fetch_dataset_file(WIKITEXT, "wikitext-2-raw-v1/test-00000-of-00001.parquet"))


def text_hash(text: str) -> str:
    """Return the SHA-256 of a text in UTF-8, to identify the data of a measurement."""
    return hashlib.sha256(text.encode()).hexdigest()


def encode(tokenizer: Any, text: str) -> list[int]:
    """Return the tokens of a text, with the special tokens that the tokenizer adds by default.

    For most models this is one beginning-of-text token at the start of the whole text, not of every
    window, as in transformers and most published results.
    """
    # verbose=False: no warning that the text exceeds the model's context length
    return tokenizer.encode(text, verbose=False)


def cut_windows(tokens: Sequence[int], context_length: int, limit: int | None = None) -> np.ndarray:
    """Cut tokens into adjacent windows, (windows, context_length) int32; the rest is dropped.

    Args:
        tokens: tokens of a text.
        context_length: tokens per window.
        limit: maximum number of windows; None for all.

    Raises:
        RecipeError: when a size is below 1, or the text is shorter than one window.
    """
    if context_length < 1 or (limit is not None and limit < 1):
        raise RecipeError(
            f"expected context_length and limit of 1 or more, got {context_length} and {limit}"
        )
    count = min(len(tokens) // context_length, limit or len(tokens))
    if not count:
        raise RecipeError(
            f"expected a text of at least context_length ({context_length}) tokens, got "
            f"{len(tokens)}: give a longer text or a smaller context_length"
        )
    return np.array(tokens[: count * context_length], np.int32).reshape(count, context_length)


def read_utf8(path: Path) -> str:
    """Read a UTF-8 text file. Raises SourceError when it is not text."""
    content = path.read_bytes()
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as exc:
        line = content.count(b"\n", 0, exc.start) + 1
        raise SourceError(
            f"{path}, line {line}: expected UTF-8 text, got byte 0x{content[exc.start]:02x}: "
            "convert the file to UTF-8"
        ) from exc
    if "\0" in text:
        line = text.count("\n", 0, text.index("\0")) + 1
        raise SourceError(f"{path}, line {line}: expected text, got a NUL character")
    return text


def jsonl_rows(path: Path) -> Iterator[Row]:
    """Yield the value of each line of a .jsonl file. Raises SourceError, naming the line."""
    for number, line in enumerate(read_utf8(path).split("\n"), start=1):
        if line.strip():
            try:
                yield f"line {number}", json.loads(line)
            except (ValueError, RecursionError) as exc:
                problem = f"expected JSON ({one_line(exc)})"
                raise SourceError(f"{path}, line {number}: {problem}") from exc


def parquet_rows(path: Path, columns: Sequence[str]) -> Iterator[Row]:
    """Yield `columns` of each row of a .parquet file. Raises SourceError when it is invalid."""
    from pyarrow import ArrowException, parquet

    path.open("rb").close()  # raises a shorter error than pyarrow for an unreadable file
    try:
        table = parquet.ParquetFile(path)
        check_columns(path, columns, table.schema_arrow.names)
        rows = table.read(columns=list(columns)).to_pylist()
    except (ArrowException, ValueError, KeyError, OSError) as exc:
        raise SourceError(f"{path}: invalid parquet file ({one_line(exc)})") from exc
    yield from ((f"row {number}", row) for number, row in enumerate(rows, start=1))


def check_columns(path: Path, columns: Sequence[str], names: Sequence[str]) -> None:
    """Raise SourceError when a table lacks one of `columns`."""
    if missing := [name for name in columns if name not in names]:
        noun, got = "columns" if len(columns) > 1 else "column", ", ".join(names) or "none"
        raise SourceError(
            f"{path}: expected {noun} {', '.join(columns)}, got {got}: add {', '.join(missing)}"
        )


def _join(path: Path, rows: Iterable[Row]) -> str:
    """Join the texts of rows. Raises SourceError, naming the row, when one has no text."""
    texts = []
    for where, row in rows:
        value = row.get("text") if isinstance(row, dict) else None
        if not isinstance(value, str):
            raise SourceError(f'{path}, {where}: expected a string "text"')
        if NOT_TEXT.search(value):
            raise SourceError(f"{path}, {where}: expected text, got a NUL or a lone surrogate")
        texts.append(value)
    return SEPARATOR.join(texts)
