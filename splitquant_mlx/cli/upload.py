"""The command `upload`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from splitquant_mlx.cli import console, interrupt
from splitquant_mlx.cli.options import JsonFile, ModelArgument, choose_model
from splitquant_mlx.cli.settings import Given, dataclass_options, settings_options
from splitquant_mlx.publish.hub import Commit


@dataclass(frozen=True, kw_only=True)
class Card:
    """Options of the model card."""

    results: Annotated[
        list[Path] | None,
        typer.Option(help="File of eval --json or run, or a directory of them; repeatable."),
    ] = None
    card: Annotated[
        str | None,
        typer.Option(metavar="keep|replace", help="What to do with a README.md written by hand."),
    ] = None
    base_model: Annotated[
        str | None, typer.Option(help="Repo id of the original, if it was a local copy.")
    ] = None


@settings_options(Commit, "commit")
@dataclass_options(Card, "card")
def upload(
    model: ModelArgument = None,
    model_option: Annotated[
        str | None,
        typer.Option(
            "--model", "--path", "--mlx-path", metavar="MODEL", help="The same, as an option."
        ),
    ] = None,
    *,
    upload_repo: Annotated[
        str, typer.Option(metavar="USER/NAME", help="Hugging Face repo to upload to.")
    ],
    card: Card,
    commit: Given,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Write the card, list the files, send nothing.")
    ] = False,
    json_file: JsonFile = None,
) -> None:
    """Upload a converted model to the Hugging Face hub, with a model card of its measurements."""
    interrupt.set_hint()
    path = Path(choose_model(model, model_option))
    from splitquant_mlx.cli.progress import Bars
    from splitquant_mlx.publish.upload import prepare_upload

    options = {"card": card.card, "base_model": card.base_model, "progress": Bars()}
    prepared = prepare_upload(path, upload_repo, results=card.results or (), **options)
    if dry_run:
        prepared.write_card()
        if not console.write_json(json_file, _values(prepared, None)):
            _show_files(prepared)
        _show_notes(prepared)  # last, so that they are visible
        return
    send(prepared, json_file, Commit(**commit))


def send(prepared: Any, json_file: str | None = None, commit: Commit | None = None) -> None:
    """Send a prepared upload and print its address."""
    _show_notes(prepared)
    interrupt.set_hint("Run `splitquant-mlx upload` to resume.")
    address = prepared.send(commit)
    if not console.write_json(json_file, _values(prepared, address)):
        print(f"Uploaded {len(prepared.files)} files to {address}")


def _show_files(prepared: Any) -> None:
    print(console.printable(prepared.card))
    for file in prepared.files:
        print(console.printable(f"{console.size(file.stat().st_size):>10}  {file.name}"))
    print(f"Dry run: nothing was sent to {prepared.repo}.", flush=True)


def _show_notes(prepared: Any) -> None:
    for text in prepared.notes:
        console.note(f"note: {console.plain(text)}")


def _values(prepared: Any, address: str | None) -> dict[str, Any]:
    """Return an upload as JSON values; an address of None if nothing was sent."""
    return {
        "repo": prepared.repo,
        "address": address,
        "card": prepared.card,
        "files": {file.name: file.stat().st_size for file in prepared.files},
        "notes": prepared.notes,
    }
