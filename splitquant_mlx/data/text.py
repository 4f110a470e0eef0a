"""Read the text that perplexity and KL divergence are measured on, and cut it in windows.

A data set of many rows becomes one text by joining its rows, unchanged, with a blank line: on
WikiText-2 that is what GPTQ and the documentation of transformers do, so that figures compare.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from splitquant_mlx.errors import RecipeError, SourceError, one_line
from splitquant_mlx.models.hub import fetch_dataset_file

Row = tuple[str, Any]  # where in the file, and what stands there
SEPARATOR = "\n\n"
WIKITEXT = "Salesforce/wikitext"


def load_text(path: Path) -> str:
    """Read a text from a file.

    Args:
        path: .jsonl (an object with a "text" a line), .parquet (a column "text"), or any other
            file, which is read as UTF-8 text. Rows are joined with a blank line.

    Raises:
        SourceError: when the file cannot be read, holds no text, or anything but text.
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
        raise SourceError(f"{path} holds no text: give a file with some")
    return text


def fetch_wikitext() -> str:
    """Return WikiText-2 (raw), the test split, from the hub or from its cache on this machine.

    Raises:
        SourceError: when it cannot be fetched.
    """
    return load_text(fetch_dataset_file(WIKITEXT, "wikitext-2-raw-v1/test-00000-of-00001.parquet"))


def text_hash(text: str) -> str:
    """Return the SHA-256 of a text in UTF-8, which names the data that a figure was measured on."""
    return hashlib.sha256(text.encode()).hexdigest()


def encode(tokenizer: Any, text: str) -> list[int]:
    """Return the tokens of a text, with the special tokens that the tokenizer adds by default.

    For most models that is a beginning-of-text token, once, at the start of the whole text: not
    at the start of every window. It is what transformers and most published figures do.
    """
    # the warning that the text is longer than the model's context is not for who cuts it up
    return tokenizer.encode(text, verbose=False)


def cut_windows(tokens: Sequence[int], context_length: int, limit: int | None = None) -> np.ndarray:
    """Cut tokens into windows side by side, (windows, context_length) int32; a rest is dropped.

    Args:
        tokens: of a text.
        context_length: tokens of a window.
        limit: number of windows to keep, from the start; None keeps all.

    Raises:
        RecipeError: when there are too few tokens for one window.
    """
    if context_length < 1 or (limit is not None and limit < 1):
        raise RecipeError(f"expected a window of 1 token or more, got {limit} of {context_length}")
    count = min(len(tokens) // context_length, limit or len(tokens))
    if not count:
        raise RecipeError(
            f"the text has {len(tokens)} tokens, expected at least context_length "
            f"({context_length}): give a longer text or a smaller context_length"
        )
    return np.array(tokens[: count * context_length], np.int32).reshape(count, context_length)


def read_utf8(path: Path) -> str:
    """Return the text of a file. Raises SourceError for anything but text."""
    content = path.read_bytes()
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as exc:
        line = content.count(b"\n", 0, exc.start) + 1
        raise SourceError(
            f"{path}, line {line}: not UTF-8 text (byte 0x{content[exc.start]:02x}): convert the "
            "file to UTF-8"
        ) from exc
    if "\0" in text:
        line = text.count("\n", 0, text.index("\0")) + 1
        raise SourceError(f"{path}, line {line}: not text: it holds a NUL character")
    return text


def jsonl_rows(path: Path) -> Iterator[Row]:
    """Yield what stands in each line of a .jsonl file. Raises SourceError naming a broken line."""
    for number, line in enumerate(read_utf8(path).split("\n"), start=1):
        if line.strip():
            try:
                yield f"line {number}", json.loads(line)
            except (ValueError, RecursionError) as exc:
                raise SourceError(f"{path}, line {number}: not JSON ({one_line(exc)})") from exc


def parquet_rows(path: Path, columns: Sequence[str]) -> Iterator[Row]:
    """Yield these columns of each row of a .parquet file. Raises SourceError for any other file."""
    from pyarrow import ArrowException, parquet

    path.open("rb").close()  # pyarrow's own message for a file that cannot be opened is long
    try:
        table = parquet.ParquetFile(path)
        check_columns(path, columns, table.schema_arrow.names)
        rows = table.read(columns=list(columns)).to_pylist()
    except (ArrowException, ValueError, KeyError, OSError) as exc:
        raise SourceError(f"{path}: not a sound parquet file ({one_line(exc)})") from exc
    yield from ((f"row {number}", row) for number, row in enumerate(rows, start=1))


def check_columns(path: Path, columns: Sequence[str], names: Sequence[str]) -> None:
    """Raise SourceError when a table lacks one of `columns`."""
    if missing := [name for name in columns if name not in names]:
        wanted = f"the columns {', '.join(columns)}"
        if len(columns) == 1:
            wanted = f'a column "{columns[0]}"'
        got = ", ".join(names) or "none"
        raise SourceError(f"{path}: expected {wanted}, got {got}: add {', '.join(missing)}")


def _join(path: Path, rows: Iterable[Row]) -> str:
    """Join the texts of rows. Raises SourceError naming a row that is no text."""
    texts = []
    for where, row in rows:
        value = row.get("text") if isinstance(row, dict) else None
        if not isinstance(value, str):
            raise SourceError(f'{path}, {where}: expected a "text" that is a string')
        if "\0" in value or not _encodes(value):
            raise SourceError(f"{path}, {where}: not text: it holds a NUL or half a character")
        texts.append(value)
    return SEPARATOR.join(texts)


def _encodes(value: str) -> bool:
    """Say whether a string has a form in UTF-8; escapes in JSON can write one that has none."""
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True
