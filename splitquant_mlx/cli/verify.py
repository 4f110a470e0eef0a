"""The command `verify`."""

import dataclasses
from typing import Annotated, Any

import typer

from splitquant_mlx.cli import console
from splitquant_mlx.cli.console import pairs, plain, show
from splitquant_mlx.cli.options import JsonFile, Model, start
from splitquant_mlx.cli.settings import dataclass_options
from splitquant_mlx.errors import CheckpointError, RecipeError

MAX_PROBLEMS = 8


@dataclass_options(Model, "model")
def verify(
    model: Model,
    source: Annotated[
        str | None, typer.Option(help="Original model, to compare every weight with.")
    ] = None,
    source_revision: Annotated[
        str | None,
        typer.Option(help="Branch, tag or commit of the original; --revision is of MODEL."),
    ] = None,
    json_file: JsonFile = None,
) -> None:
    """Check a converted model: hashes, shapes, bits/weight, a forward pass, the original."""
    name = model.choose()
    if source_revision is not None and source is None:
        raise RecipeError("--source-revision is of the original: pass --source, too")
    start(model.device)

    from splitquant_mlx.cli.progress import Bars
    from splitquant_mlx.conversion.verify import verify as check
    from splitquant_mlx.models.source import resolve

    converted = resolve(name, revision=model.revision)
    original = None if source is None else resolve(source, revision=source_revision)
    checks = check(converted, source=original, progress=Bars())
    problems = sorted({problem for result in checks for problem in result.problems})
    unchecked = [line for result in checks for line in result.unchecked]
    if not console.write_json(json_file, [dataclasses.asdict(result) for result in checks]):
        rows = ((result.name, f"{_status(result):10}  {plain(result.detail)}") for result in checks)
        lines = (f"  {plain(line, 300)}" for line in [*problems[:MAX_PROBLEMS], *unchecked])
        show(pairs(*rows), *lines)
    if not problems:
        if json_file != "-":
            show(f"{plain(name)} is valid{', as far as it was checked' * bool(unchecked)}.")
        return
    more = f", and {len(problems) - 1} more" if len(problems) > 1 else ""
    detail = f"{problems[0]:.300}{more}"
    if source is not None and not any(result.problems for result in checks[:-1]):
        raise CheckpointError(f"{name} is valid, but was not made from {source} ({detail})")
    raise CheckpointError(f"{name} does not match its manifest ({detail}): convert it again")


def _status(check: Any) -> str:
    """Return the result of a check as one word."""
    return "FAILED" if check.problems else "incomplete" if check.unchecked else "ok"
