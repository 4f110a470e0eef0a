"""Kill conversions at given points: `killing.py ROOM KIND POINT...`.

A point is the number of a step of the conversion, "" for none, or a time such as "0.02s". A step is
a file opened, renamed, removed or synchronized, a directory made or removed, a tensor or half a
line of the journal written. Each conversion runs in a child, forked from this process, which has
the modules imported and mlx not used. What a kill must not do ends this program with a traceback;
the rest is printed as one line of JSON: for each point how it ended and the shards taken over.
"""

import json
import os
import shutil
import signal
import sys
import time
from pathlib import Path

import gguf_bytes
import mlx.core as mx
import mlx_lm.models.llama
import mlx_lm.utils  # noqa: F401  all that a conversion imports is to be imported before the fork
import tiny

from splitquant_mlx import TargetError, convert, gguf_import, gguf_tokenizer  # noqa: F401
from splitquant_mlx.journal import Journal
from splitquant_mlx.shards import ShardWriter

EVENTS = ("os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.truncate", "fcntl.flock")
SHARD_BYTES = 16_000
KINDS = ("new", "overwrite", "gguf")


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

    def counted_resume(writer, digests):
        taken.append(resume(writer, digests))
        return taken[-1]

    ShardWriter.resume = counted_resume
    mx.set_default_device(mx.Device(mx.cpu))
    steps = Steps(target.parent, last)
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


def make_source(room: Path, kind: str) -> Path:
    if kind == "gguf":
        (room / "source.gguf").write_bytes(gguf_bytes.write())
        return room / "source.gguf"
    return tiny.write_checkpoint(room / "source")


def main(room: Path, kind: str, points: list[str]) -> None:
    room = room.resolve()
    script = "import sys, killing; killing.make_source(killing.Path(sys.argv[1]), sys.argv[2])"
    os.spawnv(os.P_WAIT, sys.executable, [sys.executable, "-c", script, str(room), kind])
    source = next(path for path in room.iterdir() if path.name.startswith("source"))
    report, place = room / "report", room / "place"
    target = place / "target"

    def prepare() -> None:
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir()
        if kind == "overwrite":
            target.mkdir()
            (target / "config.json").write_text("old")

    prepare()
    old = content(target) if target.exists() else None
    whole = forked(source, target, report, overwrite=kind == "overwrite")
    assert whole and not whole["error"], whole
    wanted = content(target)
    results = []
    for point in points:
        prepare()
        when = {"after_s": float(point[:-1])} if point.endswith("s") else {"last": int(point or 0)}
        killed = forked(source, target, report, overwrite=kind == "overwrite", **when) is None
        found = content(target) if target.exists() else None
        assert found in (None, old, wanted), f"{point}: neither the old nor the whole model"
        again = forked(source, target, report, overwrite=kind == "overwrite")
        assert again
        refused = found == wanted and kind != "overwrite"
        assert ("exists already" in again["error"]) == refused, f"{point}: {again}"
        assert refused or not again["error"], f"{point}: {again}"
        assert content(target) == wanted, f"{point}: other bytes"
        left = sorted(path.name for path in place.iterdir())
        assert left == ["target"], f"{point}: {left} is left"
        ended = "whole" if found == wanted else "none" if found is None else "old"
        results.append({"point": point, "killed": killed, "found": ended, "taken": again["taken"]})
    print(json.dumps({"steps": whole["steps"], "renames": whole["renames"], "results": results}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], sys.argv[3:])
