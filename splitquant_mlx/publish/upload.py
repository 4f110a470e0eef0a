"""Check a checkpoint, write its model card and upload both."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from splitquant_mlx.errors import CheckpointError, RecipeError, TargetError, abbreviate
from splitquant_mlx.models.companions import refuse_foreign_link
from splitquant_mlx.progress import SILENT, Progress
from splitquant_mlx.publish.card import REPO, find_base, is_own, make_card
from splitquant_mlx.publish.files import CARD, Converted, check_converted
from splitquant_mlx.publish.hub import Commit, check_login, check_name, send
from splitquant_mlx.publish.measurements import find_measurements
from splitquant_mlx.runtime.disk import as_target_error, write_atomic

CARDS = ("keep", "replace")
MAX_CARD_BYTES = 1 << 22


@dataclass(frozen=True, kw_only=True)
class Upload:
    """A prepared upload: a checkpoint, its card and notes for the user.

    Attributes:
        converted: the checkpoint.
        repo: USER/NAME.
        card: text of README.md.
        is_generated: whether `card` is generated; else it is the README.md of the directory.
        notes: notes to show before anything is sent.
    """

    converted: Converted
    repo: str
    card: str
    is_generated: bool
    notes: tuple[str, ...]

    @property
    def files(self) -> list[Path]:
        """Return the files to send by name, with the card."""
        return sorted((*self.converted.files, self.converted.path / CARD))

    def write_card(self) -> None:
        """Write README.md if it is generated. Raises TargetError when that fails."""
        if self.is_generated:
            file = self.converted.path / CARD
            with as_target_error(file):
                write_atomic(file, self.card.encode())

    def send(self, commit: Commit | None = None) -> str:
        """Write the card and send everything; see `hub.send`. Returns the address."""
        check_login(self.repo)
        self.write_card()
        names = [file.relative_to(self.converted.path).as_posix() for file in self.files]
        return send(self.converted.path, names, self.repo, commit or Commit())


def prepare_upload(
    path: str | Path,
    repo: str,
    *,
    results: Sequence[Path] = (),
    card: str | None = None,
    base_model: str | None = None,
    progress: Progress = SILENT,
) -> Upload:
    """Check a converted checkpoint and generate its card, without writing or sending anything.

    Args:
        path: directory written by `convert`.
        repo: repo to publish it in, USER/NAME.
        results: files of `eval --json` and `run`, or directories of them; see
            `measurements.find_measurements`.
        card: what to do with a README.md written or changed by hand: "keep" or "replace".
        base_model: repo id of the original, if that was a local copy.
        progress: progress reporter for hashing the model.

    Raises:
        SplitQuantError: when the checkpoint is incomplete or not made by this package, a result
            is of another model, a repo name is invalid, or `card` is None and there is a README.md
            written by hand.
    """
    check_name(repo)
    if base_model is not None and not REPO.fullmatch(base_model):
        raise RecipeError(f"base model: expected a repo id like org/name, got {base_model!r:.100}")
    if card not in (None, *CARDS):
        raise RecipeError(f"expected {' or '.join(CARDS)}, got {card!r:.40}", field="card")
    converted = check_converted(Path(path))
    manual = _card_by_hand(converted.path)
    if manual is not None and card is None:
        raise TargetError(
            f"{converted.path / CARD} was written or changed by hand: publish it unchanged (--card "
            "keep) or replace it (--card replace)"
        )
    if manual is None or card == "replace":
        measurements = find_measurements(converted, results, progress)
        text, is_generated = make_card(converted, repo, measurements, base_model=base_model), True
    else:
        text, is_generated = manual, False
    return Upload(
        converted=converted,
        repo=repo,
        card=text,
        is_generated=is_generated,
        notes=tuple(_notes(converted, base_model)),
    )


def _card_by_hand(path: Path) -> str | None:
    """Return the text of a README.md written or changed by hand; None if there is none."""
    file = path / CARD
    if not file.exists():
        return None
    refuse_foreign_link(path, file)
    try:
        if not file.is_file() or file.stat().st_size > MAX_CARD_BYTES:
            raise CheckpointError(f"{file} is not a file or too large for a card: remove it")
        text = file.read_bytes().decode("utf-8")
    except (OSError, ValueError) as exc:
        raise CheckpointError(f"{file} cannot be read as text: remove it") from exc
    return None if is_own(text) else text


def _notes(converted: Converted, base_model: str | None) -> list[str]:
    manifest, notes = converted.manifest, []
    if converted.left_out:
        notes.append(f"not sent, as not part of the model: {abbreviate(converted.left_out, 8)}")
    if not base_model and find_base(manifest)[0] is None:
        notes.append("the original is a local copy: give its repo with --base-model")
    if manifest.revision is None:
        notes.append(f"splitquant.json, which is sent, contains its path: {manifest.source}")
    if not manifest.source_card.get("license"):
        notes.append("the original's README states no licence: check the card")
    return notes
