"""Settings of an evaluation: one field for each option of `eval`."""

from importlib.util import find_spec
from pathlib import Path
from typing import Literal, get_args

from splitquant_mlx.errors import RecipeError, closest_word
from splitquant_mlx.settings import PositiveInt, settings

ArcTask = Literal["arc_challenge", "arc_easy"]
Protocol = Literal["loglikelihood", "letter"]
ARC_TASKS: tuple[str, ...] = get_args(ArcTask)
TASKS = (*ARC_TASKS, "perplexity", "kl")
ALIASES = {"ppl": "perplexity", "arc": " or ".join(ARC_TASKS)}
CONTEXT_LENGTH = 512  # default; the model's context length if that is shorter


@settings
class Task:
    """Settings of an evaluation task.

    Attributes:
        name: task: arc_challenge, arc_easy, perplexity (the default), kl or a task of lm-eval.
        protocol: form of the questions: loglikelihood (as in lm-eval, the default) or letter (with
            the chat template).
        num_shots: few-shot examples before each question; by default 0, or the lm-eval task's
            default.
        data: .jsonl, .parquet, .csv or text file, instead of the data set on the hub.
        shots: file of questions to draw few-shot examples from, instead of the data set on the hub.
        limit: maximum number of questions, or of windows of text.
        context_length: tokens per window of text; by default 512, or the model's context length if
            that is shorter.
        stride: tokens from the start of one window to the next, for perplexity; by default
            context_length.
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
            raise RecipeError(f"task: expected the name of one task, got {self.name!r}")
        near = ALIASES.get(self.name)
        if self.name not in TASKS and not find_spec("lm_eval"):
            near = near or closest_word(self.name, TASKS)
        if near:
            raise RecipeError(f"unknown task {self.name!r}: did you mean {near}?")
