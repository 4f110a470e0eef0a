"""Run numbered tasks in forked children with limits, and see what they should not have done.

A task is a function of an empty directory and a number. That it crashes its process, hangs, takes
memory out of proportion, opens files elsewhere, runs code, opens a connection or sends control
characters to the terminal is a result like any other.
"""

import multiprocessing
import os
import re
import resource
import shutil
import sys
import tempfile
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import NamedTuple

LIMIT_S = 5.0
START_S = 60.0
ADDRESS_SPACE_BYTES = 8 << 30
MAX_GROWTH_BYTES = 500 << 20
TASKS_A_CHILD = 300
# all but printable characters, newline and tab
CONTROL = re.compile(r"[^\n\t -~\u00a1-\ud7ff\ue000-\U0010ffff]")


class Defect(Exception):
    """Say what the package should not have done."""


@dataclass(frozen=True, kw_only=True)
class Result:
    """Hold what became of a task: its own outcome, or a defect and what it is."""

    number: int
    outcome: str
    defect: str = ""


Task = Callable[[Path, int], str]


class Guard:
    """Notice, through Python's audit events, what no model may make the package do."""

    EVENTS = (
        "os.system", "os.exec", "os.posix_spawn", "subprocess.Popen", "pickle.find_class",
        "socket.connect", "socket.getaddrinfo",
    )  # fmt: skip

    def __init__(self, readable: Sequence[str]) -> None:
        self.room = ""
        self.found: list[str] = []
        self.readable = (
            *(sys.prefix, sys.base_prefix, "/usr", "/lib", "/proc", "/sys"),
            *readable,
        )
        sys.addaudithook(self)

    def __call__(self, event: str, args: tuple) -> None:
        """Receive an event."""
        if not self.room:
            return
        if event in self.EVENTS:
            self.found.append(f"{event} {args!r:.200}")
        elif event == "exec" and str(getattr(args[0], "co_filename", "")).startswith(self.room):
            self.found.append(f"runs {args[0].co_filename}")
        elif event == "open" and isinstance(args[0], (str, bytes)):
            path = os.path.realpath(os.fsdecode(args[0]))
            writes = args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
            inside = path.startswith(f"{self.room}/") or path == os.devnull
            if not inside and (writes or not path.startswith(self.readable)):
                self.found.append(f"{'writes' if writes else 'reads'} {path}")
            if (
                inside
                and path.endswith((".bin", ".py"))
                and not path.endswith("splitquant_model.py")
            ):
                self.found.append(f"opens {path}")


def guarded(guard: Guard, task: Task, room: Path, number: int, log: Path) -> str:
    """Run a task, and raise Defect for all it should not have done; returns its outcome."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    os.truncate(log, 0)
    guard.found, guard.room = [], str(room)
    try:
        outcome = task(room, number)
    finally:
        guard.room = ""
    if guard.found:
        raise Defect("; ".join(guard.found[:3]))
    growth = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    if growth > MAX_GROWTH_BYTES:
        raise Defect(f"memory grew by {growth / 1e6:.0f} MB")
    sys.stdout.flush(), sys.stderr.flush()
    text = log.read_text(errors="replace")
    if found := CONTROL.search(text):
        raise Defect(f"prints {text[max(found.start() - 60, 0) : found.start() + 40]!r}")
    return outcome


def child(
    pipe: Connection,
    task: Task,
    warm_up: Callable[[], object],
    readable: Sequence[str],
    scratch: Path,
) -> None:
    """Say None when ready, then answer every number from the pipe with a result."""
    resource.setrlimit(resource.RLIMIT_AS, (ADDRESS_SPACE_BYTES, ADDRESS_SPACE_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    guard, log, room = Guard(readable), scratch / "log", scratch / "room"
    descriptor = os.open(log, os.O_CREAT | os.O_APPEND | os.O_WRONLY)
    os.dup2(descriptor, 1), os.dup2(descriptor, 2)
    warm_up()
    pipe.send(None)
    while (number := pipe.recv()) is not None:
        room.mkdir()
        tempfile.tempdir = str(room)
        try:
            outcome = guarded(guard, task, room, number, log)
            result = Result(number=number, outcome=outcome)
        except BaseException as exc:
            result = Result(number=number, outcome="DEFECT", defect=summary(exc))
        shutil.rmtree(room)
        pipe.send(result)


def summary(exc: BaseException) -> str:
    """Return exception, place in the package and message."""
    frames = traceback.extract_tb(exc.__traceback__)
    own = [f for f in frames if "splitquant_mlx" in f.filename] or frames
    return f"{type(exc).__name__} at {Path(own[-1].filename).name}:{own[-1].lineno}: {exc!s:.300}"


class Child(NamedTuple):
    """Hold a running child, and the number it works on."""

    process: multiprocessing.Process
    scratch: Path
    number: int | None
    deadline: float
    left: int


def campaign(
    task: Task,
    numbers: Iterable[int],
    *,
    warm_up: Callable[[], object] = lambda: None,
    readable: Sequence[str] = (),
    workers: int = os.cpu_count() or 1,
    limit_s: float = LIMIT_S,
) -> list[Result]:
    """Give every number to `task` in children forked from this process, which must not use mlx."""
    fork, waiting = multiprocessing.get_context("fork"), deque(numbers)
    active: dict[Connection, Child] = {}
    results: list[Result] = []

    def start() -> None:
        scratch = Path(tempfile.mkdtemp(prefix="fuzz-"))
        pipe, other = fork.Pipe()
        process = fork.Process(target=child, args=(other, task, warm_up, readable, scratch))
        process.start()
        other.close()
        active[pipe] = Child(process, scratch, None, time.monotonic() + START_S, TASKS_A_CHILD)

    def end(pipe: Connection, worker: Child, defect: str = "") -> None:
        if defect and worker.number is not None:
            results.append(Result(number=worker.number, outcome="DEFECT", defect=defect))
        elif defect:
            raise RuntimeError(f"a child ends before its first task: {defect}")
        pipe.close()
        shutil.rmtree(worker.scratch)

    while waiting or active:
        while waiting and len(active) < workers:
            start()
        for pipe in wait(list(active), timeout=0.1):
            worker = active.pop(pipe)
            try:
                answer = pipe.recv()
            except (EOFError, ConnectionResetError):
                worker.process.join()
                end(pipe, worker, f"crash, exit code {worker.process.exitcode}")
                continue
            if answer is not None:
                results.append(answer)
            number = waiting.popleft() if waiting and worker.left else None
            pipe.send(number)
            if number is None:
                worker.process.join()
                end(pipe, worker)
                continue
            deadline = time.monotonic() + limit_s
            active[pipe] = Child(worker.process, worker.scratch, number, deadline, worker.left - 1)
        for pipe, worker in list(active.items()):
            if time.monotonic() > worker.deadline:
                del active[pipe]
                worker.process.kill(), worker.process.join()
                end(pipe, worker, f"hang, more than {limit_s:g} s")
    return results
