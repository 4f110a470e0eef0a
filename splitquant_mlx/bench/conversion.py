"""Compare the time of conversions: splitquant, rtn, and `mlx_lm.convert -q`.

Every conversion is a separate process, including imports. The programs alternate, after a warm-up
round, so that a slow phase of the machine affects all of them. Across machines, only ratios of
medians are comparable.
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

BASELINE = "mlx_lm.convert -q"
SKLEARN = "splitquant, scikit-learn KMeans"


def bench_convert(
    model: Path,
    scratch: Path,
    *,
    trials: int = 3,
    sklearn: bool = False,
    progress: Progress = SILENT,
) -> dict[str, Any]:
    """Convert `model` with each program, alternating between them.

    Args:
        model: a model directory; mlx_lm.convert requires a tokenizer.
        scratch: an existing directory for the outputs, which are removed.
        trials: rounds after the warm-up.
        sklearn: also time the published approach, which clusters each tensor with scikit-learn, at
            about 0.5 s per million weights.
        progress: progress reporter.

    Returns:
        JSON values: per program the runs, their median and its ratio to mlx_lm.convert's, for
        splitquant-mlx the median seconds of every stage, and the environment.

    Raises:
        SplitQuantError: when a program fails.
    """
    target = scratch / "bench-convert"
    ours = [*OURS, "convert", "--model", str(model), "--mlx-path", str(target)]
    theirs = [sys.executable, "-m", "mlx_lm", "convert", "--hf-path", str(model), "-q"]
    commands = {
        "splitquant": ours,
        "rtn": [*ours, "--method", "rtn"],
        BASELINE: [*theirs, "--mlx-path", str(target)],
    }
    if sklearn:
        commands[SKLEARN] = [*ours, "--kmeans", "sklearn"]
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
    baseline_s = statistics.median(run.seconds for run in runs[BASELINE])
    return {
        "model": model.name,
        "trials": trials,
        "programs": {name: _summary(runs[name], stages[name], baseline_s) for name in commands},
        **made_with(),
    }


def run_conversion(command: list[str], target: Path) -> tuple[Run, dict[str, float]]:
    """Run a conversion that writes `target`, and remove the output.

    Returns:
        The run, and the seconds of its stages if the output has a manifest; `cluster` and
        `quantize` are summed over threads.
    """
    run = run_program(command)
    manifest = load_manifest(target)
    shutil.rmtree(target)
    return run, manifest.seconds if manifest else {}


def _summary(runs: list[Run], stages: list[dict[str, float]], baseline_s: float) -> dict[str, Any]:
    median_s = statistics.median(run.seconds for run in runs)
    summary = {
        "seconds": [run.seconds for run in runs],
        "median_s": median_s,
        "ratio": median_s / baseline_s,
        "peak_bytes": max(run.peak_bytes for run in runs),
    }
    if stages[0]:
        summary["stages_s"] = {
            stage: statistics.median(seconds[stage] for seconds in stages) for stage in stages[0]
        }
    return summary
