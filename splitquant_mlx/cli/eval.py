"""The command `eval`."""

import math
from pathlib import Path
from typing import Annotated, Any

import typer

from splitquant_mlx.cli import console, interrupt
from splitquant_mlx.cli.console import new_table, plain, show
from splitquant_mlx.cli.launched import join, launched_rank
from splitquant_mlx.cli.loading import check_memory
from splitquant_mlx.cli.options import JsonFile, TrustedModel, start
from splitquant_mlx.cli.settings import Given, dataclass_options, settings_options
from splitquant_mlx.evaluation.settings import ARC_TASKS, Task

# name of a value -> (label, name of its standard error)
ROWS = {
    "perplexity": ("perplexity (lower is better)", "standard_error"),
    "mean_nll": ("negative log-likelihood, nats per token (lower is better)", None),
    "kl_mean": ("KL divergence, mean, nats per token (lower is better)", "standard_error"),
    "kl_median": ("KL divergence, median, nats per token", None),
    "kl_p99": ("KL divergence, 99th percentile, nats per token", None),
    "kl_low": ("KL divergence, mean, 95 % interval over windows", None),
    "top1_agreement": ("same most likely token (higher is better)", None),
    "accuracy": ("accuracy (higher is better)", "standard_error"),
    "accuracy_norm": ("accuracy, by length (higher is better)", "standard_error_norm"),
    "questions": ("questions", None),
    "num_shots": ("few-shot examples", None),
    "tokens": ("tokens", None),
    "positions": ("positions compared", None),
    "context_length": ("tokens per window", None),
    "stride": ("stride of the windows, tokens", None),
}
SHARES = ("top1_agreement", "accuracy", "accuracy_norm")

Reference = Annotated[str | None, typer.Option(help="Model to compare with; kl needs it.")]


@settings_options(
    Task,
    "task",
    flags={"name": ("--task", "--tasks")},
    panels={
        **dict.fromkeys(("context_length", "stride"), "Text (perplexity, kl)"),
        **dict.fromkeys(("protocol", "num_shots", "shots"), "Questions (ARC)"),
    },
)
@dataclass_options(TrustedModel, "model")
def evaluate(
    model: TrustedModel,
    *,
    task: Given,
    reference: Reference = None,
    json_file: JsonFile = None,
) -> None:
    """Evaluate a model: ARC, perplexity, KL divergence from another model, or a task of lm-eval."""
    settings = Task(**task)
    if settings.name in ARC_TASKS:  # other tasks start again
        interrupt.set_hint()
    start(model.device)
    from splitquant_mlx.cli.progress import Bars
    from splitquant_mlx.evaluation.task import evaluate
    from splitquant_mlx.models.source import resolve
    from splitquant_mlx.runtime.ranks import fail_together

    group = join()
    with fail_together(group):
        name = model.choose()
        if not launched_rank():
            source = resolve(name, revision=model.revision)
            check_memory(source.path, f"evaluating {name}")

    result = evaluate(
        name,
        settings,
        reference=reference,
        revision=model.revision,
        trust_remote_code=model.trust_remote_code,
        group=group,
        progress=Bars(),
    )
    if not group.rank() and not console.write_json(json_file, result):
        _print(result)


def _print(result: dict[str, Any]) -> None:
    """Print the values of an evaluation as a table."""
    values, reference = result["values"], result["values"].get("reference", {})
    table = new_table(
        plain(f"{result['task']} {values.get('protocol') or ''}"),
        *(_short_name(result[key]) for key in ("model", "reference")[: 2 if reference else 1]),
    )
    errors = {"kl_high", *(error for _, error in ROWS.values() if error)}
    for name, value in values.items():
        if isinstance(value, int | float) and not isinstance(value, bool) and name not in errors:
            label = ROWS.get(name, (name, None))[0]
            other = [_format_value(name, reference)] if reference else []
            table.add_row(plain(label), _format_value(name, values), *other)
    show(table)
    if comparison := values.get("comparison"):
        show(
            f"Correct only by the first: {comparison['only_first']}, only by the second: "
            f"{comparison['only_second']}; McNemar's p = {comparison['p_value']:.3g}"
        )


def _short_name(model: str) -> str:
    """Return the name of a model, without the directories of a local path."""
    return plain(model.rstrip("/").rpartition("/")[2] if Path(model).exists() else model)


def _format_value(name: str, values: dict[str, Any]) -> str:
    """Return a value with its standard error."""
    value, error = values[name], values.get(ROWS.get(name, ("", None))[1] or "")
    if value is None:
        return ""
    has_error = error is not None and math.isfinite(error)  # a single question has none
    if name in SHARES:
        return f"{value:.1%}" + (f" ± {error:.1%}" if has_error else "")
    text = str(value) if isinstance(value, int) else f"{value:.4g}"
    if name == "kl_low":
        text += f" to {values['kl_high']:.4g}"
    return text + (f" ± {error:.2g}" if has_error else "")
