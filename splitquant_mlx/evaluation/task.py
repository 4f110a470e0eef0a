"""Evaluate one model on one task, from its directory to JSON values."""

import dataclasses
import hashlib
from collections.abc import Iterable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import mlx.core as mx

from splitquant_mlx.data.questions import Question, fetch_questions, load_questions
from splitquant_mlx.data.text import cut_windows, encode, fetch_wikitext, load_text, text_hash
from splitquant_mlx.errors import RecipeError, meant
from splitquant_mlx.evaluation.arc import ArcResult, Exam, evaluate_arc
from splitquant_mlx.evaluation.divergence import measure_divergence
from splitquant_mlx.evaluation.paired import compare
from splitquant_mlx.evaluation.perplexity import measure_perplexity
from splitquant_mlx.evaluation.reference import open_reference
from splitquant_mlx.evaluation.settings import ARC_TASKS, CONTEXT_LENGTH, TASKS, Task
from splitquant_mlx.models.config import read_config
from splitquant_mlx.models.footprint import check_context, context_limit
from splitquant_mlx.models.lazy import LazyModel, open_model
from splitquant_mlx.progress import SILENT, Progress
from splitquant_mlx.runtime.cache import cache_directory
from splitquant_mlx.runtime.environment import made_with
from splitquant_mlx.runtime.ranks import Group, alone, check_alike, deal, together


def evaluate(
    model: str | Path,
    task: Task,
    *,
    reference: str | Path | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    group: Group | None = None,
    progress: Progress = SILENT,
) -> dict[str, Any]:
    """Evaluate `model` on `task`.

    Args:
        model: repo id, directory or .gguf file.
        task: what to do.
        reference: a model to compare with: the one that "kl" measures from, or one that answers
            the same questions.
        revision: of the model's hub repo.
        trust_remote_code: run Python files that the checkpoint brings along.
        group: ranks that share the questions or the text, each with the whole model, and all
            return what one would alone.
        progress: told how far the work is.

    Returns:
        JSON values: "model", "model_hash" (of its content), "task", "settings", "reference",
        "values" (what was found; with a reference for ARC, its own under "reference" and McNemar's
        test under "comparison"), and the environment.

    Raises:
        SplitQuantError: when model, data or settings cannot be had or used.
    """
    model = str(model)
    reference = None if reference is None else str(reference)
    _check_reference(task, reference)
    options: Any = {"trust_remote_code": trust_remote_code, "progress": progress}
    with together(group), ExitStack() as stack:
        own = stack.enter_context(open_model(model, revision=revision, **options))
        other = None
        if reference is not None:
            other = stack.enter_context(open_model(reference, revision=None, **options))
        for opened in [] if alone(group) else filter(None, (own, other)):
            check_alike(group, f"model at {opened.path}", opened.hash)
        length = window_length(task.context_length, filter(None, (own, other)))
        task = dataclasses.replace(task, context_length=length)
        found = _measure(own, other, task, group, progress)
        model_hash = own.hash
    settings = {name: value for name, value in dataclasses.asdict(task).items() if name != "name"}
    return {
        "model": model,
        "model_hash": model_hash,
        "task": task.name,
        "settings": {name: str(v) if isinstance(v, Path) else v for name, v in settings.items()},
        "reference": reference,
        "values": found,
        "device": mx.default_device().type.name,
        **made_with(),
    }


def _check_reference(task: Task, reference: str | None) -> None:
    if task.name == "kl" and reference is None:
        raise RecipeError("task kl measures the distance from another model: name it (--reference)")
    if task.name not in (*ARC_TASKS, "kl") and reference is not None:
        raise RecipeError(f"task {task.name} takes no --reference")


def _measure(
    own: LazyModel,
    other: LazyModel | None,
    task: Task,
    group: Group | None,
    progress: Progress,
) -> dict[str, Any]:
    if task.name in ARC_TASKS:
        return _answer(own, other, task, group, progress)
    if task.name == "perplexity":
        return _perplexity(own, task, group, progress)
    if task.name == "kl":
        assert other
        return _divergence(own, other, task, group, progress)
    return _harness(own, task, group, progress)


def window_length(asked: int | None, models: Iterable[LazyModel]) -> int:
    """Return the tokens per window of text that `models` are measured in.

    Args:
        asked: what the user wants; None for 512, or what the models were made for where it is less.
        models: those to be measured.

    Raises:
        RecipeError: when more is asked for than a model was made for.
    """
    limits = [context_limit(read_config(opened.path)) for opened in models]
    limit = min((tokens for tokens in limits if tokens is not None), default=None)
    if asked is None:
        return min(CONTEXT_LENGTH, limit or CONTEXT_LENGTH)
    check_context("context_length", asked, limit)
    return asked


def _answer(
    own: LazyModel, other: LazyModel | None, task: Task, group: Group | None, progress: Progress
) -> dict[str, Any]:
    """Have a model, and the one to compare it with, answer the same questions."""
    read = load_questions(task.data) if task.data else fetch_questions(task.name)
    questions = read[: task.limit]
    num_shots = task.num_shots or 0
    shots: list[Question] = []
    if num_shots:
        shots = load_questions(task.shots) if task.shots else fetch_questions(task.name, "train")

    exam = Exam(
        task=task.name,
        questions=questions,
        protocol=task.protocol,
        shots=shots,
        num_shots=num_shots,
    )

    def answers(opened: LazyModel) -> ArcResult:
        key = (opened.hash, task.name, task.protocol, num_shots, [q.id for q in questions])
        name = hashlib.sha256(repr(key).encode()).hexdigest()[:32]
        if group is not None and group.rank():
            name += f"-{group.rank()}"
        return evaluate_arc(
            opened.model,
            opened.tokenizer,
            exam,
            journal=cache_directory() / "answers" / f"{name}.jsonl",
            model_hash=opened.hash,
            group=group,
            progress=progress,
        )

    mine = answers(own)
    values = dataclasses.asdict(mine)
    if other:
        theirs = answers(other)
        values["reference"] = dataclasses.asdict(theirs)
        values["comparison"] = dataclasses.asdict(compare(mine.correct, theirs.correct))
    return values


def _perplexity(
    own: LazyModel, task: Task, group: Group | None, progress: Progress
) -> dict[str, Any]:
    text = _text(task)
    tokens = encode(own.tokenizer, text)
    if task.limit:
        tokens = tokens[: task.limit * (task.stride or task.context_length or 0)]
    found = measure_perplexity(
        own.model,
        tokens,
        context_length=task.context_length or CONTEXT_LENGTH,
        stride=task.stride,
        group=group,
        progress=progress,
    )
    return {**dataclasses.asdict(found), "text_sha256": text_hash(text)}


def _divergence(
    own: LazyModel, other: LazyModel, task: Task, group: Group | None, progress: Progress
) -> dict[str, Any]:
    text = _text(task)
    windows = cut_windows(
        encode(other.tokenizer, text), task.context_length or CONTEXT_LENGTH, task.limit
    )
    if group is not None and len(windows) < group.size():
        raise RecipeError(
            f"{len(windows)} windows of text are too few for {group.size()} ranks: give a longer "
            "text, or take fewer ranks"
        )
    mine = deal(group, windows)
    reference = open_reference(mine, model_hash=other.hash, load=other.load, progress=progress)
    found = measure_divergence(own.model, reference, group=group, progress=progress)
    return {**dataclasses.asdict(found), "text_sha256": text_hash(text)}


def _text(task: Task) -> str:
    return load_text(task.data) if task.data else fetch_wikitext()


def _harness(own: LazyModel, task: Task, group: Group | None, progress: Progress) -> dict[str, Any]:
    from splitquant_mlx.evaluation.harness import run_task

    if task.data or task.shots:
        near = meant(task.name, TASKS)
        hint = f"did you mean {near}? " if near else ""
        raise RecipeError(
            f"{hint}Task {task.name} is lm-eval's, which has its own data: leave out --data"
        )
    found = run_task(
        own.model,
        own.tokenizer,
        task.name,
        num_shots=task.num_shots,
        limit=task.limit,
        group=group,
        progress=progress,
    )
    return {
        f"{name} {metric.removesuffix(',none')}": value
        for name, metrics in found["results"].items()
        for metric, value in metrics.items()
        if isinstance(value, int | float)
    }
