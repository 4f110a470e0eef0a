"""Load a model for a command after a check of its memory."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from splitquant_mlx.cli import console
from splitquant_mlx.cli.launched import launched_rank


@dataclass(frozen=True, kw_only=True)
class Loaded:
    """A loaded model.

    Attributes:
        name: name given by the user.
        path: its directory or .gguf file.
        nbytes: stored bytes of its weights.
        model: mlx-lm's model.
        tokenizer: mlx-lm's TokenizerWrapper.
        context: maximum context length in tokens; None if unknown.
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
    """Load a directory, .gguf file or repo id, after a check of the memory that it needs.

    Raises:
        MemoryTooSmallError: when it does not fit in memory.
        SplitQuantError: when the model cannot be found or used.
    """
    from splitquant_mlx.models.footprint import context_length, weight_bytes
    from splitquant_mlx.models.loader import load
    from splitquant_mlx.models.source import resolve
    from splitquant_mlx.runtime.ranks import is_single_rank

    source = resolve(name, revision=revision)
    nbytes = weight_bytes(source.path)
    if group is None or is_single_rank(group):  # ranks share the memory
        check_memory(source.path, f"running {name}")
    if not launched_rank():
        console.note(f"Loading {console.plain(name)} ({console.size(nbytes)}) ...")
    model, tokenizer = load(
        source, trust_remote_code=trust_remote_code, group=group, pipeline=pipeline
    )
    return Loaded(
        name=name,
        path=source.path,
        nbytes=nbytes,
        model=model,
        tokenizer=tokenizer,
        context=context_length(model),
    )


def warn_long_prompt(loaded: Loaded, tokens: int) -> None:
    """Print a warning if a prompt is longer than the model's context."""
    if (warning := long_prompt_warning(tokens, loaded.context)) and not launched_rank():
        console.note(warning)


def long_prompt_warning(tokens: int, context: int | None) -> str:
    """Return a warning about a prompt longer than the model's context; "" if it is not."""
    if context is None or tokens <= context:
        return ""
    return (
        f"warning: {tokens:,} tokens exceed the context of {context:,} tokens that this model "
        "supports: expect nonsense"
    )


def check_memory(path: Path, work: str) -> None:
    """Raise MemoryTooSmallError if a model does not fit in memory; print a warning if barely."""
    from splitquant_mlx.models.footprint import check_running

    if warning := check_running(path, work):
        console.note(f"warning: {warning}")
