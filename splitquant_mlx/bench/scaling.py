"""Time conversions of several sizes and settings, fit the cost model, and predict larger ones."""

import os
import shutil
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from splitquant_mlx.bench.conversion import run_conversion
from splitquant_mlx.bench.cost import (
    ASSUMPTIONS,
    M4_CLASS,
    Cost,
    count_work,
    fit_cost,
    predict,
    summarize_fit,
)
from splitquant_mlx.bench.programs import OURS, check_trials
from splitquant_mlx.bench.random_checkpoint import SHAPES, Shape, write_random_checkpoint
from splitquant_mlx.progress import Progress, Silent
from splitquant_mlx.recipe import Recipe
from splitquant_mlx.runtime.environment import describe_machine, versions

PREDICTED = ("llama-3.2-1b", "llama-3.2-3b", "llama-3.1-8b", "llama-3.1-70b")
METHODS = ("splitquant", "rtn")


@dataclass(frozen=True, kw_only=True)
class Case:
    """Name one conversion to time."""

    shape: Shape
    recipe: Recipe


def _shape(layers: int, vocab_size: int = 32000) -> Shape:
    return Shape(
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=layers,
        num_attention_heads=16,
        num_key_value_heads=8,
        vocab_size=vocab_size,
        tie_word_embeddings=True,
    )


# Depth, parts, bits, method and a large vocabulary, which is read and written but not converted,
# each move other terms of the model.
CASES = (
    Case(shape=_shape(2), recipe=Recipe()),
    Case(shape=_shape(8), recipe=Recipe()),
    Case(shape=_shape(24), recipe=Recipe()),
    Case(shape=_shape(24), recipe=Recipe(clusters=2)),
    Case(shape=_shape(24), recipe=Recipe(clusters=6)),
    Case(shape=_shape(8), recipe=Recipe(bits=8)),
    Case(shape=_shape(2, vocab_size=512_000), recipe=Recipe()),
    Case(shape=_shape(8), recipe=Recipe(method="rtn")),
    Case(shape=_shape(24), recipe=Recipe(method="rtn")),
    Case(shape=_shape(24), recipe=Recipe(method="rtn", bits=8)),
)


def bench_cost(
    scratch: Path,
    *,
    cases: Sequence[Case] | None = None,
    trials: int = 3,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Time the cases in turns, on the CPU, fit the cost model to their medians, and predict.

    Args:
        scratch: an existing directory for the checkpoints (3 GB) and conversions.
        cases: to fit to; None takes `CASES`.
        trials: counted rounds, after one that is not.
        progress: told how far the work is.

    Returns:
        JSON values: the fit with its errors, predictions, and the environment.

    Raises:
        SplitQuantError: when a conversion fails.
    """
    check_trials(trials)
    cases, progress = cases or CASES, progress or Silent()
    models: dict[Shape, Path] = {}
    with progress.task("Writing checkpoints", len({case.shape for case in cases})) as advance:
        for shape in dict.fromkeys(case.shape for case in cases):
            models[shape] = scratch / f"model-{len(models)}"
            write_random_checkpoint(models[shape], shape)
            advance(1)
    seconds = _time(cases, models, scratch, trials, progress)
    for model in models.values():
        shutil.rmtree(model)
    works = [count_work(case.shape, case.recipe) for case in cases]
    cost = fit_cost(works, [statistics.median(runs) for runs in seconds])
    fit = summarize_fit(cost, works, seconds)
    for entry, case in zip(fit["cases"], cases, strict=True):
        entry |= {"shape": asdict(case.shape), "recipe": case.recipe.to_dict()}
    return {
        "fit": fit,
        "predictions": predictions(cost, os.cpu_count() or 1),
        "other_machine": {**asdict(M4_CLASS), "assumptions": list(ASSUMPTIONS)},
        "trials": trials,
        "machine": describe_machine(),
        "versions": versions(),
    }


def predictions(cost: Cost, fit_cores: int) -> list[dict[str, Any]]:
    """Predict the conversions of well-known shapes, here and on an M4-class machine.

    Here means the machine of the fit, with files that its cache can hold.

    Returns:
        JSON values: name of the shape, method, bytes in and out, and seconds.
    """
    found = []
    for name in PREDICTED:
        for method in METHODS:
            work = count_work(SHAPES[name], Recipe(method=method))
            found.append(
                {
                    "shape": name,
                    "method": method,
                    "bytes_in": work.bytes_in,
                    "bytes_out": work.bytes_out,
                    "here_s": cost.seconds(work),
                    "other_machine_s": predict(cost, work, M4_CLASS, fit_cores),
                }
            )
    return found


def _time(
    cases: Sequence[Case],
    models: dict[Shape, Path],
    scratch: Path,
    trials: int,
    progress: Progress,
) -> list[list[float]]:
    """Return the seconds of `trials` conversions of each case, a round of all at a time."""
    seconds: list[list[float]] = [[] for _ in cases]
    recipe_file, target = scratch / "recipe.toml", scratch / "converted"
    with progress.task("Converting", (trials + 1) * len(cases)) as advance:
        for round_number in range(trials + 1):
            for case, runs in zip(cases, seconds, strict=True):
                recipe_file.write_text(case.recipe.to_toml(), encoding="utf-8")
                command = [*OURS, "convert", "--model", str(models[case.shape])]
                command += ["--mlx-path", str(target), "--recipe", str(recipe_file)]
                command += ["--device", "cpu"]
                run, _ = run_conversion(command, target)
                if round_number:
                    runs.append(run.seconds)
                advance(1)
    return seconds
