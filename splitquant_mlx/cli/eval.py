"""Offer `eval`."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from splitquant_mlx.cli import interrupt
from splitquant_mlx.cli.launched import join
from splitquant_mlx.cli.options import (
    DEFAULT_MODEL,
    Device,
    Model,
    Revision,
    TrustRemoteCode,
    check_model,
    start,
)
from splitquant_mlx.errors import TargetError


def evaluate(
    task: Annotated[
        str,
        typer.Option(
            "--task",
            "--tasks",
            help="arc_challenge, arc_easy, perplexity, kl or a task of lm-eval.",
        ),
    ],
    model: Model = DEFAULT_MODEL,
    protocol: Annotated[
        str, typer.Option(help="ARC: loglikelihood (lm-eval's) or letter (through the chat).")
    ] = "loglikelihood",
    num_shots: Annotated[
        int | None, typer.Option(help="Solved examples before each question.")
    ] = None,
    data: Annotated[
        Path | None, typer.Option(help=".jsonl, .parquet, .csv or text, instead of the hub's data.")
    ] = None,
    shots: Annotated[
        Path | None, typer.Option(help="Questions to draw the examples from, instead of the hub's.")
    ] = None,
    limit: Annotated[int | None, typer.Option(help="Most questions, or windows of text.")] = None,
    context_length: Annotated[int, typer.Option(help="Tokens of a window of text.")] = 512,
    stride: Annotated[
        int | None, typer.Option(help="Tokens from window to window; the window's own if not set.")
    ] = None,
    reference: Annotated[
        str | None, typer.Option(help="Model to compare with; kl needs it.")
    ] = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Write the result to this file.")
    ] = None,
    revision: Revision = None,
    trust_remote_code: TrustRemoteCode = False,
    device: Device = None,
) -> None:
    """Evaluate a model: ARC, perplexity, KL divergence from another, or any task of lm-eval."""
    interrupt.resumes()
    start(device)
    from splitquant_mlx.cli.progress import Bars
    from splitquant_mlx.evaluation.task import Task, evaluate
    from splitquant_mlx.runtime.ranks import together

    group = join()
    with together(group):
        check_model(model)

    found = evaluate(
        model,
        Task(
            name=task,
            protocol=protocol,
            num_shots=num_shots,
            data=data,
            shots=shots,
            limit=limit,
            context_length=context_length,
            stride=stride,
        ),
        reference=reference,
        revision=revision,
        trust_remote_code=trust_remote_code,
        group=group,
        progress=Bars(),
    )
    if group.rank():
        return
    if json_file is not None:
        try:
            json_file.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
        except OSError as exc:
            raise TargetError(f"cannot write {json_file}: {exc.strerror or exc}") from exc
    _print(found)


def _print(found: dict[str, Any]) -> None:
    """Print the figures of an evaluation as a table."""
    from rich.console import Console
    from rich.table import Table

    from splitquant_mlx.cli.console import plain

    values, reference = found["values"], found["values"].get("reference", {})
    table = Table(box=None, padding=(0, 2, 0, 0), title_justify="left")
    table.title = plain(f"{found['task']} {values.get('protocol') or ''}")
    table.add_column("", no_wrap=True)
    table.add_column(plain(found["model"]), justify="right")
    if reference:
        table.add_column(plain(found["reference"]), justify="right")
    for name, value in values.items():
        if isinstance(value, int | float) and not isinstance(value, bool):
            other = [_figure(reference[name])] if reference else []
            table.add_row(plain(name), _figure(value), *other)
    console = Console(highlight=False)
    console.print(table)
    if comparison := values.get("comparison"):
        console.print(
            f"Right only here: {comparison['only_first']}, only there: "
            f"{comparison['only_second']}; McNemar's p = {comparison['p_value']:.3g}"
        )


def _figure(value: float) -> str:
    return str(value) if isinstance(value, int) else f"{value:.4g}"
