"""Compute the answers to many requests in one thread, the one in which mlx computes.

Other threads put in jobs and get tokens through a function of theirs. Answers are computed in one
batch (mlx-lm's BatchGenerator), or one by one (stream_generate) where there is a draft model or a
KV cache that mlx-lm does not batch. With several ranks all take the same turns: rank 0 tells the
others which jobs come and which leave.
"""

import logging
import queue
import random
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np
from mlx_lm.generate import BatchGenerator, stream_generate
from mlx_lm.models.cache import LRUPromptCache, make_prompt_cache
from mlx_lm.sample_utils import make_logits_processors, make_sampler

from splitquant_mlx.errors import RecipeError, one_line
from splitquant_mlx.inference.grammar import Grammars
from splitquant_mlx.inference.protocol import failure
from splitquant_mlx.inference.settings import ServeSettings
from splitquant_mlx.runtime.ranks import Group, alone, gather, led

IDLE_S = 0.1  # to wait for a job, while there is none
RANK_STEPS = 8  # between two messages among the ranks
SCORED_TOKENS = 256  # of a prompt, whose logits are in memory together
MODEL = "model"  # key of the prompt cache, which could hold several models' caches
Sampler = Callable[[mx.array], mx.array]


class Scored(NamedTuple):
    """A token, its log-probability (nats), the likeliest tokens, and why it is the last one."""

    token: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()
    finish: str | None = None


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What to compute for one answer; all of it goes through JSON to the other ranks.

    Args:
        prompt: token ids, at least one.
        max_tokens: of the answer; 0 only scores the prompt.
        sampling: arguments of mlx-lm's make_sampler.
        penalties: arguments of mlx-lm's make_logits_processors.
        seed: of this answer's random numbers.
        top: number of likeliest tokens to tell at each; None tells no log-probabilities.
        score_prompt: whether to tell them for the prompt, too, before the answer.
        grammar: of llguidance, which the answer must follow.
    """

    prompt: list[int]
    max_tokens: int
    sampling: dict[str, Any] = field(default_factory=dict)
    penalties: dict[str, Any] = field(default_factory=dict)
    seed: int | None = None
    top: int | None = None
    score_prompt: bool = False
    grammar: str | None = None


@dataclass(eq=False)
class Job:
    """A plan under way: `emit` gets lists of Scored, an Exception, or None at the end."""

    plan: Plan
    emit: Callable[[Any], None] = lambda event: None
    cached: int = 0
    cancelled: bool = False


class Engine:
    """Compute jobs until `stopping`.

    Args:
        model: that computes logits.
        tokenizer: mlx-lm's TokenizerWrapper.
        settings: of the server.
        group: of ranks, all of which run an engine.
        draft_model: for speculative decoding.
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
        self._inbox: queue.SimpleQueue[Job] = queue.SimpleQueue()
        self._unanswered: dict[int, Job] = {}  # by id: in the inbox, being begun, or under way
        self._closed: Exception | None = None
        batchable = all(hasattr(layer, "merge") for layer in cache)
        single = draft_model is not None or settings.kv_bits is not None or not batchable
        self._runner_class = _OneByOne if single else _Batch
        self._reset()

    def submit(self, job: Job) -> None:
        """Have a job computed; callable from any thread."""
        self._unanswered[id(job)] = job
        self._inbox.put(job)
        if self._closed is not None:
            self.end_jobs(self._closed)

    def run(self) -> None:
        """Compute until `stopping`. What goes wrong ends the answers under way, not the engine."""
        while True:
            try:
                if not self._turn():
                    return
            except Exception:
                # other ranks are in the middle of it, or it was no job that did this
                if not alone(self.group) or not self._unanswered:
                    raise
                logging.exception("the answers under way failed")
                self.end_jobs(failure())
                self._reset()

    def close(self, exc: Exception) -> None:
        """End all jobs with an error, those still to come as well; callable from any thread."""
        self._closed = exc
        self.end_jobs(exc)

    def end_jobs(self, exc: Exception) -> None:
        """End all jobs with an error."""
        with suppress(queue.Empty):
            while True:
                self._inbox.get_nowait()
        with suppress(KeyError):  # there is none left
            while True:
                self._unanswered.popitem()[1].emit(exc)

    def _reset(self) -> None:
        size, most = self.settings.prompt_cache_size, self.settings.prompt_cache_bytes
        self._prompts = LRUPromptCache(size, most or 2**63)
        self._jobs: dict[int, Job] = {}  # by what the runner calls them
        self._runner = self._runner_class(self)

    def _turn(self) -> bool:
        arrived, several = self._arrived(), not alone(self.group)
        news = {
            "plans": [asdict(job.plan) for job in arrived] if several else [],
            "left": [name for name, job in self._jobs.items() if job.cancelled],
            "stop": self.stopping,
        }
        news = gather(self.group, news)[0]
        for name in news["left"]:
            self._finish(name, self._runner.remove(name))
        for job in arrived or [Job(Plan(**plan)) for plan in news["plans"]]:
            self._begin(job)
        for _ in range(RANK_STEPS if several else 1):
            for name, scored, computed in self._runner.step():
                self._jobs[name].emit([scored])
                if scored.finish:
                    self._finish(name, computed)
        return not news["stop"]

    def _arrived(self) -> list[Job]:
        """Return the new jobs of rank 0, after a wait where there is nothing else to do."""
        arrived: list[Job] = []
        try:
            if not self._jobs and self.group.rank() == 0:
                arrived.append(self._inbox.get(timeout=IDLE_S))
            while True:
                arrived.append(self._inbox.get_nowait())
        except queue.Empty:
            return arrived

    def _begin(self, job: Job) -> None:
        plan = job.plan
        if plan.score_prompt:
            job.emit(self._score(plan))
        if plan.max_tokens == 0:
            return self._end(job)
        cache, rest = None, plan.prompt[:-1]
        if rest:  # without the last token: the logits after it are in no cache
            cache, rest = self._prompts.fetch_nearest_cache(MODEL, rest)
        job.cached = len(plan.prompt) - 1 - len(rest)
        sampler = led(self.group, _seeded(_sampler(**plan.sampling), plan.seed))
        bias = {int(token): value for token, value in plan.penalties["logit_bias"].items()}
        processors = make_logits_processors(**{**plan.penalties, "logit_bias": bias})
        if plan.grammar is not None:
            processors.append(self.grammars.processor(plan.grammar))
        self._jobs[self._runner.add(job, cache, sampler, processors)] = job

    def _finish(self, name: int, computed: tuple[list[int], Any] | None) -> None:
        if computed is not None:
            self._prompts.insert_cache(MODEL, *computed)
        self._end(self._jobs.pop(name))

    def _end(self, job: Job) -> None:
        self._unanswered.pop(id(job), None)
        job.emit(None)

    def _score(self, plan: Plan) -> list[Scored]:
        """Return the prompt's tokens with their log-probabilities, the first without."""
        cache, scored = make_prompt_cache(self.model), [Scored(plan.prompt[0])]
        inputs, targets = plan.prompt[:-1], plan.prompt[1:]
        for at in range(0, len(inputs), SCORED_TOKENS):
            part = slice(at, at + SCORED_TOKENS)
            logits = self.model(mx.array([inputs[part]]), cache=cache)[0].astype(mx.float32)
            logprobs = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
            scored += _score(logprobs, targets[part], plan.top or 0)
        return scored


class _Batch:
    """Compute all answers in one batch."""

    def __init__(self, engine: Engine) -> None:
        settings, self._tops = engine.settings, {}
        self._generator = BatchGenerator(
            engine.model,
            stop_tokens=[[token] for token in engine.tokenizer.eos_token_ids],
            completion_batch_size=settings.decode_concurrency,
            prefill_batch_size=settings.prompt_concurrency,
            prefill_step_size=settings.prefill_step_size,
            # that of the ranks' messages: all of them see one order
            stream=mx.default_stream(mx.default_device()),
        )

    def add(self, job: Job, cache: Any, sampler: Sampler, processors: list[Any]) -> int:
        plan = job.plan
        (name,) = self._generator.insert(
            [plan.prompt[job.cached :]],
            [plan.max_tokens],
            caches=[cache],
            all_tokens=[plan.prompt[: job.cached]],
            samplers=[sampler],
            logits_processors=[processors],
        )
        self._tops[name] = plan.top
        return name

    def step(self) -> Iterator[tuple[int, Scored, Any]]:
        for r in self._generator.next()[1] if self._tops else []:
            scored = _scored(r.token, r.logprobs, self._tops[r.uid], r.finish_reason)
            if r.finish_reason:
                del self._tops[r.uid]
            yield r.uid, scored, (r.all_tokens, r.prompt_cache)

    def remove(self, name: int) -> tuple[list[int], Any] | None:
        del self._tops[name]
        cache, tokens = self._generator.remove([name], return_prompt_caches=True)[name]
        return (list(tokens), cache) if cache and tokens else None


class _OneByOne:
    """Compute one answer after the other."""

    def __init__(self, engine: Engine) -> None:
        self._engine, self._count = engine, 0
        self._waiting: dict[int, tuple[Job, Any, Sampler, list[Any]]] = {}
        self._responses: Any = None

    def add(self, job: Job, cache: Any, sampler: Sampler, processors: list[Any]) -> int:
        self._count += 1
        self._waiting[self._count] = job, cache, sampler, processors
        return self._count

    def step(self) -> Iterator[tuple[int, Scored, Any]]:
        for name, waiting in list(self._waiting.items())[:1]:
            if self._responses is None:
                self._responses = self._start(*waiting)
            r = next(self._responses)
            self._tokens.append(r.token)
            computed = self.remove(name) if r.finish_reason else None
            yield name, _scored(r.token, r.logprobs, waiting[0].plan.top, r.finish_reason), computed

    def _start(self, job: Job, cache: Any, sampler: Sampler, processors: list[Any]) -> Any:
        engine, settings, plan = self._engine, self._engine.settings, job.plan
        models = [m for m in (engine.model, engine.draft_model) if m is not None]
        self._tokens: list[int] = list(plan.prompt)
        self._cache = cache or [layer for model in models for layer in make_prompt_cache(model)]
        return stream_generate(
            engine.model,
            engine.tokenizer,
            plan.prompt[job.cached :],
            max_tokens=plan.max_tokens,
            draft_model=engine.draft_model,
            num_draft_tokens=settings.num_draft_tokens,
            sampler=sampler,
            logits_processors=processors,
            prompt_cache=self._cache,
            prefill_step_size=settings.prefill_step_size,
            kv_bits=settings.kv_bits,
            kv_group_size=settings.kv_group_size,
            quantized_kv_start=settings.quantized_kv_start,
        )

    def remove(self, name: int) -> tuple[list[int], Any] | None:
        current = name == next(iter(self._waiting))
        del self._waiting[name]
        if not current or self._responses is None:
            return None
        self._responses.close()
        self._responses = None
        # two models' caches do not hold the same tokens: they are not kept
        return None if self._engine.draft_model is not None else (self._tokens, self._cache)


def _check_kv_bits(cache: list[Any], settings: ServeSettings) -> None:
    try:
        for layer in cache:
            layer.to_quantized(group_size=settings.kv_group_size, bits=settings.kv_bits)
    except (ValueError, NotImplementedError, AttributeError) as exc:
        message = f"--kv-bits, --kv-group-size: not for this model: {one_line(exc)}"
        raise RecipeError(message) from exc


def _scored(token: int, logprobs: mx.array, top: int | None, finish: str | None) -> Scored:
    """Return a token, with log-probabilities where `top` asks for them."""
    scored = Scored(token) if top is None else _score(logprobs[None], [token], top)[0]
    return scored._replace(finish=finish)


def _score(logprobs: mx.array, tokens: list[int], top: int) -> list[Scored]:
    """Return each token with its log-probability and the `top` likeliest; logprobs (n, vocab)."""
    logprobs = mx.maximum(logprobs.astype(mx.float32), -9999.0)  # JSON has no infinity
    chosen = mx.take_along_axis(logprobs, mx.array(tokens)[:, None], axis=-1)
    order = mx.argsort(-logprobs, axis=-1)[:, :top]
    best, values = np.array(order), np.array(mx.take_along_axis(logprobs, order, axis=-1))
    rows = zip(best.tolist(), values.tolist(), strict=True)
    tops = [tuple(zip(*row, strict=True)) for row in rows]
    logprob = np.array(chosen)[:, 0].tolist()
    return [Scored(*scored) for scored in zip(tokens, logprob, tops, strict=True)]


@lru_cache(maxsize=64)
def _shared_sampler(**settings: Any) -> Sampler:
    """Return one sampler for all requests with these settings: a batch then samples at once."""
    return make_sampler(**settings)


def _sampler(special: list[int], **settings: Any) -> Sampler:
    """Return mlx-lm's sampler; a top_p of 0 takes the likeliest token, as a temperature of 0."""
    if settings["temp"] == 0 or settings["top_p"] == 0:
        return _shared_sampler(temp=0.0)
    if settings["xtc_probability"]:
        return make_sampler(xtc_special_tokens=special, **settings)
    return _shared_sampler(**settings)


def _seeded(sampler: Sampler, seed: int | None) -> Sampler:
    """Give a sampler random numbers that depend on nothing else that is sampled."""
    if seed is None:
        return sampler
    own = random.Random(seed)

    def sample(logprobs: mx.array) -> mx.array:
        mx.random.seed(own.getrandbits(64))
        token = sampler(logprobs)
        mx.random.seed(random.getrandbits(64))  # for the others
        return token

    return sample
