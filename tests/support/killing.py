"""Kill conversions at many points: `killing.py SOURCE ROOM OVERWRITE STEPS TIMES`.

Of the steps of a conversion, STEPS (0: all) are taken, evenly spread, and the three from its last
rename on; besides, TIMES times at random. A step is a file opened, renamed, removed or
synchronized, a directory made or removed, a tensor or half a line of the journal written.

Each conversion runs in a child, forked from this process, which has the modules imported and mlx
not used. What a kill must not do ends this program with a traceback; the rest is printed as one
line of JSON for each point: what was there after the kill, and how many shards were taken over.
"""

import json
import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path

import mlx.core as mx
import mlx_lm.models.llama
import mlx_lm.utils  # noqa: F401  all that a conversion imports is to be imported before the fork

from splitquant_mlx import TargetError, convert
from splitquant_mlx.conversion import resume as state
from splitquant_mlx.formats.shard_writer import ShardWriter
from splitquant_mlx.runtime.journal import Journal

EVENTS = ("os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.truncate", "fcntl.flock")
SHARD_BYTES = 40_000
state.SAVE_S = 0.0  # a record in the journal for each layer


class Steps:
    """Count steps, and kill this process at one of them."""

    def __init__(self, room: Path, last: int) -> None:
        self.room, self.last, self.count = str(room), last, 0
        self.renames: list[int] = []

    def step(self) -> None:
        self.count += 1
        if self.count == self.last:
            os.kill(os.getpid(), signal.SIGKILL)

    def hear(self, event: str, args: tuple) -> None:
        """Receive an audit event."""
        path = args[0] if args and isinstance(args[0], str) else ""
        inside = path.startswith(self.room) or not path.startswith("/")
        if event in EVENTS or (event == "open" and path and inside):
            self.step()
            if event == "os.rename":
                self.renames.append(self.count)

    def watch(self) -> None:
        add, write, fsync = ShardWriter.add, Journal._write, os.fsync

        def counted_add(writer, name, tensor):
            add(writer, name, tensor)
            self.step()

        def halved_write(journal, line):
            half = len(line) // 2
            write(journal, line[:half])
            self.step()
            write(journal, line[half:])

        def counted_fsync(descriptor):
            self.step()
            fsync(descriptor)
            self.step()

        ShardWriter.add, Journal._write, os.fsync = counted_add, halved_write, counted_fsync
        sys.addaudithook(self.hear)


def conversion(source: Path, target: Path, last: int, report: Path, overwrite: bool) -> None:
    """Convert in this process, and write down what was done."""
    taken = []
    resume = ShardWriter.resume

    def counted_resume(writer, *saved):
        taken.append(resume(writer, *saved))
        return taken[-1]

    ShardWriter.resume = counted_resume
    mx.set_default_device(mx.Device(mx.cpu))
    steps = Steps(target.parents[1], last)
    steps.watch()
    error = ""
    try:
        convert(source, target, overwrite=overwrite, max_shard_bytes=SHARD_BYTES)
    except TargetError as exc:
        error = str(exc)
    count, renames = steps.count, steps.renames[:]
    found = {"taken": sum(taken), "steps": count, "renames": renames, "error": error}
    report.write_text(json.dumps(found))


def forked(source, target, report, *, last=0, after_s=None, overwrite=False) -> dict | None:
    """Convert in a child; returns its report, None when it was killed."""
    report.unlink(missing_ok=True)
    child = os.fork()
    if not child:
        code = 1
        try:
            conversion(source, target, last, report, overwrite)
            code = 0
        finally:
            os._exit(code)
    if after_s is not None:
        time.sleep(after_s)
        os.kill(child, signal.SIGKILL)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert status in (0, -signal.SIGKILL), f"the conversion ended with {status}"
    return json.loads(report.read_text()) if status == 0 else None


def content(directory: Path) -> dict[str, object]:
    """Return the files of a model; of the manifest, all but the time it took."""
    found: dict[str, object] = {file.name: file.read_bytes() for file in directory.iterdir()}
    if "splitquant.json" in found:
        manifest = json.loads(found["splitquant.json"])
        del manifest["seconds"]
        found["splitquant.json"] = manifest
    return found


class Campaign:
    """Convert `source` into a directory of its own, kill that, and look at what is left."""

    def __init__(self, source: Path, room: Path, overwrite: bool) -> None:
        self.source, self.overwrite = source, overwrite
        self.place, self.report = room / "place", room / "report"
        self.target = self.place / "deep" / "target"
        self.prepare()
        self.old = content(self.target) if overwrite else None
        began = time.monotonic()
        self.whole = self.convert()
        self.seconds = time.monotonic() - began
        assert self.whole and not self.whole["error"], self.whole
        self.wanted = content(self.target)

    def prepare(self) -> None:
        shutil.rmtree(self.place, ignore_errors=True)
        self.place.mkdir()
        if self.overwrite:
            self.target.mkdir(parents=True)
            (self.target / "config.json").write_text("old")

    def convert(self, **when) -> dict | None:
        return forked(self.source, self.target, self.report, overwrite=self.overwrite, **when)

    def kill(self, point: str, **when) -> dict[str, object]:
        self.prepare()
        killed = self.convert(**when) is None
        found = content(self.target) if self.target.exists() else None
        assert found in (None, self.old, self.wanted), f"{point}: neither the old nor the whole"
        again = self.convert()
        refused = found == self.wanted and not self.overwrite
        assert again and bool(again["error"]) == refused, f"{point}: {again}"
        assert content(self.target) == self.wanted, f"{point}: other bytes"
        left = [path.name for path in self.place.rglob("*") if path.parent != self.target]
        assert sorted(left) == ["deep", "target"], f"{point}: {left} is left"
        ended = "whole" if found == self.wanted else "none" if found is None else "old"
        return {"point": point, "killed": killed, "found": ended, "taken": again["taken"]}


def main(source: Path, room: Path, overwrite: bool, steps: int, times: int) -> None:
    campaign = Campaign(source, room, overwrite)
    total, renames = campaign.whole["steps"], campaign.whole["renames"]
    spread = range(1, total + 1) if not steps else (1 + i * total // steps for i in range(steps))
    last = range(renames[-1], total + 1)
    for step in sorted({*spread, *last[:3]}):
        print(json.dumps(campaign.kill(f"step {step} of {total}", last=step)), flush=True)
    rng = random.Random(0)
    for _ in range(times):
        after_s = rng.uniform(0, campaign.seconds)
        print(json.dumps(campaign.kill(f"{after_s:.3f} s", after_s=after_s)), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), *map(int, sys.argv[3:]))
