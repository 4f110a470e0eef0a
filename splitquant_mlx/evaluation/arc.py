"""Measure the accuracy of a model on multiple-choice questions such as ARC's.

The model rates the options of each question as `protocols.py` puts them, and the option of the
largest log-likelihood is its answer. In the protocol "loglikelihood" there is a second answer, by
the log-likelihood a character, so that long options are not at a disadvantage: "acc" and
"acc_norm" of lm-evaluation-harness.
"""

import hashlib
import json
import math
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from splitquant_mlx.data.questions import Question
from splitquant_mlx.errors import RecipeError
from splitquant_mlx.evaluation.loglikelihood import Pair, score
from splitquant_mlx.evaluation.protocols import draw_shots, encode_question
from splitquant_mlx.models.footprint import context_length
from splitquant_mlx.progress import SILENT, Advance, Progress
from splitquant_mlx.runtime.journal import Journal
from splitquant_mlx.runtime.ranks import Group, alone, gather


@dataclass(frozen=True, kw_only=True)
class Exam:
    """Questions, and how they are asked.

    Attributes:
        task: name that the result carries.
        questions: see `questions.load_questions`.
        protocol: "loglikelihood" or "letter".
        shots: questions to draw solved examples from, of another split.
        num_shots: number of examples before each question, 0 to 25.
    """

    task: str
    questions: Sequence[Question]
    protocol: str = "loglikelihood"
    shots: Sequence[Question] = ()
    num_shots: int = 0


@dataclass(frozen=True, kw_only=True)
class ArcResult:
    """Hold how a model answered a list of questions.

    Attributes:
        task: name of the data, such as "arc_challenge".
        protocol: "loglikelihood" or "letter".
        num_shots: number of solved examples before each question.
        questions: number of questions.
        accuracy: share of right answers.
        standard_error: of accuracy, sample standard deviation / sqrt(questions); NaN for a single
            question.
        accuracy_norm: share of right answers by the log-likelihood a character; None for "letter".
        standard_error_norm: of accuracy_norm; None for "letter".
        ids: of the questions, in their order.
        correct: 1 for each question answered right, 0 for each other.
        correct_norm: the same by the log-likelihood a character; None for "letter".
    """

    task: str
    protocol: str
    num_shots: int
    questions: int
    accuracy: float
    standard_error: float
    accuracy_norm: float | None
    standard_error_norm: float | None
    ids: tuple[str, ...]
    correct: tuple[int, ...]
    correct_norm: tuple[int, ...] | None


def evaluate_arc(
    model: nn.Module,
    tokenizer: Any,
    exam: Exam,
    *,
    journal: Path | None = None,
    model_hash: str | None = None,
    group: Group | None = None,
    progress: Progress = SILENT,
) -> ArcResult:
    """Have a model answer questions, after none or some solved examples.

    Args:
        model: one of mlx-lm's, best after `scoring.for_scoring`.
        tokenizer: mlx-lm's TokenizerWrapper.
        exam: the questions, and how they are asked.
        journal: file to keep the answers in. A run with the same model, prompts and versions goes
            on from there; any other begins the file afresh.
        model_hash: names the model in the journal; see `reference.model_hash`.
        group: ranks that share the work, each with a journal of its own, and have one result.
        progress: told how many questions have been answered.

    Raises:
        RecipeError: when a setting is out of range or does not fit the others.
        CheckpointError: when the chat template fails.
        TargetError: when the journal cannot be written.
    """
    questions, task = exam.questions, exam.task
    if len({question.id for question in questions}) < max(len(questions), 1):
        raise RecipeError("questions: expected one or more, each with an id of its own")
    if journal and not model_hash:
        raise RecipeError(
            "journal: expected the model_hash too, to tell one model's from another's"
        )
    drawn = draw_shots(exam.shots, exam.num_shots, questions)
    length = context_length(model)
    prompts: dict[str, list[Pair]] = {}
    with progress.task("Encoding questions", len(questions)) as advance:
        for question, examples in zip(questions, drawn, strict=True):
            prompts[question.id] = encode_question(
                tokenizer, question, examples, protocol=exam.protocol, length=length
            )
            advance(1)
    settings = {"task": task, "protocol": exam.protocol, "num_shots": exam.num_shots}
    settings["model"] = model_hash
    with (
        Journal(journal, _key(settings, prompts)) if journal else nullcontext() as kept,
        progress.task(f"Answering {task}", len(questions)) as advance,
    ):
        answers = {question.id: question.answer for question in questions}
        rated = _rate(model, prompts, answers, kept, group, advance)
    return _result(exam, rated)


def _rate(
    model: nn.Module,
    prompts: dict[str, list[Pair]],
    answers: dict[str, int],
    journal: Journal | None,
    group: Group | None,
    advance: Advance,
) -> dict[str, list[float]]:
    """Return the log-likelihoods of every question's options, nats, by the question's id."""
    own = {done["id"]: done["loglikelihoods"] for done in journal.done} if journal else {}
    rated = {name: values for done in gather(group, own) for name, values in done.items()}
    right = sum(values.index(max(values)) == answers[name] for name, values in rated.items())
    advance(len(rated))
    left = {name: pairs for name, pairs in prompts.items() if name not in rated}
    options = [(name, option) for name, pairs in left.items() for option in range(len(pairs))]
    partial: dict[str, dict[int, float]] = {name: {} for name in left}
    pairs = [left[name][option] for name, option in options]

    def note(index: int, loglikelihood: float) -> None:
        nonlocal right
        name, option = options[index]
        partial[name][option] = loglikelihood
        if name in rated or len(partial[name]) < len(left[name]):
            return
        rated[name] = [value for _, value in sorted(partial[name].items())]
        if journal:
            journal.append({"id": name, "loglikelihoods": rated[name]})
        right += rated[name].index(max(rated[name])) == answers[name]
        advance(1, f"{right / len(rated):.1%} right")

    found = []
    for index, score_ in score(model, pairs, group=group):
        found.append((index, score_.loglikelihood))
        note(*found[-1])
    for share in [] if alone(group) else gather(group, found):
        for index, loglikelihood in share:
            note(index, loglikelihood)
    return rated


def _key(settings: dict[str, Any], prompts: dict[str, list[Pair]]) -> dict[str, Any]:
    """Return everything that the log-likelihoods depend on, the prompts as a hash."""
    content = json.dumps([[name, *pairs] for name, pairs in prompts.items()])
    return {
        **settings,
        "prompts": hashlib.sha256(content.encode()).hexdigest(),
        "device": mx.default_device().type.name,
        "versions": [version(package) for package in ("splitquant-mlx", "mlx", "mlx-lm")],
    }


def _result(exam: Exam, rated: dict[str, list[float]]) -> ArcResult:
    correct, correct_norm = [], []
    for question in exam.questions:
        values = np.array(rated[question.id])
        lengths = [len(choice) for choice in question.choices]
        correct.append(int(np.argmax(values) == question.answer))
        correct_norm.append(int(np.argmax(values / lengths) == question.answer))
    by_character = exam.protocol == "loglikelihood"
    return ArcResult(
        task=exam.task,
        protocol=exam.protocol,
        num_shots=exam.num_shots,
        questions=len(exam.questions),
        accuracy=sum(correct) / len(correct),
        standard_error=_standard_error(correct),
        accuracy_norm=sum(correct_norm) / len(correct_norm) if by_character else None,
        standard_error_norm=_standard_error(correct_norm) if by_character else None,
        ids=tuple(question.id for question in exam.questions),
        correct=tuple(correct),
        correct_norm=tuple(correct_norm) if by_character else None,
    )


def _standard_error(values: Sequence[int]) -> float:
    count = len(values)
    return float(np.std(values, ddof=1)) / math.sqrt(count) if count > 1 else math.nan
