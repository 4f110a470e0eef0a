"""A journal loses at most the line being written and never mixes records of different keys."""

import signal
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from splitquant_mlx.errors import TargetError
from splitquant_mlx.runtime.journal import Journal

KEY = {"model": "a", "versions": ["1", "2"], "shots": 0}
RECORDS = [{"id": "é\n\u2028", "values": [-1.5, float("-inf")]}, {"id": "b", "values": []}]


def written(path, records=RECORDS, key=KEY):
    with Journal(path, key) as journal:
        for record in records:
            journal.append(record)
    return path


def test_resumes_with_the_same_key(tmp_path):
    path = written(tmp_path / "new" / "deep" / "journal")
    with Journal(path, dict(reversed(KEY.items()))) as journal:
        assert journal.done == RECORDS
        journal.append({"id": "c"})
    with Journal(path, KEY) as journal:
        assert journal.done == [*RECORDS, {"id": "c"}]


def test_starts_over_with_another_key(tmp_path):
    path = written(tmp_path / "journal")
    with Journal(path, {**KEY, "shots": 5}) as journal:
        assert journal.done == []
    with Journal(path, KEY) as journal:
        assert journal.done == []
    assert path.read_bytes().count(b"\n") == 1


@given(st.data())
def test_a_truncated_file_loses_only_the_truncated_line(tmp_path_factory, data):
    path = written(tmp_path_factory.mktemp("torn") / "journal")
    content = path.read_bytes()
    cut = data.draw(st.integers(0, len(content)))
    path.write_bytes(content[:cut])
    whole = max(content[:cut].count(b"\n") - 1, 0)
    with Journal(path, KEY) as journal:
        assert journal.done == RECORDS[:whole]
        for record in RECORDS[whole:]:
            journal.append(record)
    assert path.read_bytes() == content


@pytest.mark.parametrize("torn", [b"\0\0\0\0", b"{]\n", b"[1]\n", b'"text"\n', b"\xff\n", b"\n"])
def test_lines_after_a_damaged_one_are_ignored(tmp_path, torn):
    path = written(tmp_path / "journal")
    content = path.read_bytes()
    path.write_bytes(content + torn + b'{"id": "after"}\n')
    with Journal(path, KEY) as journal:
        assert journal.done == RECORDS
    assert path.read_bytes() == content


def test_a_killed_process_loses_no_finished_record(tmp_path):
    code = (
        "import os, sys; from pathlib import Path\n"
        "from splitquant_mlx.runtime.journal import Journal\n"
        "journal = Journal(Path(sys.argv[1]), {'model': 'a'})\n"
        "for i in range(3): journal.append({'id': i})\n"
        "os.kill(os.getpid(), 9)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "journal")], check=False)
    assert done.returncode == -signal.SIGKILL
    with Journal(tmp_path / "journal", {"model": "a"}) as journal:
        assert journal.done == [{"id": i} for i in range(3)]


@pytest.mark.parametrize("content", [b"precious notes\n", b'{"id": 1}\n', b"{]"])
def test_a_file_that_is_not_a_journal_is_not_modified(tmp_path, content):
    (tmp_path / "notes").write_bytes(content)
    with pytest.raises(TargetError, match="notes is not a journal: choose another path"):
        Journal(tmp_path / "notes", KEY)
    assert (tmp_path / "notes").read_bytes() == content


def test_an_unwritable_path_is_named(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    for path in (tmp_path, tmp_path / "file" / "journal"):
        with pytest.raises(TargetError, match="cannot write the journal") as caught:
            Journal(path, KEY)
        assert "\n" not in str(caught.value)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="/dev/full is Linux's")
def test_a_full_disk_is_named(tmp_path, monkeypatch):
    with (
        Journal(tmp_path / "journal", KEY) as journal,
        open("/dev/full", "wb", buffering=0) as full,
        monkeypatch.context() as patched,
    ):
        patched.setattr(journal, "_file", full)
        with pytest.raises(TargetError, match="No space left"):
            journal.append({"id": "c"})
