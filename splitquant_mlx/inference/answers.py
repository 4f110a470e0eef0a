"""Turn validated requests into plans for the engine, and the engine's tokens into text."""

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from dataclasses import dataclass
from inspect import signature
from typing import Any, NamedTuple
from uuid import uuid4

from mlx_lm.sample_utils import make_logits_processors

from splitquant_mlx.errors import CheckpointError
from splitquant_mlx.inference import protocol
from splitquant_mlx.inference.engine import NO_TOKEN, AnswerJob, AnswerPlan, Engine, ScoredToken
from splitquant_mlx.inference.protocol import APIError, reject
from splitquant_mlx.inference.stops import (
    NORMAL,
    REASONING,
    TOOL,
    Piece,
    StreamParser,
    marker_transitions,
)
from splitquant_mlx.inference.token_text import OffsetToken, TokenTexts
from splitquant_mlx.models.chat_template import render

BEGIN, END = "begin", "end"  # kinds of parts, besides NORMAL, REASONING and TOOL
KEEPALIVE_S = 5.0
SAMPLING = {"temp", "top_p", "top_k", "min_p"}
PENALTIES = set(signature(make_logits_processors).parameters)
RESERVED = {"tokenize", "add_generation_prompt", "tools", "return_dict", "chat_template"}


class Part(NamedTuple):
    """A part of an answer; one without text is a keep-alive."""

    kind: str
    text: str = ""  # for BEGIN, the prompt if `echo` is set
    tokens: tuple[OffsetToken, ...] = ()  # tokens since the last part
    calls: tuple[dict[str, Any], ...] = ()  # for TOOL, `tool_calls` of OpenAI's API
    finish: str | None = None  # for END, the finish reason


@dataclass(eq=False, kw_only=True)
class Answer(AnswerJob):
    """An answer in progress: a job whose tokens become parts of text.

    Args:
        plan: the plan for the engine.
        parser: splits the text.
        detokenizer: mlx-lm's detokenizer, after the token before the answer.
        token_texts: texts of the tokens.
        parse_call: returns the tool calls in a text, or raises an exception.
        parallel: whether to continue after the first tool call.
        echo: text to repeat before the answer.
    """

    parser: StreamParser
    detokenizer: Any
    token_texts: TokenTexts
    parse_call: Callable[[str], Any] = json.loads
    parallel: bool = True
    echo: str = ""

    def __post_init__(self) -> None:
        self.completion_tokens = self._calls = 0
        self.parser.position = len(self.echo)
        self._pending: list[OffsetToken] = []  # tokens since the last part
        self._events: asyncio.Queue[Any] = asyncio.Queue()

    def start(self, engine: Engine) -> None:
        """Submit the answer to the engine."""
        self._loop = asyncio.get_running_loop()
        engine.submit(self)

    def emit(self, event: Any) -> None:
        """Pass an event from the engine's thread to the event loop."""
        with suppress(RuntimeError):  # the loop is closed
            self._loop.call_soon_threadsafe(self._events.put_nowait, event)

    async def parts(self) -> AsyncIterator[Part]:
        """Yield the parts of the answer. Raises the engine's exception if it ends the answer."""
        scored = await self._event() if self.plan.score_prompt else []
        yield Part(BEGIN, self.echo, tuple(self.token_texts.add_offsets(scored, self.echo)))
        finish = None
        while finish is None:
            try:
                pieces, finish = self._add(await asyncio.wait_for(self._event(), KEEPALIVE_S))
            except asyncio.TimeoutError:
                pieces = [(NORMAL, "")]
            for kind, text in pieces:
                calls = self._parse_calls(text) if kind == TOOL else ()
                kind = NORMAL if kind == TOOL and not calls else kind  # not a valid call
                yield Part(kind, "" if calls else text, self._pop_pending(), calls)
            if self._calls and not self.parallel:
                finish = "stop"
        self.cancelled = True
        finish = "tool_calls" if self._calls and finish == "stop" else finish
        yield Part(END, tokens=self._pop_pending(), finish=finish)

    async def _event(self) -> Any:
        event = await self._events.get()
        if isinstance(event, Exception):
            raise event
        return event

    def _add(self, scored: ScoredToken) -> tuple[list[Piece], str | None]:
        """Add a token; return the new pieces of text and the finish reason."""
        token, _, _, finish = scored
        if token == NO_TOKEN:
            return [], finish
        self.completion_tokens += 1
        if finish != "stop":  # the end-of-text token has no text
            self._pending.append((scored, self.parser.position))
            self.detokenizer.add_token(token)
        if finish:
            self.detokenizer.finalize()
        text = self.detokenizer.last_segment
        pieces = self.parser.feed(text, last=finish is not None)
        if not self.parser.stopped:
            return pieces, finish
        self._pending = [t for t in self._pending if t[1] < self.parser.position]
        return pieces, "stop"

    def _parse_calls(self, text: str) -> tuple[dict[str, Any], ...]:
        """Return the tool calls in a text; empty if it is not valid."""
        calls = []
        try:
            parsed = self.parse_call(text)
            for call in parsed if isinstance(parsed, list) else [parsed]:
                arguments = call.get("arguments") or {}
                if not isinstance(arguments, str):
                    arguments = json.dumps(arguments, ensure_ascii=False)
                calls.append(
                    {
                        "index": self._calls + len(calls),
                        "id": f"call_{uuid4().hex[:24]}",
                        "type": "function",
                        "function": {"name": str(call["name"]), "arguments": arguments},
                    }
                )
        except Exception:  # parsers can raise anything, mostly on a truncated call
            return ()
        calls = calls if self.parallel else calls[:1]
        self._calls += len(calls)
        return tuple(calls)

    def _pop_pending(self) -> tuple[OffsetToken, ...]:
        pending, self._pending = tuple(self._pending), []
        return pending


class Service:
    """Planner of the answers of one model.

    Args:
        engine: generates the answers.
        names: names of the model; responses contain the first.
        context: maximum number of tokens of a prompt and its answer together.
    """

    def __init__(self, engine: Engine, names: list[str], context: int) -> None:
        self.engine, self.names, self.context = engine, names, context
        self.settings, self.tokenizer = engine.settings, engine.tokenizer
        self.token_texts = TokenTexts(self.tokenizer)

    def check_model(self, name: str | None) -> None:
        """Raise APIError (404) if `name` is not a name of the served model."""
        if name is None or name.rstrip("/").removeprefix("./") in self.names:
            return
        message = (
            f"model: expected {self.names[0]!r}, got {name!r:.80}: change the request, or add the "
            "name with --served-model-name when starting the server"
        )
        raise APIError(404, message, param="model", code="model_not_found")

    def chat(self, request: protocol.ChatRequest) -> Answer:
        """Plan the answer to a chat completion. Raises APIError."""
        tokenizer, schema, grammar = self.tokenizer, request.schema(), None
        forced, tools = request.forced_tools(), request.offered_tools()
        if tools and not forced and not tokenizer.has_tool_calling:
            message = "tools: unsupported by this model's chat template: omit them, or force a call"
            raise APIError(400, message, param="tools")
        if schema is not None:
            if self.engine.draft_model is not None:
                raise APIError(400, "JSON and forced tools: unsupported with a draft model")
            grammar = self.engine.grammars.from_schema(schema)
        text = self._render(request, tools, thinking=grammar is None)
        prompt = self._encode(text, special=not tokenizer.has_chat_template)
        top = request.top_logprobs if request.logprobs else None
        if grammar is not None:
            states, state = {}, TOOL if forced else NORMAL
        else:
            states = marker_transitions(tokenizer, tools=bool(tools))
            think_start, think_end = tokenizer.think_start or "\0", tokenizer.think_end or "\0"
            state = getattr(tokenizer, "response_initial_state", None) or NORMAL
            state = REASONING if text.rfind(think_start) > text.rfind(think_end) else state

        return Answer(
            plan=self._plan(request, prompt, top=top, grammar=grammar),
            parser=StreamParser(request.stop, states, state),
            detokenizer=tokenizer.detokenizer,
            token_texts=self.token_texts,
            parse_call=json.loads if forced else lambda call: tokenizer.tool_parser(call, tools),
            parallel=request.parallel_tool_calls,
        )

    def completions(self, request: protocol.CompletionRequest) -> list[Answer]:
        """Plan the answers to a completion, one per prompt. Raises APIError."""
        answers, vocab_size, echo = [], self.engine.vocab_size, request.echo
        for item in request.prompt:
            prompt = self._encode(item) if isinstance(item, str) else item
            if any(not 0 <= token < vocab_size for token in prompt):
                reject("prompt", f"expected token ids below {vocab_size}", prompt)
            score = echo and request.logprobs is not None
            detokenizer = self.tokenizer.detokenizer
            # a detokenizer drops the space before its first token
            for token in self._encode("a", special=False)[-1:]:
                detokenizer.add_token(token)
                detokenizer.last_segment  # noqa: B018  consumes the segment
            answer = Answer(
                plan=self._plan(request, prompt, top=request.logprobs, score_prompt=score),
                parser=StreamParser(request.stop, {}),
                detokenizer=detokenizer,
                token_texts=self.token_texts,
                echo=self.tokenizer.decode(prompt, skip_special_tokens=True) if echo else "",
            )
            answers.append(answer)
        return answers

    def _plan(self, request: protocol.Request, prompt: list[int], **options: Any) -> AnswerPlan:
        settings, count, vocab_size = self.settings, len(prompt), self.engine.vocab_size
        max_tokens = getattr(request, "max_completion_tokens", None)
        max_tokens = request.max_tokens if max_tokens is None else max_tokens
        if max_tokens == 0 and not getattr(request, "echo", False):
            reject("max_tokens", "expected 1 or more without echo", 0)
        limit = min(settings.max_prompt_tokens or self.context, self.context - (max_tokens != 0))
        if not 0 < count <= limit:
            message = f"expected a prompt of 1 to {limit} tokens, got {count}"
            raise APIError(400, message, code="context_length_exceeded" if count else None)
        if any(int(token) >= vocab_size for token in request.logit_bias):
            reject("logit_bias", f"expected token ids below {vocab_size}", request.logit_bias)
        remaining = min(settings.max_tokens_limit, self.context - count)
        max_tokens = settings.max_tokens if max_tokens is None else max_tokens
        sampling = {name: getattr(settings, name) for name in SAMPLING}
        sampling |= request.model_dump(include=SAMPLING, exclude_none=True)
        sampling["top_k"] = sampling["top_k"] if 0 < sampling["top_k"] < vocab_size else 0
        return AnswerPlan(
            prompt=prompt,
            max_tokens=remaining if max_tokens in (None, -1) else min(max_tokens, remaining),
            sampling=sampling,
            penalties=request.model_dump(include=PENALTIES),
            seed=request.seed,
            **options,
        )

    def _render(self, request: protocol.ChatRequest, tools: list[Any], *, thinking: bool) -> str:
        """Return the prompt of a conversation."""
        messages = request.conversation()
        if not self.tokenizer.has_chat_template:
            return "\n".join(message["content"] for message in messages)
        variables = {**self.settings.template_variables(), **request.chat_template_kwargs}
        if reserved := RESERVED & set(variables):
            expected = "expected variables of the chat template"
            reject("chat_template_kwargs", expected, sorted(reserved))
        if tools:
            variables["tools"] = tools
        if request.reasoning_effort:
            variables["reasoning_effort"] = request.reasoning_effort
        if not thinking:
            variables["enable_thinking"] = False
        try:
            return render(self.tokenizer, messages, variables)
        except CheckpointError as exc:
            raise APIError(400, str(exc), param="messages") from exc

    def _encode(self, text: str, *, special: bool = True) -> list[int]:
        return list(self.tokenizer.encode(text, add_special_tokens=special))
