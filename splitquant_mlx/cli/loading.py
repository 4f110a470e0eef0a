"""Load a model for a command: say which and how large, and whether memory is there for it."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from splitquant_mlx.cli import console
from splitquant_mlx.cli.launched import launched_rank


@dataclass(frozen=True, kw_only=True)
class Loaded:
    """A model that is ready to run.

    Attributes:
        name: as the user gave it.
        path: of its directory or .gguf file.
        nbytes: of its weights as they are stored, bytes.
        model: mlx-lm's model.
        tokenizer: mlx-lm's TokenizerWrapper.
        context: tokens that it was made for; None where it does not say.
    """

    name: str
    path: Path
    nbytes: int
    model: Any
    tokenizer: Any
    context: int | None


def load_model(
    name: str,
    *,
    revision: str | None = None,
    trust_remote_code: bool = False,
    group: Any = None,
    pipeline: bool = False,
) -> Loaded:
    """Load a directory, .gguf file or repo id, after a look at the memory that it needs.

    Raises:
        MemoryTooSmallError: when this machine has too little.
        SplitQuantError: when the model cannot be found or used.
    """
    from splitquant_mlx.models.footprint import context_length, weight_bytes
    from splitquant_mlx.models.loader import load
    from splitquant_mlx.models.source import resolve
    from splitquant_mlx.runtime.ranks import is_single_rank

    source = resolve(name, revision=revision)
    nbytes = weight_bytes(source.path)
    if group is None or is_single_rank(group):  # ranks divide it
        check_memory(source.path, f"running {name}")
    if not launched_rank():
        console.note(f"Loading {console.plain(name)} ({console.size(nbytes)}) ...")
    model, tokenizer = load(
        source,
        trust_remote_code=trust_remote_code,
        group=group,
        pipeline=pipeline,
    )
    return Loaded(
        name=name,
        path=source.path,
        nbytes=nbytes,
        model=model,
        tokenizer=tokenizer,
        context=context_length(model),
    )


def warn_long_prompt(found: Loaded, tokens: int) -> None:
    """Say so where a prompt is longer than what the model was made for."""
    if found.context is not None and tokens > found.context and not launched_rank():
        console.note(
            f"warning: {tokens:,} tokens are more than the {found.context:,} that this model was "
            "made for: expect nonsense"
        )


def check_memory(path: Path, work: str) -> None:
    """Refuse to load what memory is too small for; warn where it is short."""
    from splitquant_mlx.models.footprint import check_running

    if warning := check_running(path, work):
        console.note(f"warning: {warning}")
