"""Texts are loaded unchanged, or rejected with file and line."""

import hashlib
import io
import json
import re
import time

import numpy as np
import pyarrow as pa
import pytest
from fake_hub import Failure, FakeHub
from hypothesis import given
from hypothesis import strategies as st
from pyarrow import parquet

from splitquant_mlx import RecipeError, SourceError, load
from splitquant_mlx.data.text import cut_windows, encode, fetch_wikitext, load_text, text_hash

ROWS = ["", " = Title = \n", " A “quoted” line \n", "x\u2028y\r\nz\n"]
JOINED = "\n\n".join(ROWS)
REPO = "datasets/Salesforce/wikitext"
FILE = "wikitext-2-raw-v1/{}-00000-of-00001.parquet"


def as_parquet(column, name="text") -> bytes:
    buffer = io.BytesIO()
    parquet.write_table(pa.table({"id": range(len(column)), name: column}), buffer)
    return buffer.getvalue()


def as_jsonl(rows) -> bytes:
    return "".join(json.dumps({"text": row}) + "\n" for row in rows).encode()


@pytest.mark.parametrize(
    ("name", "content", "text"),
    [
        ("a.txt", "é\r\nb\n".encode(), "é\r\nb\n"),
        ("a.tokens", b"no suffix of ours", "no suffix of ours"),
        ("a.txt", b"\xef\xbb\xbfmarked", "marked"),
        ("a.jsonl", as_jsonl(ROWS), JOINED),
        ("a.JSONL", b'\n{"text": "a", "id": 1}\n\n{"text": "b"}', "a\n\nb"),
        ("a.parquet", as_parquet(ROWS), JOINED),
        ("a.parquet", as_parquet(pa.array(ROWS).dictionary_encode()), JOINED),
    ],
)
def test_text_is_loaded_unchanged(tmp_path, name, content, text):
    (tmp_path / name).write_bytes(content)
    assert load_text(tmp_path / name) == text


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("a.txt", b"", "a.txt contains no text"),
        ("a.txt", b" \n\t\n", "a.txt contains no text"),
        ("a.txt", b"one\ntwo\ncaf\xe9\n", "a.txt, line 3: expected UTF-8 text, got byte 0xe9"),
        ("a.txt", "text".encode("utf-16"), "a.txt, line 1: expected UTF-8"),
        ("a.txt", b"one\nt\0o\n", "a.txt, line 2: expected text, got a NUL"),
        ("a.jsonl", b"", "a.jsonl contains no text"),
        ("a.jsonl", b'{"text": "a"}\n{"text": \n', "a.jsonl, line 2: expected JSON"),
        (
            "a.jsonl",
            b'{"text": "a"}\n\n{"body": "b"}\n',
            'a.jsonl, line 3: expected a string "text"',
        ),
        ("a.jsonl", b'{"text": 3}', "a.jsonl, line 1: expected"),
        ("a.jsonl", b'["text"]', "a.jsonl, line 1: expected"),
        ("a.jsonl", b"[" * 100_000, "a.jsonl, line 1: expected JSON"),
        ("a.jsonl", b'{"text": "a\\u0000"}', "a.jsonl, line 1: expected text"),
        ("a.jsonl", b'{"text": "a"}\n{"text": "\\ud800"}', "a.jsonl, line 2: expected text"),
        ("a.jsonl", b'{"text": ""}\n', "a.jsonl contains no text"),
        ("a.parquet", b"", "a.parquet: invalid parquet file"),
        ("a.parquet", b"PAR1 and no more PAR1", "a.parquet: invalid parquet file"),
        ("a.parquet", as_parquet(["a"], name="body"), "expected column text, got id, body"),
        ("a.parquet", as_parquet(["a", None]), "a.parquet, row 2: expected"),
        ("a.parquet", as_parquet([1, 2]), "a.parquet, row 1: expected"),
        ("a.parquet", as_parquet(pa.array([], pa.string())), "a.parquet contains no text"),
        ("a.parquet", as_parquet(["a" * 999])[:-40] + b"PAR1", "invalid parquet file"),
    ],
)
def test_malformed_text_is_refused(tmp_path, name, content, expected):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(SourceError) as caught:
        load_text(tmp_path / name)
    assert expected in str(caught.value) and str(caught.value).isprintable()


@pytest.mark.parametrize("name", ["absent.txt", "absent.jsonl", "absent.parquet", "."])
def test_unreadable_files_are_rejected(tmp_path, name):
    with pytest.raises(SourceError, match=r"^cannot read .*: (No such file|Is a)"):
        load_text(tmp_path / name)


def test_hash_is_that_of_the_bytes():
    assert text_hash("é") == hashlib.sha256(b"\xc3\xa9").hexdigest()


@pytest.fixture
def hub(monkeypatch, tmp_path):
    with FakeHub() as hub, hub.instead_of_the_real_one(monkeypatch, cache=tmp_path / "hub"):
        hub.repos = {REPO: {FILE.format("test"): as_parquet(["test", "x"])}}
        yield hub


def test_wikitext_comes_from_the_hub_once(hub):
    assert fetch_wikitext() == "test\n\nx"
    assert all(request.startswith(f"/{REPO}/resolve/main/") for request in hub.requests)
    hub.requests.clear()
    assert fetch_wikitext() == "test\n\nx" and hub.requests == []


@pytest.mark.parametrize(
    ("failure", "expected"),
    [
        (Failure(status=500), "answered with HTTP status 500"),
        (Failure(status=429), "too many requests"),
        (Failure(status=403), "refused access (403)"),
    ],
)
def test_hub_errors_are_named(hub, failure, expected):
    hub.failure = failure
    with pytest.raises(SourceError) as caught:
        fetch_wikitext()
    message = str(caught.value)
    assert message.startswith("Salesforce/wikitext: ") and expected in message
    assert "\n" not in message


def test_without_a_hub(hub, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_ETAG_TIMEOUT", 0.3)
    for manner in ("silent", "dead"):
        hub.silent = manner == "silent"
        if manner == "dead":
            hub.close()
        start = time.monotonic()
        with pytest.raises(
            SourceError,
            match=r"^Salesforce/wikitext: not in the cache, and .*cannot be reached.*--data$",
        ):
            fetch_wikitext()
        assert time.monotonic() - start < 5


def test_a_text_starts_with_one_bos_without_warning(stories, capfd):
    _, tokenizer = load(stories)
    capfd.readouterr()
    tokens = encode(tokenizer, "Once upon a time. " * 300)
    assert tokens[0] == tokenizer.bos_token_id and tokens.count(tokens[0]) == 1
    assert len(tokens) > 512 and capfd.readouterr() == ("", "")


@given(st.integers(0, 200), st.integers(1, 50), st.none() | st.integers(1, 9))
def test_windows_cut_the_text_in_order(count, context_length, limit):
    tokens = list(range(count))
    if count < context_length:
        with pytest.raises(RecipeError, match=re.escape(f"context_length ({context_length})")):
            cut_windows(tokens, context_length, limit)
        return
    windows = cut_windows(tokens, context_length, limit)
    assert windows.dtype == np.int32 and windows.shape[1] == context_length
    assert len(windows) == min(count // context_length, limit or count)
    assert windows.ravel().tolist() == tokens[: windows.size]


def test_sizes_below_one_are_rejected():
    for options in ({"context_length": 0}, {"context_length": 4, "limit": 0}):
        with pytest.raises(RecipeError):
            cut_windows([1] * 9, **options)
