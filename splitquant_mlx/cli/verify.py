"""Offer `verify`."""

import dataclasses
from typing import Annotated

import typer

from splitquant_mlx.cli import console
from splitquant_mlx.cli.console import pairs, plain, show
from splitquant_mlx.cli.options import (
    JsonFile,
    Model,
    start,
)
from splitquant_mlx.cli.settings import dataclass_options
from splitquant_mlx.errors import CheckpointError

MOST_PROBLEMS = 8


@dataclass_options(Model, "model")
def verify(
    model: Model,
    source: Annotated[
        str | None, typer.Option(help="The model it was made from, to compare every weight with.")
    ] = None,
    json_file: JsonFile = None,
) -> None:
    """Check a converted model: hashes, shapes, bits/weight, a forward pass, the original."""
    name = model.choose()
    start(model.device)
    from pathlib import Path

    from splitquant_mlx.cli.progress import Bars
    from splitquant_mlx.conversion.verify import verify as check
    from splitquant_mlx.models.source import resolve

    original = None if source is None else resolve(source, revision=model.revision)
    checks = check(Path(name), source=original, progress=Bars())
    problems = sorted({problem for found in checks for problem in found.problems})
    if not console.write_json(json_file, [dataclasses.asdict(found) for found in checks]):
        show(
            pairs(
                *(
                    (found.name, f"{'FAILED' if found.problems else 'ok':6}  {plain(found.detail)}")
                    for found in checks
                )
            ),
            *(f"  {plain(problem, 300)}" for problem in problems[:MOST_PROBLEMS]),
        )
    if not problems:
        if json_file != "-":
            show(f"{plain(name)} is whole.")
        return
    more = f", and {len(problems) - 1} more" if len(problems) > 1 else ""
    detail = f"{problems[0]:.300}{more}"
    if source is not None and not any(found.problems for found in checks[:-1]):
        raise CheckpointError(f"{name} is whole, but was not made from {source} ({detail})")
    raise CheckpointError(f"{name} is not what its manifest says ({detail}): convert it again")
