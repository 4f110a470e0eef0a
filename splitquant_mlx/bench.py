"""Time conversions side by side: ours, split and plain, and `mlx_lm.convert -q`.

Every conversion is a process of its own, as a user would start it, imports and all. The programs
take turns, after one round that is not counted, so that a slow spell of the machine or a cold file
cache meets all of them. Only ratios of medians are worth comparing across machines.
"""

import os
import shutil
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mlx.core as mx

from splitquant_mlx.environment import describe_machine, versions
from splitquant_mlx.errors import SplitQuantError
from splitquant_mlx.parts import cluster_weight
from splitquant_mlx.progress import Progress, Silent

# ru_maxrss is in kB on Linux, in bytes on macOS
RSS_BYTES = 1 if sys.platform == "darwin" else 1024
YARDSTICK = "mlx_lm.convert -q"


@dataclass(frozen=True, kw_only=True)
class Timing:
    """Hold the counted runs of one program: wall times, s, and peak resident memory, bytes."""

    seconds: list[float] = field(default_factory=list)
    peak_bytes: list[int] = field(default_factory=list)


def bench_convert(
    model: Path, scratch: Path, *, trials: int = 3, progress: Progress | None = None
) -> dict[str, Any]:
    """Convert `model` in turns with each program.

    Args:
        model: a model directory, with a tokenizer, which mlx_lm.convert wants.
        scratch: an existing directory, for the outputs; they are removed.
        trials: counted rounds.
        progress: told how far the work is.

    Returns:
        JSON values: per program the runs, medians and ratios to mlx_lm.convert's, and the
        environment.

    Raises:
        SplitQuantError: when a program fails.
    """
    target = scratch / "bench-convert"
    ours = [sys.executable, "-m", "splitquant_mlx", "convert", "--model", str(model)]
    theirs = [sys.executable, "-m", "mlx_lm", "convert", "--hf-path", str(model), "-q"]
    commands = {
        "splitquant": [*ours, "--mlx-path", str(target)],
        "rtn": [*ours, "--method", "rtn", "--mlx-path", str(target)],
        YARDSTICK: [*theirs, "--mlx-path", str(target)],
    }
    timings = {name: Timing() for name in commands}
    with (progress or Silent()).task("Converting", (trials + 1) * len(commands)) as advance:
        for round_number in range(trials + 1):
            for name, command in commands.items():
                seconds, peak_bytes = _run(command)
                shutil.rmtree(target)
                if round_number:
                    timings[name].seconds.append(seconds)
                    timings[name].peak_bytes.append(peak_bytes)
                advance(1)
    return {
        "model": model.name,
        "trials": trials,
        "programs": {name: _summary(timing, timings) for name, timing in timings.items()},
        "machine": describe_machine(),
        "versions": versions(),
    }


def bench_kmeans(*, side: int = 2048, trials: int = 5) -> dict[str, Any]:
    """Time the exact k-means against the published approach on one bfloat16 matrix.

    Returns:
        JSON values: nanoseconds a weight of both (scikit-learn once, its default of one start),
        their ratio, and the inertia each found.
    """
    w = (mx.random.normal((side, side), key=mx.random.key(0)) * 0.02).astype(mx.bfloat16)
    mx.eval(w)

    def timed(kmeans: str) -> tuple[float, float]:
        started = time.perf_counter()
        inertia = cluster_weight(w, 3, kmeans).inertia
        return (time.perf_counter() - started) / w.size * 1e9, inertia

    timed("exact")
    runs = [timed("exact") for _ in range(trials)]
    exact_ns = statistics.median(ns for ns, _ in runs)
    sklearn_ns, sklearn_inertia = timed("sklearn")
    return {
        "shape": [side, side],
        "exact_ns_per_weight": exact_ns,
        "sklearn_ns_per_weight": sklearn_ns,
        "ratio": sklearn_ns / exact_ns,
        "exact_inertia": runs[0][1],
        "sklearn_inertia": sklearn_inertia,
    }


def _run(command: list[str]) -> tuple[float, int]:
    """Run a command to its end; returns wall time, s, and peak resident memory, bytes."""
    started = time.perf_counter()
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) as process:
        assert process.stderr is not None
        error = process.stderr.read().decode(errors="replace")
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    seconds = time.perf_counter() - started
    if process.returncode:
        lines = error.strip().splitlines() or [f"exit code {process.returncode}"]
        raise SplitQuantError(f"{' '.join(command[1:4])} failed: {lines[-1]}")
    return seconds, usage.ru_maxrss * RSS_BYTES


def _summary(timing: Timing, timings: dict[str, Timing]) -> dict[str, Any]:
    median_s = statistics.median(timing.seconds)
    return {
        "seconds": timing.seconds,
        "median_s": median_s,
        "ratio": median_s / statistics.median(timings[YARDSTICK].seconds),
        "peak_bytes": max(timing.peak_bytes),
    }
