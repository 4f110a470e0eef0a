"""Generate the answers to concurrent requests in the thread that runs mlx.

Other threads submit jobs and receive tokens through `AnswerJob.emit`. Answers are generated in one
batch (mlx-lm's BatchGenerator), or one after the other (stream_generate) with a draft model or a KV
cache that mlx-lm cannot batch. Multiple ranks run in lockstep: rank 0 sends the others its new and
cancelled jobs.
"""

import logging
import queue
import random
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from functools import lru_cache, partial
from itertools import count
from types import SimpleNamespace
from typing import Any, NamedTuple

import mlx.core as mx
from mlx_lm.generate import BatchGenerator, stream_generate
from mlx_lm.models.cache import LRUPromptCache, make_prompt_cache
from mlx_lm.sample_utils import make_logits_processors, make_sampler

from splitquant_mlx.errors import RecipeError, one_line
from splitquant_mlx.inference.grammar import Grammars
from splitquant_mlx.inference.protocol import internal_error
from splitquant_mlx.inference.settings import ServeSettings
from splitquant_mlx.runtime.ranks import Group, follow_rank_0, gather, is_single_rank

IDLE_S = 0.1  # how long to wait for a job when idle
RANK_STEPS = 8  # decoding steps between two messages among the ranks
SCORED_TOKENS = 256  # prompt tokens per block of logits
NO_TOKEN = -1  # stands for the answer when only the prompt is scored
MODEL = "model"  # key of the prompt cache, which supports several models
Sampler = Callable[[mx.array], mx.array]


class ScoredToken(NamedTuple):
    """A token, its log-probability (nats), the most likely tokens, and its finish reason."""

    token: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()
    finish: str | None = None


@dataclass(frozen=True, kw_only=True)
class AnswerPlan:
    """The computation of one answer; sent to the other ranks as JSON.

    Args:
        prompt: token ids, at least one.
        max_tokens: maximum number of tokens to generate; 0 only scores the prompt.
        sampling: temp, top_p, top_k and min_p of mlx-lm's make_sampler.
        penalties: arguments of mlx-lm's make_logits_processors.
        seed: seed of this answer's random numbers.
        top: number of most likely tokens to report per token; None reports no log-probabilities.
        score_prompt: whether to report log-probabilities of the prompt as well.
        grammar: llguidance grammar that constrains the answer.
    """

    prompt: list[int]
    max_tokens: int
    sampling: dict[str, Any] = field(default_factory=dict)
    penalties: dict[str, Any] = field(default_factory=dict)
    seed: int | None = None
    top: int | None = None
    score_prompt: bool = False
    grammar: str | None = None


@dataclass(eq=False, kw_only=True)
class AnswerJob:
    """A plan in progress."""

    plan: AnswerPlan
    cached: int = field(default=0, init=False)  # prompt tokens found in the prompt cache
    cancelled: bool = field(default=False, init=False)

    def emit(self, event: Any) -> None:
        """Receive an event of the engine; ignored here, as on all ranks but 0.

        Args:
            event: a list of ScoredToken for the prompt, if requested; a ScoredToken for each token
                of the answer, the last with a finish reason; or an Exception.
        """


class Engine:
    """Job scheduler that runs until `stopping` is set.

    Args:
        model: an mlx-lm model.
        tokenizer: mlx-lm's TokenizerWrapper.
        settings: settings of the server.
        group: group of ranks, each of which runs an engine.
        draft_model: model for speculative decoding, or None.
    """

    def __init__(
        self, model: Any, tokenizer: Any, settings: ServeSettings, *, group: Group, draft_model: Any
    ) -> None:
        self.model, self.tokenizer, self.settings = model, tokenizer, settings
        self.group, self.draft_model, self.stopping = group, draft_model, False
        cache = make_prompt_cache(model)
        self.vocab_size = model(mx.array([[0]]), cache=cache).shape[-1]
        if settings.kv_bits is not None:
            _check_kv_bits(cache, settings)
        self.grammars = Grammars(tokenizer, self.vocab_size)
        self._inbox: queue.SimpleQueue[AnswerJob] = queue.SimpleQueue()
        self._open: set[AnswerJob] = set()  # unfinished jobs
        self._closed: Exception | None = None
        self._sequential = (
            draft_model is not None
            or settings.kv_bits is not None
            or not all(hasattr(layer, "merge") for layer in cache)
        )
        self._reset()

    def submit(self, job: AnswerJob) -> None:
        """Queue a job; callable from any thread."""
        self._open.add(job)
        self._inbox.put(job)
        if self._closed is not None:
            self.close(self._closed)

    def close(self, exc: Exception) -> None:
        """End all current and future jobs with an error; callable from any thread."""
        self._closed = exc
        self._end_jobs(exc)

    def run(self) -> None:
        """Run until `stopping`. An exception ends the jobs in progress, not the engine."""
        while True:
            try:
                if not self._step():
                    return
            except Exception:
                # other ranks are out of step, or the exception was not caused by a job
                if not is_single_rank(self.group) or not self._open:
                    raise
                logging.exception("the answers in progress failed")
                self._end_jobs(internal_error())
                self._reset()

    def _end_jobs(self, exc: Exception) -> None:
        with suppress(KeyError):  # the set is empty
            while True:
                self._open.pop().emit(exc)

    def _reset(self) -> None:
        self._prompts = LRUPromptCache(
            self.settings.prompt_cache_size, self.settings.prompt_cache_bytes or 2**63
        )
        self._jobs: dict[int, AnswerJob] = {}  # by the generator's uid
        self._generator: Any = (
            SequentialGenerator(self) if self._sequential else self._batch_generator()
        )

    def _batch_generator(self) -> BatchGenerator:
        return BatchGenerator(
            self.model,
            stop_tokens=[[token] for token in self.tokenizer.eos_token_ids],
            completion_batch_size=self.settings.decode_concurrency,
            prefill_batch_size=self.settings.prompt_concurrency,
            prefill_step_size=self.settings.prefill_step_size,
            # the stream of the ranks' messages, so that all ranks run operations in the same order
            stream=mx.default_stream(mx.default_device()),
        )

    def _step(self) -> bool:
        """Start new jobs, end cancelled ones, compute a token; return False to stop."""
        new = self._new_jobs()
        cancelled = [uid for uid, job in self._jobs.items() if job.cancelled]
        changes = [asdict(job.plan) for job in new], cancelled, self.stopping
        plans, cancelled, stop = gather(self.group, changes)[0]
        caches = self._generator.remove(cancelled, return_prompt_caches=True) if cancelled else {}
        for uid in cancelled:
            self._finish(uid, *caches.get(uid, (None, None)))
        for job in new or [AnswerJob(plan=AnswerPlan(**plan)) for plan in plans]:
            self._start(job)
        for _ in range(1 if is_single_rank(self.group) else RANK_STEPS):
            for r in self._generator.next()[1] if self._jobs else []:
                job = self._jobs[r.uid]
                job.emit(_scored_token(r.token, r.logprobs, job.plan.top, r.finish_reason))
                if r.finish_reason:
                    self._finish(r.uid, r.prompt_cache, r.all_tokens)
        return not stop

    def _new_jobs(self) -> list[AnswerJob]:
        """Return the jobs submitted on rank 0; when idle, wait for one."""
        new: list[AnswerJob] = []
        with suppress(queue.Empty):
            if not self._jobs and self.group.rank() == 0:
                new.append(self._inbox.get(timeout=IDLE_S))
            while True:
                new.append(self._inbox.get_nowait())
        return [job for job in new if job in self._open]

    def _start(self, job: AnswerJob) -> None:
        plan = job.plan
        if plan.score_prompt:
            job.emit(self._score_prompt(plan))
        if plan.max_tokens == 0:
            self._open.discard(job)
            return job.emit(ScoredToken(NO_TOKEN, finish="length"))
        # not the last token: a cache does not contain the logits after it
        cache, rest = None, plan.prompt[:-1]
        if rest:
            cache, rest = self._prompts.fetch_nearest_cache(MODEL, rest)
        job.cached = len(plan.prompt) - 1 - len(rest)
        sampler = follow_rank_0(self.group, _seeded(_sampler(**plan.sampling), plan.seed))
        bias = {int(token): value for token, value in plan.penalties["logit_bias"].items()}
        processors = make_logits_processors(**{**plan.penalties, "logit_bias": bias})
        if plan.grammar is not None:
            processors.append(self.grammars.processor(plan.grammar))
        # mlx-lm 0.31 mixes up processors in a batch in which some answers have none
        processors = processors or [lambda tokens, logits: logits]
        (uid,) = self._generator.insert(
            [plan.prompt[job.cached :]],
            [plan.max_tokens],
            caches=[cache],
            all_tokens=[plan.prompt[: job.cached]],
            samplers=[sampler],
            logits_processors=[processors],
        )
        self._jobs[uid] = job

    def _finish(self, uid: int, cache: list[Any] | None, tokens: list[int] | None) -> None:
        if cache and tokens:
            self._prompts.insert_cache(MODEL, list(tokens), cache)
        self._open.discard(self._jobs.pop(uid))

    def _score_prompt(self, plan: AnswerPlan) -> list[ScoredToken]:
        """Return the prompt's tokens with log-probabilities, except for the first."""
        cache, scored = make_prompt_cache(self.model), [ScoredToken(plan.prompt[0])]
        inputs, targets = plan.prompt[:-1], plan.prompt[1:]
        for start in range(0, len(inputs), SCORED_TOKENS):
            block = slice(start, start + SCORED_TOKENS)
            logits = self.model(mx.array([inputs[block]]), cache=cache)[0].astype(mx.float32)
            logprobs = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
            scored += _score_tokens(logprobs, targets[block], plan.top or 0)
        return scored


class SequentialGenerator:
    """Generator of one answer after the other, with the interface of mlx-lm's BatchGenerator."""

    def __init__(self, engine: Engine) -> None:
        self._uids, self._waiting = count(), {}
        self._models = [m for m in (engine.model, engine.draft_model) if m is not None]
        names = "num_draft_tokens prefill_step_size kv_bits kv_group_size quantized_kv_start"
        options = {name: getattr(engine.settings, name) for name in names.split()}
        options["draft_model"] = engine.draft_model
        self._generate = partial(stream_generate, engine.model, engine.tokenizer, **options)

    def insert(self, prompts: list[Any], max_tokens: list[int], **lists: list[Any]) -> list[int]:
        """Add one answer; all arguments are lists of one element, and so is the result, its uid."""
        item, uid = {name: value for name, (value,) in lists.items()}, next(self._uids)
        models = self._models
        cache = item["caches"] or [layer for model in models for layer in make_prompt_cache(model)]
        responses = self._generate(
            prompts[0],
            max_tokens=max_tokens[0],
            sampler=item["samplers"],
            logits_processors=item["logits_processors"],
            prompt_cache=cache,
        )
        # the caches of model and draft model contain different tokens: do not reuse them
        reusable = cache if len(models) == 1 else None
        self._waiting[uid] = responses, reusable, item["all_tokens"] + prompts[0]
        return [uid]

    def next(self) -> tuple[list[Any], list[Any]]:
        """Return no prompt responses, and the next token of the first answer."""
        for uid, (responses, cache, tokens) in self._waiting.items():
            r = next(responses)
            tokens.append(r.token)
            if r.finish_reason:
                self.remove([uid])
            extra = {"uid": uid, "prompt_cache": cache, "all_tokens": tokens}
            return [], [SimpleNamespace(**vars(r), **extra)]
        return [], []

    def remove(self, uids: list[int], **options: Any) -> dict[int, Any]:
        """Stop answers and discard their KV caches."""
        for uid in uids:
            self._waiting.pop(uid)[0].close()
        return {}


def _check_kv_bits(cache: list[Any], settings: ServeSettings) -> None:
    try:
        for layer in cache:
            layer.to_quantized(group_size=settings.kv_group_size, bits=settings.kv_bits)
    except (ValueError, NotImplementedError, AttributeError) as exc:
        message = f"--kv-bits, --kv-group-size: unsupported by this model: {one_line(exc)}"
        raise RecipeError(message) from exc


def _scored_token(
    token: int, logprobs: mx.array, top: int | None, finish: str | None
) -> ScoredToken:
    """Return a token, with log-probabilities unless `top` is None."""
    scored = ScoredToken(token) if top is None else _score_tokens(logprobs[None], [token], top)[0]
    return scored._replace(finish=finish)


def _score_tokens(logprobs: mx.array, tokens: list[int], top: int) -> list[ScoredToken]:
    """Return tokens with log-probabilities and the `top` most likely; logprobs: (n, vocab)."""
    logprobs = mx.maximum(logprobs.astype(mx.float32), -9999.0)  # JSON has no infinity
    order: Any = mx.argsort(-logprobs, axis=-1)[:, :top]
    chosen: Any = mx.take_along_axis(logprobs, mx.array(tokens)[:, None], axis=-1)[:, 0]
    top_logprobs: Any = mx.take_along_axis(logprobs, order, axis=-1)
    rows: Any = zip(chosen.tolist(), order.tolist(), top_logprobs.tolist(), strict=True)
    rows = [(logprob, tuple(zip(*best, strict=True))) for logprob, *best in rows]
    return [ScoredToken(token, *row) for token, row in zip(tokens, rows, strict=True)]


@lru_cache(maxsize=64)
def _sampler(temp: float, top_p: float, **rest: Any) -> Sampler:
    """Return the same sampler for equal settings, so that a batch samples at once."""
    return make_sampler(temp if top_p else 0.0, top_p, **rest)  # top_p 0: greedy


def _seeded(sampler: Sampler, seed: int | None) -> Sampler:
    """Return a sampler whose random numbers do not depend on other answers."""
    if seed is None:
        return sampler
    seeds = random.Random(seed)

    def sample(logprobs: mx.array) -> mx.array:
        mx.random.seed(seeds.getrandbits(64))
        token = sampler(logprobs)
        mx.random.seed(random.getrandbits(64))  # for the other answers
        return token

    return sample
