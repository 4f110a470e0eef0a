"""Saved states: resumed by the next process, and not shared by two at a time."""

import subprocess
import sys

import mlx.core as mx
import pytest

from splitquant_mlx.calibration.saved_state import SavedState


def test_saved_state_is_resumed(tmp_path):
    first = SavedState(tmp_path / "work")
    first.save("states", [mx.arange(3), mx.ones((2, 2), mx.bfloat16)])
    first.save_json({"step": 2})
    del first
    second = SavedState(tmp_path / "work")
    loaded = second.load("states")
    assert loaded is not None and [x.dtype for x in loaded] == [mx.int32, mx.bfloat16]
    assert loaded[0].tolist() == [0, 1, 2]
    assert second.load_json() == {"step": 2}
    second.delete("states")
    assert second.load("states") is None
    second.remove()
    assert not (tmp_path / "work").exists()


@pytest.mark.parametrize("damage", [b"", b"\x00" * 100, b"{"])
def test_damaged_files_are_ignored(tmp_path, damage):
    state = SavedState(tmp_path / "work")
    state.save("states", [mx.arange(3)])
    state.save_json(1)
    (tmp_path / "work" / "states.safetensors").write_bytes(damage)
    (tmp_path / "work" / "value.json").write_bytes(damage)
    assert state.load("states") is None
    assert state.load_json() is None


def test_without_a_directory_arrays_stay_in_memory(tmp_path):
    (tmp_path / "file").write_text("")
    state = SavedState(tmp_path / "file" / "work")
    state.save("states", [mx.arange(3)])
    assert state.load("states")[0].tolist() == [0, 1, 2]
    state.save_json(1)
    state.remove()


OTHER = """
import sys
from pathlib import Path
import mlx.core as mx
from splitquant_mlx.calibration.saved_state import SavedState
state = SavedState(Path(sys.argv[1]))
state.save("states", [mx.arange(3)])
print("ready", flush=True)
sys.stdin.read()
"""


def test_two_processes_do_not_share_a_directory(tmp_path):
    command = [sys.executable, "-c", OTHER, str(tmp_path / "work")]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, **pipes) as other:
        assert other.stdout.readline() == "ready\n"
        mine = SavedState(tmp_path / "work")
        assert mine.load("states") is None
        mine.save("states", [mx.arange(5)])
        mine.remove()
        assert (tmp_path / "work" / "states.safetensors").exists()
        other.communicate("")


def test_two_of_a_process_do_not_share_a_directory(tmp_path):
    first, second = SavedState(tmp_path / "work"), SavedState(tmp_path / "work")
    first.save("states", [mx.arange(3)])
    assert second.load("states") is None
    del second
    third = SavedState(tmp_path / "work")  # the lock of `first` remains
    assert third.load("states") is None


def test_directories_of_killed_processes_are_removed(tmp_path):
    first, second = SavedState(tmp_path / "work"), SavedState(tmp_path / "work")
    second.save("states", [mx.arange(3)])
    (tmp_path / "work.4321").mkdir()
    del first
    first = SavedState(tmp_path / "work")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["work", "work.1"]
    assert second.load("states") is not None
    second.remove()
    first.remove()
    assert not list(tmp_path.iterdir())
