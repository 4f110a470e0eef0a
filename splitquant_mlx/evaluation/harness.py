"""Run any task of lm-evaluation-harness with log-likelihoods from `loglikelihood.score`.

Importing this module raises RecipeError if lm-evaluation-harness is not installed. Tokenization,
truncation and special tokens are handled as in its `HFLM`, so that results are comparable.
"""

from collections.abc import Sequence
from typing import Any

import mlx.nn as nn

from splitquant_mlx.errors import RecipeError, one_line
from splitquant_mlx.evaluation.loglikelihood import Pair, Score, fit, score
from splitquant_mlx.models.footprint import context_length
from splitquant_mlx.progress import SILENT, Progress
from splitquant_mlx.runtime.ranks import Group, gather, shard, unshard

try:
    from lm_eval.api.model import TemplateLM
except ImportError as exc:
    raise RecipeError("lm-evaluation-harness is not installed: pip install lm-eval") from exc

DEFAULT_LENGTH = 2048  # the harness's, for models without a context length
DEFAULT_MAX_TOKENS = 256


class SplitQuantLM(TemplateLM):
    """A loaded model as a language model of lm-evaluation-harness.

    Args:
        model: an mlx-lm model, preferably prepared by `dense.for_scoring`.
        tokenizer: mlx-lm's TokenizerWrapper.
        group: ranks that share the requests; every rank returns all responses.
        progress: progress reporter.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any,
        *,
        group: Group | None = None,
        progress: Progress = SILENT,
    ) -> None:
        super().__init__()
        self.model = model
        self.tokenizer = tokenizer
        self.group = group
        self.progress = progress
        self.max_length = context_length(model) or DEFAULT_LENGTH

    @property
    def eot_token_id(self) -> int:
        """Return the end-of-text token."""
        return self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        """Return the token that replaces an empty context."""
        bos = self.tokenizer.bos_token_id
        return self.eot_token_id if bos is None else bos

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **kwargs: Any
    ) -> list[int]:
        """Return the tokens of a string, with at most one beginning-of-text token."""
        if add_special_tokens is None:
            opening = self.tokenizer.decode([self.prefix_token_id])
            add_special_tokens = not string.startswith(opening)
        return self.tokenizer.encode(string, add_special_tokens=add_special_tokens, verbose=False)

    def loglikelihood_rolling(
        self, requests: Sequence[Any], disable_tqdm: bool = False
    ) -> list[float]:
        """Return the log-likelihood of each text, nats, in windows whose targets do not overlap."""
        from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

        pairs: list[Pair] = []
        owners = []
        for owner, request in enumerate(requests):
            windows = get_rolling_token_windows(
                token_list=self.tok_encode(request.args[0]),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            pairs += map(make_disjoint_window, windows)
            owners += [owner] * (len(pairs) - len(owners))
        totals = [0.0] * len(requests)
        for owner, scored in zip(owners, self._score(pairs), strict=True):
            totals[owner] += scored.loglikelihood
        return totals

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Return the continuation of each prompt, up to a stop string or the maximum length."""
        share = shard(self.group, requests)
        with self.progress.task("Generating", len(share)) as advance:
            texts = []
            for request in share:
                texts.append(self._generate(*request.args))
                advance(1)
        return unshard(self.group, texts)

    def _generate(self, prompt: str, settings: dict[str, Any]) -> str:
        from lm_eval.models.utils import (
            handle_stop_sequences,
            normalize_gen_kwargs,
            postprocess_generated_text,
        )
        from mlx_lm.generate import stream_generate
        from mlx_lm.sample_utils import make_sampler

        options: dict[str, Any] = {**normalize_gen_kwargs(settings, DEFAULT_MAX_TOKENS)}
        eos = self.tokenizer.decode([self.eot_token_id])
        stops = [stop for stop in handle_stop_sequences(options["until"], eos) if stop]
        max_prompt = self.max_length - options["max_gen_toks"]
        if max_prompt < 1:
            raise RecipeError(
                f"expected less than the model's context length ({self.max_length}), got "
                f"{options['max_gen_toks']}",
                field="max_gen_toks",
            )
        text = ""
        for piece in stream_generate(
            self.model,
            self.tokenizer,
            self.tok_encode(prompt)[-max_prompt:],
            max_tokens=options["max_gen_toks"],
            sampler=make_sampler(
                options.get("temperature", float(options["do_sample"])),
                top_p=options.get("top_p", 1.0),
                top_k=options.get("top_k", 0),
            ),
        ):
            text += piece.text
            if any(stop in text for stop in stops):
                break
        return postprocess_generated_text(text, stops, None)

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], **kwargs: Any
    ) -> list[tuple[float, bool]]:
        pairs = [fit(context, end, self.max_length) for _, context, end in requests]
        return [(scored.loglikelihood, scored.is_greedy) for scored in self._score(pairs)]

    def _score(self, pairs: Sequence[Pair]) -> list[Score]:
        """Return the scores in the pairs' order, on every rank."""
        computed = [
            (index, scored.loglikelihood, scored.is_greedy)
            for index, scored in score(self.model, pairs, group=self.group, progress=self.progress)
        ]
        scores = {
            index: Score(loglikelihood=loglikelihood, is_greedy=is_greedy)
            for share in gather(self.group, computed)
            for index, loglikelihood, is_greedy in share
        }
        return [scores[index] for index in range(len(pairs))]


def run_task(
    model: nn.Module,
    tokenizer: Any,
    task: str | dict[str, Any],
    *,
    num_shots: int | None = None,
    limit: int | None = None,
    group: Group | None = None,
    progress: Progress = SILENT,
) -> dict[str, Any]:
    """Run a task of lm-evaluation-harness and return the results of its `simple_evaluate`.

    Args:
        model: an mlx-lm model, preferably prepared by `dense.for_scoring`.
        tokenizer: mlx-lm's TokenizerWrapper.
        task: name of a task or group of the harness, or a task's configuration.
        num_shots: number of few-shot examples; None is the task's default.
        limit: number of documents to evaluate, from the start; None is all.
        group: ranks that share the requests; every rank returns the complete results.
        progress: progress reporter.

    Raises:
        RecipeError: when the task does not exist, its data cannot be loaded, or its requests
            exceed the model's context length.
    """
    with progress.task("Reading lm-eval's tasks"):  # thousands of files
        from lm_eval.evaluator import simple_evaluate
        from lm_eval.tasks import TaskManager

        manager = TaskManager(include_defaults=isinstance(task, str))
    if isinstance(task, str) and task not in manager.all_tasks:
        raise RecipeError(f"lm-evaluation-harness has no task {task!r}: see `lm-eval ls tasks`")
    lm = SplitQuantLM(model, tokenizer, group=group, progress=progress)
    try:
        results = simple_evaluate(
            model=lm,
            tasks=[task],
            num_fewshot=num_shots,
            limit=limit,
            task_manager=manager,
        )
    except (OSError, ValueError) as exc:  # such as those of a failed data set download
        raise RecipeError(f"lm-evaluation-harness cannot run the task: {one_line(exc)}") from exc
    assert results is not None  # None on ranks after the first of the harness's own distribution
    return dict(results)
