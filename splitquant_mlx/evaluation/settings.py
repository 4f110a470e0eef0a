"""Settings of an evaluation: one field per option of `eval`."""

from importlib.util import find_spec
from pathlib import Path
from typing import Literal, get_args

from splitquant_mlx.errors import RecipeError, meant
from splitquant_mlx.settings import PositiveInt, settings

ArcTask = Literal["arc_challenge", "arc_easy"]
Protocol = Literal["loglikelihood", "letter"]
ARC_TASKS: tuple[str, ...] = get_args(ArcTask)
TASKS = (*ARC_TASKS, "perplexity", "kl")
ALIASES = {"ppl": "perplexity", "arc": " or ".join(ARC_TASKS)}
CONTEXT_LENGTH = 512  # where the model has no shorter one


@settings
class Task:
    """What a model is evaluated on.

    Attributes:
        name: what to do: arc_challenge, arc_easy, perplexity (the default), kl or a task of
            lm-eval.
        protocol: how to ask: loglikelihood (lm-eval's, the default) or letter (through the chat).
        num_shots: solved examples before each question; by default none, or the lm-eval task's
            own.
        data: .jsonl, .parquet, .csv or text, instead of the hub's data.
        shots: questions to draw the examples from, instead of the hub's.
        limit: at most so many questions, or windows of text.
        context_length: tokens per window of text; by default 512, or what the model was made for
            where that is less.
        stride: tokens from window to window, for perplexity; the window's length if not set.
    """

    name: str = "perplexity"
    protocol: Protocol = "loglikelihood"
    num_shots: int | None = None
    data: Path | None = None
    shots: Path | None = None
    limit: PositiveInt | None = None
    context_length: int | None = None
    stride: int | None = None

    def __post_init__(self) -> None:
        if "," in self.name:
            raise RecipeError(f"task {self.name!r}: one task at a time")
        near = ALIASES.get(self.name)
        if self.name not in TASKS and not find_spec("lm_eval"):
            near = near or meant(self.name, TASKS)
        if near:
            raise RecipeError(f"unknown task {self.name!r}: did you mean {near}?")
