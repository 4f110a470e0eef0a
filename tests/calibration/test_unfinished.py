"""What a long computation keeps: for the next process, and out of the way of others."""

import subprocess
import sys

import mlx.core as mx
import pytest

from splitquant_mlx.calibration.unfinished import Unfinished


def test_what_is_kept_is_there_for_the_next(tmp_path):
    first = Unfinished(tmp_path / "work")
    first.keep("states", [mx.arange(3), mx.ones((2, 2), mx.bfloat16)])
    first.note({"step": 2})
    del first
    second = Unfinished(tmp_path / "work")
    found = second.arrays("states")
    assert found is not None and [x.dtype for x in found] == [mx.int32, mx.bfloat16]
    assert found[0].tolist() == [0, 1, 2]
    assert second.findings() == {"step": 2}
    second.drop("states")
    assert second.arrays("states") is None
    second.remove()
    assert not (tmp_path / "work").exists()


@pytest.mark.parametrize("damage", [b"", b"\x00" * 100, b"{"])
def test_what_is_damaged_is_not_there(tmp_path, damage):
    kept = Unfinished(tmp_path / "work")
    kept.keep("states", [mx.arange(3)])
    kept.note(1)
    (tmp_path / "work" / "states.safetensors").write_bytes(damage)
    (tmp_path / "work" / "findings.json").write_bytes(damage)
    assert kept.arrays("states") is None
    assert kept.findings() is None


def test_without_a_directory_arrays_stay_in_memory(tmp_path):
    (tmp_path / "file").write_text("")
    kept = Unfinished(tmp_path / "file" / "work")
    kept.keep("states", [mx.arange(3)])
    assert kept.arrays("states")[0].tolist() == [0, 1, 2]
    kept.note(1)
    kept.remove()


OTHER = """
import sys
from pathlib import Path
import mlx.core as mx
from splitquant_mlx.calibration.unfinished import Unfinished
kept = Unfinished(Path(sys.argv[1]))
kept.keep("states", [mx.arange(3)])
print("ready", flush=True)
sys.stdin.read()
"""


def test_two_processes_do_not_share_one(tmp_path):
    command = [sys.executable, "-c", OTHER, str(tmp_path / "work")]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, **pipes) as other:
        assert other.stdout.readline() == "ready\n"
        mine = Unfinished(tmp_path / "work")
        assert mine.arrays("states") is None
        mine.keep("states", [mx.arange(5)])
        mine.remove()
        assert (tmp_path / "work" / "states.safetensors").exists()
        other.communicate("")
