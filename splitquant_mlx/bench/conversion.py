"""Time conversions side by side: ours, split and plain, and `mlx_lm.convert -q`.

Every conversion is a process of its own, as a user would start it, imports and all. The programs
take turns, after one round that is not counted, so that a slow spell of the machine or a cold file
cache meets all of them. Only ratios of medians are worth comparing across machines.
"""

import shutil
import statistics
import sys
from pathlib import Path
from typing import Any

from splitquant_mlx.bench.programs import OURS, Run, run_program
from splitquant_mlx.formats.manifest import load_manifest
from splitquant_mlx.progress import SILENT, Progress
from splitquant_mlx.runtime.environment import made_with

YARDSTICK = "mlx_lm.convert -q"
PUBLISHED = "splitquant, scikit-learn KMeans"


def bench_convert(
    model: Path,
    scratch: Path,
    *,
    trials: int = 3,
    sklearn: bool = False,
    progress: Progress = SILENT,
) -> dict[str, Any]:
    """Convert `model` in turns with each program.

    Args:
        model: a model directory, with a tokenizer, which mlx_lm.convert wants.
        scratch: an existing directory, for the outputs; they are removed.
        trials: counted rounds.
        sklearn: time the published approach too: each tensor clustered by scikit-learn, about
            0.5 s per million weights.
        progress: told how far the work is.

    Returns:
        JSON values: per program the runs, medians and ratios to mlx_lm.convert's, of ours the
        median seconds of every stage, and the environment.

    Raises:
        SplitQuantError: when a program fails.
    """
    target = scratch / "bench-convert"
    ours = [*OURS, "convert", "--model", str(model), "--mlx-path", str(target)]
    theirs = [sys.executable, "-m", "mlx_lm", "convert", "--hf-path", str(model), "-q"]
    commands = {
        "splitquant": ours,
        "rtn": [*ours, "--method", "rtn"],
        YARDSTICK: [*theirs, "--mlx-path", str(target)],
    }
    if sklearn:
        commands[PUBLISHED] = [*ours, "--kmeans", "sklearn"]
    runs: dict[str, list[Run]] = {name: [] for name in commands}
    stages: dict[str, list[dict[str, float]]] = {name: [] for name in commands}
    with progress.task("Converting", (trials + 1) * len(commands)) as advance:
        for round_number in range(trials + 1):
            for name, command in commands.items():
                run, seconds = run_conversion(command, target)
                if round_number:
                    runs[name].append(run)
                    stages[name].append(seconds)
                advance(1)
    yardstick = statistics.median(run.seconds for run in runs[YARDSTICK])
    return {
        "model": model.name,
        "trials": trials,
        "programs": {name: _summary(runs[name], stages[name], yardstick) for name in commands},
        **made_with(),
    }


def run_conversion(command: list[str], target: Path) -> tuple[Run, dict[str, float]]:
    """Run a conversion that writes `target`, and remove that.

    Returns:
        The run, and the seconds of its stages where it left a manifest: read and write in one
        thread, cluster and quantize added up over all.
    """
    run = run_program(command)
    manifest = load_manifest(target)
    shutil.rmtree(target)
    return run, manifest.seconds if manifest else {}


def _summary(runs: list[Run], stages: list[dict[str, float]], yardstick_s: float) -> dict[str, Any]:
    median_s = statistics.median(run.seconds for run in runs)
    found = {
        "seconds": [run.seconds for run in runs],
        "median_s": median_s,
        "ratio": median_s / yardstick_s,
        "peak_bytes": max(run.peak_bytes for run in runs),
    }
    if stages[0]:
        found["stages_s"] = {
            stage: statistics.median(seconds[stage] for seconds in stages) for stage in stages[0]
        }
    return found
