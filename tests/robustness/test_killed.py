"""A conversion killed at any point leaves all or nothing; the next one ends in the same bytes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import gguf_bytes
import pytest
import tiny

SUPPORT = Path(__file__).resolve().parents[1] / "support"


def campaign(source, room, *, overwrite=False, steps=0, times=0):
    """Kill conversions of `source`, see killing.py, and return what came of each."""
    command = [sys.executable, str(SUPPORT / "killing.py"), str(source), str(room)]
    path = os.pathsep.join([str(SUPPORT.parents[1]), str(SUPPORT)])
    done = subprocess.run(
        [*command, str(int(overwrite)), str(steps), str(times)],
        env=os.environ | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_a_dozen_points(tmp_path):
    source = tiny.write_checkpoint(tmp_path / "source")
    points = campaign(source, tmp_path, overwrite=True, steps=10)
    assert len(points) >= 12 and all(point["killed"] for point in points)
    assert {point["found"] for point in points} == {"old", "none", "whole"}
    assert max(point["taken"] for point in points) > 3, "finished shards were to be taken over"


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["new", "overwrite", "gguf"])
def test_many_points(tmp_path, kind):
    source = tmp_path / "source.gguf"
    if kind == "gguf":
        source.write_bytes(gguf_bytes.write())
    else:
        source = tiny.write_checkpoint(tmp_path / "source")
    points = campaign(source, tmp_path, overwrite=kind == "overwrite", steps=60, times=15)
    assert sum(point["killed"] for point in points) > 60
    wanted = {"none", "whole", "old"} if kind == "overwrite" else {"none", "whole"}
    assert {point["found"] for point in points} == wanted
    assert len({point["taken"] for point in points}) > 5
