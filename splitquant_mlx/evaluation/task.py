"""Evaluate one model on one task and return JSON values."""

import dataclasses
import hashlib
from collections.abc import Iterable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import mlx.core as mx

from splitquant_mlx.data.questions import Question, fetch_questions, load_questions
from splitquant_mlx.data.text import cut_windows, encode, fetch_wikitext, load_text, text_hash
from splitquant_mlx.errors import RecipeError, closest_word
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
from splitquant_mlx.runtime.ranks import Group, check_alike, fail_together, is_single_rank, shard


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
        task: the task and its settings.
        reference: model to compare with: required for "kl", optional for ARC (the same questions),
            not allowed otherwise.
        revision: revision of the model's hub repo.
        trust_remote_code: run Python files that come with the checkpoint.
        group: ranks that share the questions or the text, each with the whole model; every rank
            returns the complete result.
        progress: progress reporter.

    Returns:
        JSON values: "model", "model_hash" (of its content), "task", "settings", "reference",
        "values" (the metrics; with a reference for ARC, also its metrics under "reference" and
        McNemar's test under "comparison"), and the environment.

    Raises:
        SplitQuantError: when the model or the data cannot be loaded, or a setting is invalid.
    """
    model = str(model)
    reference = None if reference is None else str(reference)
    _check_reference(task, reference)
    options: Any = {"trust_remote_code": trust_remote_code, "progress": progress}
    with fail_together(group), ExitStack() as stack:
        lazy_model = stack.enter_context(open_model(model, revision=revision, **options))
        lazy_reference = None
        if reference is not None:
            lazy_reference = stack.enter_context(open_model(reference, revision=None, **options))
        models = [lazy_model, lazy_reference] if lazy_reference else [lazy_model]
        for opened in [] if is_single_rank(group) else models:
            check_alike(group, f"model at {opened.path}", opened.hash)
        length = window_length(task.context_length, models)
        task = dataclasses.replace(task, context_length=length)
        values = _measure(lazy_model, lazy_reference, task, length, group, progress)
        model_hash = lazy_model.hash
    settings = {name: value for name, value in dataclasses.asdict(task).items() if name != "name"}
    return {
        "model": model,
        "model_hash": model_hash,
        "task": task.name,
        "settings": {name: str(v) if isinstance(v, Path) else v for name, v in settings.items()},
        "reference": reference,
        "values": values,
        "device": mx.default_device().type.name,
        **made_with(),
    }


def _check_reference(task: Task, reference: str | None) -> None:
    if task.name == "kl" and reference is None:
        raise RecipeError("task kl: expected a model to compare with, got none: give --reference")
    if task.name not in (*ARC_TASKS, "kl") and reference is not None:
        raise RecipeError(f"task {task.name} takes no --reference")


def _measure(
    model: LazyModel,
    reference: LazyModel | None,
    task: Task,
    length: int,
    group: Group | None,
    progress: Progress,
) -> dict[str, Any]:
    if task.name in ARC_TASKS:
        return _arc(model, reference, task, group, progress)
    if task.name == "perplexity":
        return _perplexity(model, task, length, group, progress)
    if task.name == "kl":
        assert reference
        return _divergence(model, reference, task, length, group, progress)
    return _harness(model, task, group, progress)


def window_length(context_length: int | None, models: Iterable[LazyModel]) -> int:
    """Return the number of tokens per window of text.

    Args:
        context_length: requested length; None for 512, or the smallest context length of `models`
            if that is shorter.
        models: the models that read the text.

    Raises:
        RecipeError: when the requested length exceeds the context length of a model.
    """
    limits = [context_limit(read_config(opened.path)) for opened in models]
    limit = min((tokens for tokens in limits if tokens is not None), default=None)
    if context_length is None:
        return min(CONTEXT_LENGTH, limit or CONTEXT_LENGTH)
    check_context("context_length", context_length, limit)
    return context_length


def _arc(
    model: LazyModel,
    reference: LazyModel | None,
    task: Task,
    group: Group | None,
    progress: Progress,
) -> dict[str, Any]:
    questions = load_questions(task.data) if task.data else fetch_questions(task.name)
    questions = questions[: task.limit]
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

    def answer(opened: LazyModel) -> ArcResult:
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

    result = answer(model)
    values = dataclasses.asdict(result)
    if reference:
        reference_result = answer(reference)
        values["reference"] = dataclasses.asdict(reference_result)
        values["comparison"] = dataclasses.asdict(compare(result.correct, reference_result.correct))
    return values


def _perplexity(
    model: LazyModel, task: Task, length: int, group: Group | None, progress: Progress
) -> dict[str, Any]:
    text = _text(task)
    tokens = encode(model.tokenizer, text)
    if task.limit:
        tokens = tokens[: task.limit * (task.stride or length)]
    result = measure_perplexity(
        model.model,
        tokens,
        context_length=length,
        stride=task.stride,
        group=group,
        progress=progress,
    )
    return {**dataclasses.asdict(result), "text_sha256": text_hash(text)}


def _divergence(
    model: LazyModel,
    reference: LazyModel,
    task: Task,
    length: int,
    group: Group | None,
    progress: Progress,
) -> dict[str, Any]:
    text = _text(task)
    windows = cut_windows(encode(reference.tokenizer, text), length, task.limit)
    if group is not None and len(windows) < group.size():
        raise RecipeError(
            f"expected at least one window of text per rank, got {len(windows)} windows for "
            f"{group.size()} ranks: give a longer text, or start fewer ranks"
        )
    predictions = open_reference(
        shard(group, windows), model_hash=reference.hash, load=reference.load, progress=progress
    )
    result = measure_divergence(model.model, predictions, group=group, progress=progress)
    return {**dataclasses.asdict(result), "text_sha256": text_hash(text)}


def _text(task: Task) -> str:
    return load_text(task.data) if task.data else fetch_wikitext()


def _harness(
    model: LazyModel, task: Task, group: Group | None, progress: Progress
) -> dict[str, Any]:
    from splitquant_mlx.evaluation.harness import run_task

    if task.data or task.shots:
        near = closest_word(task.name, TASKS)
        hint = f", or did you mean {near}?" if near else ""
        raise RecipeError(
            f"task {task.name} of lm-eval defines its data: omit --data and --shots{hint}"
        )
    results = run_task(
        model.model,
        model.tokenizer,
        task.name,
        num_shots=task.num_shots,
        limit=task.limit,
        group=group,
        progress=progress,
    )
    return {
        f"{name} {metric.removesuffix(',none')}": value
        for name, metrics in results["results"].items()
        for metric, value in metrics.items()
        if isinstance(value, int | float)
    }
