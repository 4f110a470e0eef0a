"""From a checked request to its answer: prompts to tokens, tokens to text."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import suppress
from typing import Any, NamedTuple

from splitquant_mlx.errors import one_line
from splitquant_mlx.inference.engine import Engine, Job, Plan, Scored
from splitquant_mlx.inference.protocol import (
    ChatRequest,
    CompletionRequest,
    Refusal,
    Request,
    refuse,
)
from splitquant_mlx.inference.stops import NORMAL, REASONING, Piece, Reader, marks_of
from splitquant_mlx.inference.token_text import Placed, Texts

RESERVED = {"tokenize", "add_generation_prompt", "tools", "return_dict", "chat_template"}
KEEPALIVE_S = 10.0


class Planned(NamedTuple):
    """An answer to compute: how to read it, what it goes on from, and the text to repeat first."""

    plan: Plan
    reader: Reader
    before: list[int] = []  # noqa: RUF012  a token, or the answer would lose its first space
    echo: str | None = None


class Step(NamedTuple):
    """What one event of the engine adds to an answer."""

    pieces: list[Piece]
    tokens: list[Placed]
    finish: str | None


class Answer:
    """One answer under way.

    Args:
        engine: computes it.
        planned: what is computed.
    """

    def __init__(self, engine: Engine, planned: Planned) -> None:
        self.plan, self._reader, before, self.echo = planned
        self.completion_tokens = self._length = 0
        self._detokenizer = engine.tokenizer.detokenizer
        for token in before:
            self._detokenizer.add_token(token)
            self._detokenizer.last_segment  # noqa: B018  reading takes it away
        self._events: asyncio.Queue[Any] = asyncio.Queue()
        loop = asyncio.get_running_loop()

        def emit(event: Any) -> None:
            with suppress(RuntimeError):  # the loop is closed: nobody is there to hear
                loop.call_soon_threadsafe(self._events.put_nowait, event)

        self.job = Job(self.plan, emit)
        engine.submit(self.job)

    async def event(self) -> Any:
        """Return the next event of the engine, or raise it."""
        event = await self._events.get()
        if isinstance(event, Exception):
            raise event
        return event

    async def steps(self) -> AsyncIterator[Step | None]:
        """Yield what comes, to the end; None where nothing came for `KEEPALIVE_S`."""
        finish = None
        while finish is None:
            try:
                step = self._take(await asyncio.wait_for(self.event(), KEEPALIVE_S))
            except asyncio.TimeoutError:
                yield None
                continue
            yield step
            finish = step.finish
        self.job.cancelled = True

    def _take(self, event: list[Scored] | None) -> Step:
        if event is None:  # only the prompt was asked for
            return Step([], [], "length")
        (scored,) = event
        self.completion_tokens += 1
        tokens = [(scored, self._length)]
        if scored.finish == "stop":  # the token of the end has no text
            tokens = []
        else:
            self._detokenizer.add_token(scored.token)
        if scored.finish:
            self._detokenizer.finalize()
        text = self._detokenizer.last_segment
        self._length += len(text)
        pieces = self._reader.feed(text, last=scored.finish is not None)
        if not self._reader.stopped:
            return Step(pieces, tokens, scored.finish)
        return Step(pieces, [t for t in tokens if t[1] < self._reader.position], "stop")


class Service:
    """Plans the answers of one model.

    Args:
        engine: computes them.
        names: of the model; the first is the one to show.
        context: tokens of a prompt and its answer.
    """

    def __init__(self, engine: Engine, names: Sequence[str], context: int) -> None:
        self.engine, self.names, self.context = engine, names, context
        self.tokenizer, self.settings = engine.tokenizer, engine.settings
        self.texts = Texts(self.tokenizer)
        self._special = [*self._encode("\n"), *sorted(self.tokenizer.eos_token_ids)]

    def check_model(self, name: str | None) -> None:
        """Raise Refusal (404) for another model than the one served."""
        if name is None or name.rstrip("/").removeprefix("./") in self.names:
            return
        message = (
            f"the model {name!r:.80} is not served here: ask for {self.names[0]!r}, or name it so "
            "with --served-model-name where the server is started"
        )
        raise Refusal(404, message, param="model", code="model_not_found")

    def chat(self, request: ChatRequest) -> Planned:
        """Return the answer to compute for a chat completion. Raises Refusal."""
        schema, tokenizer, grammar = request.schema(), self.tokenizer, None
        offered = bool(request.tools) and request.tool_choice != "none"
        if offered and not request.forced_tools() and not tokenizer.has_tool_calling:
            message = "tools: this model's chat template has none: leave them out, or require one"
            raise Refusal(400, message, param="tools")
        if schema is not None and self.engine.draft_model is not None:
            raise Refusal(400, "JSON and forced tools: not with a draft model")
        if schema is not None:
            grammar = self.engine.grammars.of_schema(schema)
        text = self._render(request, offered, thinking=grammar is None)
        top = request.top_logprobs if request.logprobs else None
        most = request.max_completion_tokens
        most = request.max_tokens if most is None else most
        prompt = self._encode(text, special=not tokenizer.has_chat_template)
        plan = self._plan(request, prompt, most, top=top, grammar=grammar)
        if plan.max_tokens == 0:
            refuse("max_tokens", "1 or more", 0)
        if grammar is not None:
            return Planned(plan, Reader(request.stop, {}))
        state = getattr(tokenizer, "response_initial_state", None) or NORMAL
        begin, end = tokenizer.think_start, tokenizer.think_end
        if begin and text.rfind(begin) > text.rfind(end):
            state = REASONING
        return Planned(plan, Reader(request.stop, marks_of(tokenizer, tools=offered), state))

    def completions(self, request: CompletionRequest) -> list[Planned]:
        """Return the answers to compute, one per prompt. Raises Refusal."""
        given, planned = request.prompt, []
        if not given or isinstance(given, str) or isinstance(given[0], int):
            given = [given]  # type: ignore[assignment]
        for prompt in given:
            tokens = self._encode(prompt) if isinstance(prompt, str) else list(prompt)  # type: ignore[arg-type]
            if any(not 0 <= token < self.engine.vocab_size for token in tokens):
                refuse("prompt", f"token ids below {self.engine.vocab_size}", prompt)
            score = request.echo and request.logprobs is not None
            top, most = request.logprobs, request.max_tokens
            plan = self._plan(request, tokens, most, top=top, score_prompt=score)
            if plan.max_tokens == 0 and not request.echo:
                refuse("max_tokens", "1 or more without echo", 0)
            echo = self.tokenizer.decode(tokens, skip_special_tokens=True) if request.echo else None
            before = self._encode("a", special=False)[-1:]
            planned.append(Planned(plan, Reader(request.stop, {}), before, echo))
        return planned

    def _plan(self, request: Request, prompt: list[int], most: int | None, **rest: Any) -> Plan:
        settings, count, vocab_size = self.settings, len(prompt), self.engine.vocab_size
        limit = min(settings.max_prompt_tokens or self.context, self.context - (most != 0))
        if not 0 < count <= limit:
            message = f"the prompt has {count} tokens, expected 1 to {limit}"
            raise Refusal(400, message, code="context_length_exceeded" if count else None)
        if any(int(token) >= vocab_size for token in request.logit_bias):
            refuse("logit_bias", f"token ids below {vocab_size}", request.logit_bias)
        left = min(settings.max_tokens_limit, self.context - count)
        most = settings.max_tokens if most is None else most
        fields = request.model_dump(exclude_none=True)
        sampling = {name: getattr(settings, name) for name in ("top_p", "top_k", "min_p")}
        sampling |= {name: fields[name] for name in sampling if name in fields}
        sampling |= {name: fields[name] for name in ("xtc_probability", "xtc_threshold")}
        sampling["temp"] = fields.get("temperature", settings.temp)
        sampling["top_k"] = sampling["top_k"] if 0 < sampling["top_k"] < vocab_size else 0
        sampling["special"] = self._special
        return Plan(
            prompt=prompt,
            max_tokens=left if most in (None, -1) else min(most, left),
            sampling=sampling,
            penalties={
                name: value
                for name, value in fields.items()
                if name.endswith(("_penalty", "_context_size", "logit_bias"))
            },
            seed=request.seed,
            **rest,
        )

    def _render(self, request: ChatRequest, offered: bool, *, thinking: bool) -> str:
        messages = request.conversation()
        if not self.tokenizer.has_chat_template:
            return "\n".join(message["content"] for message in messages)
        variables = {**self.settings.template_variables(), **request.chat_template_kwargs}
        if wrong := RESERVED & set(variables):
            refuse("chat_template_kwargs", "variables of the chat template", sorted(wrong))
        if request.reasoning_effort is not None:
            variables["reasoning_effort"] = request.reasoning_effort
        if not thinking:
            variables["enable_thinking"] = False
        if offered:
            variables["tools"] = [tool.model_dump(exclude_none=True) for tool in request.tools]
        try:
            return self.tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=True, **variables
            )
        except Exception as exc:  # a template raises what it likes
            message = f"the chat template refuses these messages: {one_line(exc)}"
            raise Refusal(400, message, param="messages") from exc

    def _encode(self, text: str, *, special: bool = True) -> list[int]:
        return list(self.tokenizer.encode(text, add_special_tokens=special))
