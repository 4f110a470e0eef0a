"""Compute the answers to many requests in one thread, the one in which mlx computes.

Other threads put in jobs and get tokens through a function of theirs. Answers are computed in one
batch (mlx-lm's BatchGenerator), or one by one (stream_generate) where there is a draft model or a
KV cache that mlx-lm does not batch. With several ranks all take the same turns: rank 0 tells the
others which jobs come and which leave.
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
from splitquant_mlx.inference.protocol import failure
from splitquant_mlx.inference.settings import ServeSettings
from splitquant_mlx.runtime.ranks import Group, alone, gather, led

IDLE_S = 0.1  # to wait for a job, while there is none
RANK_STEPS = 8  # between two messages among the ranks
SCORED_TOKENS = 256  # of a prompt, whose logits are in memory together
NO_TOKEN = -1  # where only the prompt was asked for
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
        sampling: temp, top_p, top_k and min_p of mlx-lm's make_sampler.
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


@dataclass(eq=False, kw_only=True)
class Job:
    """A plan under way."""

    plan: Plan
    cached: int = field(default=0, init=False)  # tokens of the prompt
    cancelled: bool = field(default=False, init=False)

    def emit(self, event: Any) -> None:
        """Take what the engine tells: on other ranks than 0 nobody listens.

        Args:
            event: a list of Scored for the prompt, if asked for; Scored for each token of the
                answer, the last one with a finish; or an Exception.
        """


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
        self._open: set[Job] = set()  # not answered to the end
        self._closed: Exception | None = None
        single = draft_model is not None or settings.kv_bits is not None
        self._single = single or not all(hasattr(layer, "merge") for layer in cache)
        self._reset()

    def submit(self, job: Job) -> None:
        """Have a job computed; callable from any thread."""
        self._open.add(job)
        self._inbox.put(job)
        if self._closed is not None:
            self.close(self._closed)

    def close(self, exc: Exception) -> None:
        """End all jobs with an error, those still to come as well; callable from any thread."""
        self._closed = exc
        self._end_jobs(exc)

    def run(self) -> None:
        """Compute until `stopping`. What goes wrong ends the answers under way, not the engine."""
        while True:
            try:
                if not self._turn():
                    return
            except Exception:
                # other ranks are in the middle of it, or it was no job that did this
                if not alone(self.group) or not self._open:
                    raise
                logging.exception("the answers under way failed")
                self._end_jobs(failure())
                self._reset()

    def _end_jobs(self, exc: Exception) -> None:
        with suppress(KeyError):  # there is none left
            while True:
                self._open.pop().emit(exc)

    def _reset(self) -> None:
        size, most = self.settings.prompt_cache_size, self.settings.prompt_cache_bytes
        self._prompts = LRUPromptCache(size, most or 2**63)
        self._jobs: dict[int, Job] = {}  # by what the runner calls them
        self._generator: Any = OneByOne(self) if self._single else self._batch()

    def _batch(self) -> BatchGenerator:
        return BatchGenerator(
            self.model,
            stop_tokens=[[token] for token in self.tokenizer.eos_token_ids],
            completion_batch_size=self.settings.decode_concurrency,
            prefill_batch_size=self.settings.prompt_concurrency,
            prefill_step_size=self.settings.prefill_step_size,
            # that of the ranks' messages: all of them see one order
            stream=mx.default_stream(mx.default_device()),
        )

    def _turn(self) -> bool:
        """Begin what has come, end what has left, compute a token; return False to stop."""
        arrived = self._arrived()
        left = [uid for uid, job in self._jobs.items() if job.cancelled]
        news = [asdict(job.plan) for job in arrived], left, self.stopping
        plans, left, stop = gather(self.group, news)[0]
        caches = self._generator.remove(left, return_prompt_caches=True) if left else {}
        for uid in left:
            self._finish(uid, *caches.get(uid, (None, None)))
        for job in arrived or [Job(plan=Plan(**plan)) for plan in plans]:
            self._begin(job)
        for _ in range(1 if alone(self.group) else RANK_STEPS):
            for r in self._generator.next()[1] if self._jobs else []:
                job = self._jobs[r.uid]
                job.emit(_scored(r.token, r.logprobs, job.plan.top, r.finish_reason))
                if r.finish_reason:
                    self._finish(r.uid, r.prompt_cache, r.all_tokens)
        return not stop

    def _arrived(self) -> list[Job]:
        """Return the new jobs of rank 0, after a wait where there is nothing else to do."""
        arrived: list[Job] = []
        with suppress(queue.Empty):
            if not self._jobs and self.group.rank() == 0:
                arrived.append(self._inbox.get(timeout=IDLE_S))
            while True:
                arrived.append(self._inbox.get_nowait())
        return [job for job in arrived if job in self._open]

    def _begin(self, job: Job) -> None:
        plan = job.plan
        if plan.score_prompt:
            job.emit(self._score(plan))
        if plan.max_tokens == 0:
            self._open.discard(job)
            return job.emit(Scored(NO_TOKEN, finish="length"))
        cache, rest = None, plan.prompt[:-1]
        if rest:  # without the last token: the logits after it are in no cache
            cache, rest = self._prompts.fetch_nearest_cache(MODEL, rest)
        job.cached = len(plan.prompt) - 1 - len(rest)
        sampler = led(self.group, _seeded(_sampler(**plan.sampling), plan.seed))
        bias = {int(token): value for token, value in plan.penalties["logit_bias"].items()}
        processors = make_logits_processors(**{**plan.penalties, "logit_bias": bias})
        if plan.grammar is not None:
            processors.append(self.grammars.processor(plan.grammar))
        # mlx-lm 0.31 gives one answer's processors to another where some have none
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


class OneByOne:
    """Compute one answer after the other, by the methods of mlx-lm's BatchGenerator."""

    def __init__(self, engine: Engine) -> None:
        self._uids, self._waiting = count(), {}
        self._models = [m for m in (engine.model, engine.draft_model) if m is not None]
        names = "num_draft_tokens prefill_step_size kv_bits kv_group_size quantized_kv_start"
        options = {name: getattr(engine.settings, name) for name in names.split()}
        options["draft_model"] = engine.draft_model
        self._generate = partial(stream_generate, engine.model, engine.tokenizer, **options)

    def insert(self, prompts: list[Any], max_tokens: list[int], **lists: list[Any]) -> list[int]:
        """Put in one answer, all about it in lists of one; return its id, in a list."""
        one, uid = {name: value for name, (value,) in lists.items()}, next(self._uids)
        models = self._models
        cache = one["caches"] or [layer for model in models for layer in make_prompt_cache(model)]
        responses = self._generate(
            prompts[0],
            max_tokens=max_tokens[0],
            sampler=one["samplers"],
            logits_processors=one["logits_processors"],
            prompt_cache=cache,
        )
        # two models' caches do not hold the same tokens: they are not kept
        kept = cache if len(models) == 1 else None
        self._waiting[uid] = responses, kept, one["all_tokens"] + prompts[0]
        return [uid]

    def next(self) -> tuple[list[Any], list[Any]]:
        """Return nothing on prompts, and the next token of the first answer."""
        for uid, (responses, cache, tokens) in self._waiting.items():
            r = next(responses)
            tokens.append(r.token)
            if r.finish_reason:
                self.remove([uid])
            computed = {"uid": uid, "prompt_cache": cache, "all_tokens": tokens}
            return [], [SimpleNamespace(**vars(r), **computed)]
        return [], []

    def remove(self, uids: list[int], **options: Any) -> dict[int, Any]:
        """Break off answers, whose KV caches are not kept."""
        for uid in uids:
            self._waiting.pop(uid)[0].close()
        return {}


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
    order: Any = mx.argsort(-logprobs, axis=-1)[:, :top]
    chosen: Any = mx.take_along_axis(logprobs, mx.array(tokens)[:, None], axis=-1)[:, 0]
    likeliest: Any = mx.take_along_axis(logprobs, order, axis=-1)
    rows: Any = zip(chosen.tolist(), order.tolist(), likeliest.tolist(), strict=True)
    rows = [(logprob, tuple(zip(*best, strict=True))) for logprob, *best in rows]
    return [Scored(token, *row) for token, row in zip(tokens, rows, strict=True)]


@lru_cache(maxsize=64)
def _sampler(temp: float, top_p: float, **rest: Any) -> Sampler:
    """Return one sampler for all requests with these settings: a batch then samples at once."""
    return make_sampler(temp if top_p else 0.0, top_p, **rest)  # top_p 0: the likeliest token


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
