"""Publish a checkpoint: check it, write its card, send both."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from splitquant_mlx.errors import CheckpointError, RecipeError, TargetError
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
    """An upload: a checkpoint, its card and the notes for the user.

    Attributes:
        converted: the checkpoint.
        repo: USER/NAME.
        card: text of README.md.
        is_written: whether `card` is to be written; else it is what lies there.
        notes: what the user should know before anything is sent.
    """

    converted: Converted
    repo: str
    card: str
    is_written: bool
    notes: tuple[str, ...]

    @property
    def files(self) -> list[Path]:
        """Return the files to send, the card among them, by name."""
        return sorted((*self.converted.files, self.converted.path / CARD))

    def write_card(self) -> None:
        """Write README.md where it is to be written. Raises TargetError when that fails."""
        if self.is_written:
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
    """Check a converted checkpoint and make its card. Nothing is written, nothing is sent.

    Args:
        path: a directory that `convert` wrote.
        repo: where to publish it, USER/NAME.
        results: files of `eval --json` and `run`, or directories of them; see
            `measurements.find_measurements`.
        card: what to do with a README.md that somebody wrote or changed: "keep" or "replace".
        base_model: repo id of the original, for one that was converted from a local copy.
        progress: progress reporter, for the hashing of the model.

    Raises:
        SplitQuantError: when the checkpoint is not whole or not ours, a result is about another
            model, a name is none, or there is a README.md and `card` does not say what to do.
    """
    check_name(repo)
    if base_model is not None and not REPO.fullmatch(base_model):
        raise RecipeError(f"base model: expected a repo id like org/name, got {base_model!r:.100}")
    if card not in (None, *CARDS):
        raise RecipeError(f"card: expected {' or '.join(CARDS)}, got {card!r:.40}")
    converted = check_converted(Path(path))
    theirs = _written_by_hand(converted.path)
    if theirs is not None and card is None:
        raise TargetError(
            f"{converted.path / CARD} was written or changed by hand: publish it as it is (--card "
            "keep), or have it replaced (--card replace)"
        )
    if theirs is not None and card == "keep":
        text = theirs
    else:
        measurements = find_measurements(converted, results, progress)
        text, theirs = make_card(converted, repo, measurements, base_model=base_model), None
    return Upload(
        converted=converted,
        repo=repo,
        card=text,
        is_written=theirs is None,
        notes=tuple(_notes(converted, base_model)),
    )


def _written_by_hand(path: Path) -> str | None:
    """Return the text of a README.md that this program did not write; None without one."""
    file = path / CARD
    if not file.exists():
        return None
    refuse_foreign_link(path, file)
    try:
        if not file.is_file() or file.stat().st_size > MAX_CARD_BYTES:
            raise CheckpointError(f"{file} is not a file, or too large for a card: remove it")
        text = file.read_bytes().decode("utf-8")
    except (OSError, ValueError) as exc:
        raise CheckpointError(f"{file} cannot be read as text: remove it") from exc
    return None if is_own(text) else text


def _notes(converted: Converted, base_model: str | None) -> list[str]:
    manifest, notes = converted.manifest, []
    if converted.left_out:
        shown = ", ".join(converted.left_out[:8])
        more = f" and {len(converted.left_out) - 8} more" if len(converted.left_out) > 8 else ""
        notes.append(f"not sent, since no part of the model: {shown}{more}")
    if not base_model and find_base(manifest)[0] is None:
        notes.append("the original is a local copy: name its repo with --base-model")
    if manifest.revision is None:
        notes.append(f"splitquant.json, which is sent, names its path: {manifest.source}")
    if not manifest.source_card.get("license"):
        notes.append("the original's README states no licence: check the card")
    return notes
