"""Measure how fast models run: tokens/s as `mlx_lm.benchmark` does, load time, memory.

Every trial is a fresh process that loads the model, answers once to warm up, and then is timed:
nothing is left in memory from the trial before, so loading is loading. Several models take turns,
so that a slow spell of the machine meets all of them. A first short round is not counted; after it
the files are in the operating system's cache for all.

The model runs as `generate` runs it: quantized kernels, and float32 activations on a CPU.
"""

import json
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from splitquant_mlx.bench.programs import OURS, run_program, spread
from splitquant_mlx.bench.workload import Workload
from splitquant_mlx.errors import SplitQuantError
from splitquant_mlx.models.source import Source, resolve
from splitquant_mlx.progress import SILENT, Progress
from splitquant_mlx.runtime.environment import made_with

WARM_UP_TOKENS = 4
RATES = ("prompt_tps", "generation_tps")
COSTS = ("import_s", "load_s", "first_token_s", "peak_bytes")


def bench_speed(
    models: Sequence[str],
    workload: Workload | None = None,
    *,
    trials: int = 5,
    device: str | None = None,
    progress: Progress = SILENT,
) -> dict[str, Any]:
    """Run models in turns; compare the first with each of the others.

    Args:
        models: repo ids, directories or .gguf files.
        workload: of a trial.
        trials: counted rounds.
        device: "cpu" or "gpu"; None is mlx's own choice.
        progress: told how far the work is.

    Returns:
        JSON values. "models": for each, runs, median, min and max of prompt_tps and
        generation_tps (tokens/s over the whole batch), import_s (process start to libraries
        imported), load_s (to read the model), first_token_s (process start to the first token of
        the first answer) and peak_bytes; "ratios": the first model's time or bytes over another's,
        of medians, with the least and largest ratio of one round; and the environment.

    Raises:
        SplitQuantError: when a model cannot be had, or a trial fails.
    """
    workload = workload or Workload()
    sources = [resolve(model) for model in models]
    found: list[list[dict[str, Any]]] = [[] for _ in sources]
    with progress.task("Running", (trials + 1) * len(sources)) as advance:
        for round_number in range(trials + 1):
            for source, results in zip(sources, found, strict=True):
                if round_number:
                    results.append(_trial_process(source, workload, device))
                else:
                    _trial_process(source, Workload(prompt_tokens=1, generation_tokens=1), device)
                advance(1)
    return {
        "settings": {**asdict(workload), "trials": trials},
        "models": [
            {
                "model": source.name,
                "revision": source.revision,
                **{key: spread([run[key] for run in runs]) for key in (*RATES, *COSTS)},
            }
            for source, runs in zip(sources, found, strict=True)
        ],
        "ratios": [
            {"model": sources[0].name, "against": source.name, **ratios(found[0], runs)}
            for source, runs in zip(sources[1:], found[1:], strict=True)
        ],
        "peak_memory": found[0][0]["peak_memory"],
        "device": found[0][0]["device"],
        **made_with(),
    }


def run_trial(model: str, workload: Workload) -> dict[str, Any]:
    """Load a model in this process, warm up, and time one workload.

    The rates are mlx-lm's own figures, as `mlx_lm.benchmark` prints them. Its decoding rate counts
    the first token too, whose time is the prompt's: it is high by g / (g - 1) for g tokens.

    Returns:
        JSON values: prompt_tps and generation_tps; load_s; imported_at and first_token_at, s on the
        clock of `time.perf_counter`; the device, and mlx's peak memory there, bytes.
    """
    from mlx_lm.generate import batch_generate, stream_generate

    from splitquant_mlx.models.loader import load

    imported = time.perf_counter()
    loaded, tokenizer = load(model)
    ready = time.perf_counter()
    tokenizer.eos_token_ids = []  # or an answer might end early
    mx.random.seed(0)
    shape = (workload.batch_size, workload.prompt_tokens)
    prompts: Any = mx.random.randint(0, _vocabulary(loaded), shape).tolist()
    first_token_at = 0.0
    warm_up = min(WARM_UP_TOKENS, workload.generation_tokens)
    for _ in stream_generate(loaded, tokenizer, prompts[0], max_tokens=warm_up):
        first_token_at = first_token_at or time.perf_counter()
    mx.synchronize()
    many = workload.generation_tokens
    if workload.batch_size == 1:
        *_, figures = stream_generate(loaded, tokenizer, prompts[0], max_tokens=many)
    else:
        figures = batch_generate(loaded, tokenizer, prompts, max_tokens=many).stats
    return {
        "prompt_tps": figures.prompt_tps,
        "generation_tps": figures.generation_tps,
        "imported_at": imported,
        "load_s": ready - imported,
        "first_token_at": first_token_at,
        "device": str(mx.default_device()),
        "device_peak_bytes": mx.get_peak_memory(),
    }


def _trial_process(source: Source, workload: Workload, device: str | None) -> dict[str, Any]:
    command = [*OURS, "bench", "trial", "--model", str(source.path)]
    for name, value in asdict(workload).items():
        command += [f"--{name.replace('_', '-')}", str(value)]
    run = run_program([*command, "--device", device] if device else command)
    try:
        found = json.loads(run.output.strip().splitlines()[-1])
    except (ValueError, IndexError) as exc:
        raise SplitQuantError(f"bench trial wrote no figures for {source.name}") from exc
    on_gpu = "gpu" in found["device"]
    return {
        **found,
        "import_s": found["imported_at"] - run.started,
        "first_token_s": found["first_token_at"] - run.started,
        "peak_bytes": found["device_peak_bytes"] if on_gpu else run.peak_bytes,
        "peak_memory": "mlx on the GPU" if on_gpu else "resident in the process",
    }


def ratios(runs: list[dict[str, Any]], others: list[dict[str, Any]]) -> dict[str, Any]:
    """Return time or bytes of runs over those of others: of medians, and least and most."""
    found = {}
    names = {"prefill_time": "prompt_tps", "decode_time": "generation_tps"}
    for name, key in [*names.items(), *((cost, cost) for cost in COSTS)]:
        mine, theirs = ([run[key] for run in side] for side in (runs, others))
        if key in RATES:
            mine, theirs = theirs, mine
        rounds = [a / b for a, b in zip(mine, theirs, strict=True)]
        median = statistics.median(mine) / statistics.median(theirs)
        found[name] = {"median": median, "min": min(rounds), "max": max(rounds)}
    return found


def _vocabulary(model: nn.Module) -> int:
    embeddings = (nn.Embedding, nn.QuantizedEmbedding)
    return max(
        module.weight.shape[0] for module in model.modules() if isinstance(module, embeddings)
    )
