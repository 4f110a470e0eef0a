"""Run programs as separate processes and measure their time and peak memory."""

import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from splitquant_mlx.bench import launch
from splitquant_mlx.errors import SplitQuantError

OURS = (sys.executable, "-m", "splitquant_mlx")


@dataclass(frozen=True, kw_only=True)
class Run:
    """Result of one run of a program.

    Attributes:
        started: start time, s, on the clock of `time.perf_counter`, which all processes share.
        seconds: wall time, s.
        peak_bytes: peak resident memory.
        output: standard output.
    """

    started: float
    seconds: float
    peak_bytes: int
    output: str


def run_program(command: Sequence[str]) -> Run:
    """Run a command to its end.

    Raises:
        SplitQuantError: when it fails; the message has the last line of stderr.
    """
    with tempfile.TemporaryDirectory(prefix="splitquant-mlx-bench-") as scratch:
        report = Path(scratch) / "report.json"
        read_end, write_end = os.pipe()
        launcher = [sys.executable, "-I", "-S", launch.__file__, str(report), str(read_end)]
        options: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        try:
            process = subprocess.Popen(
                [*launcher, *command], text=True, errors="replace", pass_fds=[read_end], **options
            )
            try:
                output, error = process.communicate()
            except BaseException:
                process.terminate()
                process.communicate()
                raise
        finally:
            os.close(read_end)
            os.close(write_end)
        usage: dict[str, Any] = json.loads(report.read_text()) if report.exists() else {}
    if usage.pop("exit_code", None) != 0:
        lines = error.strip().splitlines() or [f"exit code {process.returncode}"]
        raise SplitQuantError(f"{' '.join(command[1:4])} failed: {lines[-1]}")
    return Run(**usage, output=output)


def spread(values: Sequence[float]) -> dict[str, Any]:
    """Return the runs with their median, minimum and maximum, as JSON values."""
    return {
        "runs": list(values),
        "median": statistics.median(values),
        "min": min(values),
        "max": max(values),
    }
