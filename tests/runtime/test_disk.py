"""Files are written atomically, and a child process ends when its parent is killed."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from splitquant_mlx.runtime.disk import remove, sha256, write_atomic

ROOT = Path(__file__).resolve().parents[2]

KILLED = """
import os, signal, sys
from splitquant_mlx.runtime import disk
disk.os.replace = lambda *names: os.kill(os.getpid(), signal.SIGKILL)
disk.write_atomic(disk.Path(sys.argv[1]), b"new")
"""

STARTS = """
import sys
from splitquant_mlx.bench.programs import run_program
code = "import os, sys, time; print(os.getpid(), file=open(sys.argv[1], 'w'), flush=True); "
run_program([sys.executable, "-c", code + "time.sleep(60)", sys.argv[1]])
"""


def program(code, *arguments):
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.Popen([sys.executable, "-c", code, *map(str, arguments)], env=environment)


def test_a_killed_write_leaves_the_old_content_and_the_next_cleans_up(tmp_path):
    file = tmp_path / "file"
    write_atomic(file, b"old")
    assert program(KILLED, file).wait(30) == -signal.SIGKILL
    assert file.read_bytes() == b"old" and len(list(tmp_path.iterdir())) == 2
    write_atomic(file, b"newer")
    assert file.read_bytes() == b"newer" and list(tmp_path.iterdir()) == [file]


def test_write_atomic_follows_no_link(tmp_path):
    (tmp_path / "diary").write_text("dear")
    (tmp_path / ".file.partial").symlink_to("diary")
    with pytest.raises(OSError):
        write_atomic(tmp_path / "file", b"x")
    assert (tmp_path / "diary").read_text() == "dear"


def test_remove_follows_no_link(tmp_path):
    (tmp_path / "deep").mkdir()
    (tmp_path / "kept").mkdir()
    (tmp_path / "deep" / "link").symlink_to("../kept")
    (tmp_path / "link").symlink_to("kept")
    for name in ("deep", "link", "nothing"):
        remove(tmp_path / name)
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]


@pytest.mark.parametrize("size", [0, 1, (1 << 18) + 1])
def test_sha256_equals_hashlib(tmp_path, size):
    import hashlib

    (tmp_path / "file").write_bytes(bytes(size))
    assert sha256(tmp_path / "file") == hashlib.sha256(bytes(size)).hexdigest()


def test_a_child_process_ends_with_its_parent(tmp_path):
    note = tmp_path / "pid"
    deadline = time.monotonic() + 30
    with program(STARTS, note) as process:
        while not note.exists() or not note.read_text().endswith("\n"):
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.01)
        process.kill()
    child = int(note.read_text())
    while is_running(child):
        assert time.monotonic() < deadline, "the child is still running"
        time.sleep(0.01)


def is_running(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    stat = Path(f"/proc/{pid}/stat")  # the child may stay a zombie here
    return not (stat.exists() and stat.read_text().rpartition(")")[2].split()[0] == "Z")
