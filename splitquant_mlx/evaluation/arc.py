"""Measure the accuracy of a model on multiple-choice questions such as ARC's.

`protocols.py` turns each option of a question into a continuation. The model's answer is the option
with the largest log-likelihood: "acc" of lm-evaluation-harness. The protocol "loglikelihood" has a
second metric, "acc_norm", by the log-likelihood per character, which does not favour short options.
"""

import hashlib
import json
import math
from collections.abc import Sequence
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
from splitquant_mlx.runtime.ranks import Group, gather, is_single_rank


@dataclass(frozen=True, kw_only=True)
class Exam:
    """Questions and the way they are asked.

    Attributes:
        task: name of the data set, such as "arc_challenge".
        questions: see `questions.load_questions`.
        protocol: "loglikelihood" or "letter".
        shots: questions of another split to draw few-shot examples from.
        num_shots: number of few-shot examples before each question, 0 to 25.
    """

    task: str
    questions: Sequence[Question]
    protocol: str = "loglikelihood"
    shots: Sequence[Question] = ()
    num_shots: int = 0


@dataclass(frozen=True, kw_only=True)
class ArcResult:
    """Result of a model on a list of questions.

    Attributes:
        task: name of the data set, such as "arc_challenge".
        protocol: "loglikelihood" or "letter".
        num_shots: number of few-shot examples before each question.
        questions: number of questions.
        accuracy: fraction of correct answers.
        standard_error: standard error of accuracy, sample standard deviation / sqrt(questions);
            NaN for a single question.
        accuracy_norm: accuracy by the log-likelihood per character; None for "letter".
        standard_error_norm: standard error of accuracy_norm; None for "letter".
        ids: ids of the questions, in order.
        correct: 1 for each correct answer, else 0.
        correct_norm: the same by the log-likelihood per character; None for "letter".
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
    journal: Path,
    model_hash: str,
    group: Group | None = None,
    progress: Progress = SILENT,
) -> ArcResult:
    """Measure the zero-shot or few-shot accuracy of a model.

    Args:
        model: an mlx-lm model, preferably prepared by `dense.for_scoring`.
        tokenizer: mlx-lm's TokenizerWrapper.
        exam: the questions and the way they are asked.
        journal: file that stores the answers. A run with the same model, prompts and versions
            resumes from it; any other run overwrites it.
        model_hash: identifies the model in the journal; see `lazy.model_hash`.
        group: ranks that share the questions, each with a separate journal; every rank returns the
            complete result.
        progress: progress reporter.

    Raises:
        RecipeError: when a setting is out of range or conflicts with another.
        CheckpointError: when the chat template fails.
        TargetError: when the journal cannot be written.
    """
    questions, task = exam.questions, exam.task
    if len({question.id for question in questions}) < max(len(questions), 1):
        raise RecipeError("expected one or more, each with a unique id", field="questions")
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
        Journal(journal, _key(settings, prompts)) as opened,
        progress.task(f"Answering {task}", len(questions)) as advance,
    ):
        answers = {question.id: question.answer for question in questions}
        scores = _score_options(model, prompts, answers, opened, group, advance)
    return _result(exam, scores)


def _score_options(
    model: nn.Module,
    prompts: dict[str, list[Pair]],
    answers: dict[str, int],
    journal: Journal,
    group: Group | None,
    advance: Advance,
) -> dict[str, list[float]]:
    """Return the log-likelihoods of each question's options, nats, by question id."""
    resumed = {done["id"]: done["loglikelihoods"] for done in journal.done}
    scores = {name: values for done in gather(group, resumed) for name, values in done.items()}
    correct = sum(values.index(max(values)) == answers[name] for name, values in scores.items())
    advance(len(scores))
    remaining = {name: pairs for name, pairs in prompts.items() if name not in scores}
    options = [(name, option) for name, pairs in remaining.items() for option in range(len(pairs))]
    partial: dict[str, dict[int, float]] = {name: {} for name in remaining}
    pairs = [remaining[name][option] for name, option in options]

    def add(index: int, loglikelihood: float) -> None:
        nonlocal correct
        name, option = options[index]
        partial[name][option] = loglikelihood
        if name in scores or len(partial[name]) < len(remaining[name]):
            return
        scores[name] = [value for _, value in sorted(partial[name].items())]
        journal.append({"id": name, "loglikelihoods": scores[name]})
        correct += scores[name].index(max(scores[name])) == answers[name]
        advance(1, f"{correct / len(scores):.1%} correct")

    computed = []
    for index, score_ in score(model, pairs, group=group):
        computed.append((index, score_.loglikelihood))
        add(index, score_.loglikelihood)
    for share in [] if is_single_rank(group) else gather(group, computed):
        for index, loglikelihood in share:
            add(index, loglikelihood)
    return scores


def _key(settings: dict[str, Any], prompts: dict[str, list[Pair]]) -> dict[str, Any]:
    """Return everything the log-likelihoods depend on, with a hash of the prompts."""
    content = json.dumps([[name, *pairs] for name, pairs in prompts.items()])
    return {
        **settings,
        "prompts": hashlib.sha256(content.encode()).hexdigest(),
        "device": mx.default_device().type.name,
        "versions": [version(package) for package in ("splitquant-mlx", "mlx", "mlx-lm")],
    }


def _result(exam: Exam, scores: dict[str, list[float]]) -> ArcResult:
    correct, correct_norm = [], []
    for question in exam.questions:
        values = np.array(scores[question.id])
        lengths = [len(choice) for choice in question.choices]
        correct.append(int(np.argmax(values) == question.answer))
        correct_norm.append(int(np.argmax(values / lengths) == question.answer))
    has_norm = exam.protocol == "loglikelihood"
    return ArcResult(
        task=exam.task,
        protocol=exam.protocol,
        num_shots=exam.num_shots,
        questions=len(exam.questions),
        accuracy=sum(correct) / len(correct),
        standard_error=_standard_error(correct),
        accuracy_norm=sum(correct_norm) / len(correct_norm) if has_norm else None,
        standard_error_norm=_standard_error(correct_norm) if has_norm else None,
        ids=tuple(question.id for question in exam.questions),
        correct=tuple(correct),
        correct_norm=tuple(correct_norm) if has_norm else None,
    )


def _standard_error(values: Sequence[int]) -> float:
    count = len(values)
    return float(np.std(values, ddof=1)) / math.sqrt(count) if count > 1 else math.nan
