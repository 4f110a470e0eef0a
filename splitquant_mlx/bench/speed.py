"""Measure the speed of models: tokens/s as in `mlx_lm.benchmark`, load time and memory.

Every trial is a new process that loads the model, generates a few tokens to warm up, and then runs
the workload. Several models alternate, so that a slow phase of the machine affects all of them. A
short first round, which is not counted, puts the files into the operating system's cache.

The model runs as in `generate`: quantized kernels, and float32 activations on a CPU.
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
    """Measure models, alternating between them, and compare the first with each of the others.

    Args:
        models: repo ids, directories or .gguf files.
        workload: settings of a trial.
        trials: rounds after the warm-up.
        device: "cpu" or "gpu"; None for mlx's default.
        progress: progress reporter.

    Returns:
        JSON values. "models": for each, runs, median, min and max of prompt_tps and
        generation_tps (tokens/s over the whole batch), import_s (process start to libraries
        imported), load_s (time to load the model), first_token_s (process start to the first token
        of the first answer) and peak_bytes; "ratios": the first model's time or bytes divided by
        another's, of medians, with the minimum and maximum ratio of a round; and the environment.

    Raises:
        SplitQuantError: when a model cannot be found, or a trial fails.
    """
    workload = workload or Workload()
    sources = [resolve(model) for model in models]
    all_runs: list[list[dict[str, Any]]] = [[] for _ in sources]
    with progress.task("Running", (trials + 1) * len(sources)) as advance:
        for round_number in range(trials + 1):
            for source, runs in zip(sources, all_runs, strict=True):
                if round_number:
                    runs.append(_trial_process(source, workload, device))
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
            for source, runs in zip(sources, all_runs, strict=True)
        ],
        "ratios": [
            {"model": sources[0].name, "against": source.name, **ratios(all_runs[0], runs)}
            for source, runs in zip(sources[1:], all_runs[1:], strict=True)
        ],
        "peak_memory": all_runs[0][0]["peak_memory"],
        "device": all_runs[0][0]["device"],
        **made_with(),
    }


def run_trial(model: str, workload: Workload) -> dict[str, Any]:
    """Load a model in this process, warm up, and time one workload.

    The rates are those that `mlx_lm.benchmark` prints. Its decoding rate includes the first token,
    whose time is part of the prompt's: it is too high by a factor of g / (g - 1) for g tokens.

    Returns:
        JSON values: prompt_tps and generation_tps; load_s; imported_at and first_token_at, s on the
        clock of `time.perf_counter`; the device, and mlx's peak memory on it, bytes.
    """
    from mlx_lm.generate import batch_generate, stream_generate

    from splitquant_mlx.models.loader import load

    imported_at = time.perf_counter()
    loaded, tokenizer = load(model)
    load_s = time.perf_counter() - imported_at
    tokenizer.eos_token_ids = []  # so that no answer ends early
    mx.random.seed(0)
    shape = (workload.batch_size, workload.prompt_tokens)
    prompts: Any = mx.random.randint(0, _vocabulary(loaded), shape).tolist()
    first_token_at = 0.0
    warm_up = min(WARM_UP_TOKENS, workload.generation_tokens)
    for _ in stream_generate(loaded, tokenizer, prompts[0], max_tokens=warm_up):
        first_token_at = first_token_at or time.perf_counter()
    mx.synchronize()
    max_tokens = workload.generation_tokens
    if workload.batch_size == 1:
        *_, stats = stream_generate(loaded, tokenizer, prompts[0], max_tokens=max_tokens)
    else:
        stats = batch_generate(loaded, tokenizer, prompts, max_tokens=max_tokens).stats
    return {
        "prompt_tps": stats.prompt_tps,
        "generation_tps": stats.generation_tps,
        "imported_at": imported_at,
        "load_s": load_s,
        "first_token_at": first_token_at,
        "device": mx.default_device().type.name,
        "device_peak_bytes": mx.get_peak_memory(),
    }


def _trial_process(source: Source, workload: Workload, device: str | None) -> dict[str, Any]:
    command = [*OURS, "bench", "trial", "--model", str(source.path)]
    for name, value in asdict(workload).items():
        command += [f"--{name.replace('_', '-')}", str(value)]
    run = run_program([*command, "--device", device] if device else command)
    try:
        trial = json.loads(run.output.strip().splitlines()[-1])
    except (ValueError, IndexError) as exc:
        raise SplitQuantError(f"bench trial of {source.name}: expected JSON, got none") from exc
    on_gpu = trial["device"] == "gpu"
    return {
        **trial,
        "import_s": trial["imported_at"] - run.started,
        "first_token_s": trial["first_token_at"] - run.started,
        "peak_bytes": trial["device_peak_bytes"] if on_gpu else run.peak_bytes,
        "peak_memory": "mlx on the GPU" if on_gpu else "resident in the process",
    }


def ratios(runs: list[dict[str, Any]], others: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the ratios of time or bytes of two models: of medians, and the range over rounds."""
    result = {}
    names = {"prefill_time": "prompt_tps", "decode_time": "generation_tps"}
    for name, key in [*names.items(), *((cost, cost) for cost in COSTS)]:
        first, second = ([run[key] for run in side] for side in (runs, others))
        if key in RATES:  # the ratio of times is the inverse ratio of rates
            first, second = second, first
        rounds = [a / b for a, b in zip(first, second, strict=True)]
        median = statistics.median(first) / statistics.median(second)
        result[name] = {"median": median, "min": min(rounds), "max": max(rounds)}
    return result


def _vocabulary(model: nn.Module) -> int:
    embeddings = (nn.Embedding, nn.QuantizedEmbedding)
    return max(
        module.weight.shape[0] for module in model.modules() if isinstance(module, embeddings)
    )
