"""From a checked request to its answer: prompts to tokens, tokens to what the model says."""

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from dataclasses import dataclass
from inspect import signature
from typing import Any, NamedTuple
from uuid import uuid4

from mlx_lm.sample_utils import make_logits_processors

from splitquant_mlx.errors import one_line
from splitquant_mlx.inference import protocol
from splitquant_mlx.inference.engine import NO_TOKEN, Engine, Job, Plan, Scored
from splitquant_mlx.inference.protocol import Refusal, refuse
from splitquant_mlx.inference.stops import NORMAL, REASONING, TOOL, Piece, Reader, marks_of
from splitquant_mlx.inference.token_text import Placed, Texts

BEGIN, END = "begin", "end"  # kinds of parts, besides NORMAL, REASONING and TOOL
KEEPALIVE_S = 5.0
SAMPLING = {"temp", "top_p", "top_k", "min_p"}
PENALTIES = set(signature(make_logits_processors).parameters)
RESERVED = {"tokenize", "add_generation_prompt", "tools", "return_dict", "chat_template"}


class Part(NamedTuple):
    """What an answer says next; one without text shows now and then that it is under way."""

    kind: str
    text: str = ""  # of the prompt for BEGIN, if it is to be repeated
    tokens: tuple[Placed, ...] = ()  # computed since the part before
    calls: tuple[dict[str, Any], ...] = ()  # for TOOL, as OpenAI's API gives them
    finish: str | None = None  # for END, why


@dataclass(eq=False, kw_only=True)
class Answer(Job):
    """An answer to compute and read.

    Args:
        plan: to compute.
        reader: of the text.
        detokenizer: mlx-lm's, to which the token before the answer was given.
        texts: of tokens.
        parse: returns the calls that a text makes, or fails.
        parallel: whether to go on after the first call.
        echo: text to repeat first.
    """

    reader: Reader
    detokenizer: Any
    texts: Texts
    parse: Callable[[str], Any] = json.loads
    parallel: bool = True
    echo: str = ""

    def __post_init__(self) -> None:
        self.completion_tokens = self._calls = 0
        self.reader.position = len(self.echo)
        self._untold: list[Placed] = []  # tokens that came since the last part
        self._events: asyncio.Queue[Any] = asyncio.Queue()

    def start(self, engine: Engine) -> None:
        """Have the answer computed."""
        self._loop = asyncio.get_running_loop()
        engine.submit(self)

    def emit(self, event: Any) -> None:
        """Pass on what comes in the engine's thread."""
        with suppress(RuntimeError):  # the loop is closed: nobody is there to hear
            self._loop.call_soon_threadsafe(self._events.put_nowait, event)

    async def parts(self) -> AsyncIterator[Part]:
        """Yield what comes, to the end. Raises what ends the answer early."""
        scored = await self._event() if self.plan.score_prompt else []
        yield Part(BEGIN, self.echo, tuple(self.texts.place(scored, self.echo)))
        finish = None
        while finish is None:
            try:
                pieces, finish = self._read(await asyncio.wait_for(self._event(), KEEPALIVE_S))
            except asyncio.TimeoutError:
                pieces = [(NORMAL, "")]
            for kind, text in pieces:
                calls = self._parsed(text) if kind == TOOL else ()
                kind = NORMAL if kind == TOOL and not calls else kind  # what looked like a call
                yield Part(kind, "" if calls else text, self._told(), calls)
            if self._calls and not self.parallel:
                finish = "stop"
        self.cancelled = True
        finish = "tool_calls" if self._calls and finish == "stop" else finish
        yield Part(END, tokens=self._told(), finish=finish)

    async def _event(self) -> Any:
        event = await self._events.get()
        if isinstance(event, Exception):
            raise event
        return event

    def _read(self, scored: Scored) -> tuple[list[Piece], str | None]:
        """Return what a token adds to the text, and whether the answer ends with it."""
        token, _, _, finish = scored
        if token == NO_TOKEN:
            return [], finish
        self.completion_tokens += 1
        if finish != "stop":  # the token of the end has no text
            self._untold.append((scored, self.reader.position))
            self.detokenizer.add_token(token)
        if finish:
            self.detokenizer.finalize()
        text = self.detokenizer.last_segment
        pieces = self.reader.feed(text, last=finish is not None)
        if not self.reader.stopped:
            return pieces, finish
        self._untold = [t for t in self._untold if t[1] < self.reader.position]
        return pieces, "stop"

    def _parsed(self, text: str) -> tuple[dict[str, Any], ...]:
        """Return the calls that a text makes; none if it is no call."""
        calls = []
        try:
            found = self.parse(text)
            for call in found if isinstance(found, list) else [found]:
                given = call.get("arguments") or {}
                given = given if isinstance(given, str) else json.dumps(given, ensure_ascii=False)
                function = {"name": str(call["name"]), "arguments": given}
                place = {"index": self._calls + len(calls), "id": f"call_{uuid4().hex[:24]}"}
                calls.append({**place, "type": "function", "function": function})
        except Exception:  # parsers raise what they like; the text was cut off, mostly
            return ()
        calls = calls if self.parallel else calls[:1]
        self._calls += len(calls)
        return tuple(calls)

    def _told(self) -> tuple[Placed, ...]:
        told, self._untold = tuple(self._untold), []
        return told


class Service:
    """Plans the answers of one model.

    Args:
        engine: computes them.
        names: of the model, first the one that clients are told.
        context: most tokens of a prompt and its answer together.
    """

    def __init__(self, engine: Engine, names: list[str], context: int) -> None:
        self.engine, self.names, self.context = engine, names, context
        self.settings, self.tokenizer = engine.settings, engine.tokenizer
        self.texts = Texts(self.tokenizer)

    def check_model(self, name: str | None) -> None:
        """Raise Refusal (404) for another model than the one served."""
        if name is None or name.rstrip("/").removeprefix("./") in self.names:
            return
        message = (
            f"the model {name!r:.80} is not served here: ask for {self.names[0]!r}, or name it so "
            "with --served-model-name where the server is started"
        )
        raise Refusal(404, message, param="model", code="model_not_found")

    def chat(self, request: protocol.ChatRequest) -> Answer:
        """Return the answer to compute for a chat completion. Raises Refusal."""
        tokenizer, schema, grammar = self.tokenizer, request.schema(), None
        forced, tools = request.forced_tools(), request.offered_tools()
        if tools and not forced and not tokenizer.has_tool_calling:
            message = "tools: this model's chat template has none: leave them out, or require one"
            raise Refusal(400, message, param="tools")
        if schema is not None:
            if self.engine.draft_model is not None:
                raise Refusal(400, "JSON and forced tools: not with a draft model")
            grammar = self.engine.grammars.of_schema(schema)
        text = self._render(request, tools, thinking=grammar is None)
        prompt = self._encode(text, special=not tokenizer.has_chat_template)
        top = request.top_logprobs if request.logprobs else None
        if grammar is not None:
            marks, state = {}, TOOL if forced else NORMAL
        else:
            marks = marks_of(tokenizer, tools=bool(tools))
            begun = tokenizer.think_start or "\0"
            thinks = text.rfind(begun) > text.rfind(tokenizer.think_end or "\0")
            state = getattr(tokenizer, "response_initial_state", None) or NORMAL
            state = REASONING if thinks else state

        return Answer(
            plan=self._plan(request, prompt, top=top, grammar=grammar),
            reader=Reader(request.stop, marks, state),
            detokenizer=tokenizer.detokenizer,
            texts=self.texts,
            parse=json.loads if forced else lambda said: tokenizer.tool_parser(said, tools),
            parallel=request.parallel_tool_calls,
        )

    def completions(self, request: protocol.CompletionRequest) -> list[Answer]:
        """Return the answers to compute, one per prompt. Raises Refusal."""
        answers, vocab_size, echo = [], self.engine.vocab_size, request.echo
        for given in request.prompt:
            prompt = self._encode(given) if isinstance(given, str) else given
            if any(not 0 <= token < vocab_size for token in prompt):
                refuse("prompt", f"expected token ids below {vocab_size}", prompt)
            score = echo and request.logprobs is not None
            detokenizer = self.tokenizer.detokenizer
            for token in self._encode("a", special=False)[-1:]:  # or the first space would be lost
                detokenizer.add_token(token)
                detokenizer.last_segment  # noqa: B018  reading takes it away
            answer = Answer(
                plan=self._plan(request, prompt, top=request.logprobs, score_prompt=score),
                reader=Reader(request.stop, {}),
                detokenizer=detokenizer,
                texts=self.texts,
                echo=self.tokenizer.decode(prompt, skip_special_tokens=True) if echo else "",
            )
            answers.append(answer)
        return answers

    def _plan(self, request: protocol.Request, prompt: list[int], **rest: Any) -> Plan:
        settings, count, vocab_size = self.settings, len(prompt), self.engine.vocab_size
        newer = getattr(request, "max_completion_tokens", None)
        most = request.max_tokens if newer is None else newer
        if most == 0 and not getattr(request, "echo", False):
            refuse("max_tokens", "expected 1 or more without echo", 0)
        limit = min(settings.max_prompt_tokens or self.context, self.context - (most != 0))
        if not 0 < count <= limit:
            message = f"the prompt has {count} tokens, expected 1 to {limit}"
            raise Refusal(400, message, code="context_length_exceeded" if count else None)
        if any(int(token) >= vocab_size for token in request.logit_bias):
            refuse("logit_bias", f"expected token ids below {vocab_size}", request.logit_bias)
        left = min(settings.max_tokens_limit, self.context - count)
        most = settings.max_tokens if most is None else most
        sampling = {name: getattr(settings, name) for name in SAMPLING}
        sampling |= request.model_dump(include=SAMPLING, exclude_none=True)
        sampling["top_k"] = sampling["top_k"] if 0 < sampling["top_k"] < vocab_size else 0
        return Plan(
            prompt=prompt,
            max_tokens=left if most in (None, -1) else min(most, left),
            sampling=sampling,
            penalties=request.model_dump(include=PENALTIES),
            seed=request.seed,
            **rest,
        )

    def _render(self, request: protocol.ChatRequest, tools: list[Any], *, thinking: bool) -> str:
        """Return the prompt that a conversation makes."""
        messages = request.conversation()
        if not self.tokenizer.has_chat_template:
            return "\n".join(message["content"] for message in messages)
        variables = {**self.settings.template_variables(), **request.chat_template_kwargs}
        if wrong := RESERVED & set(variables):
            expected = "expected variables of the chat template"
            refuse("chat_template_kwargs", expected, sorted(wrong))
        own = {"tools": tools, "reasoning_effort": request.reasoning_effort}
        variables |= {name: value for name, value in own.items() if value}
        variables |= {} if thinking else {"enable_thinking": False}
        try:
            return self.tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=True, **variables
            )
        except Exception as exc:  # a template raises what it likes
            message = f"the chat template refuses these messages: {one_line(exc)}"
            raise Refusal(400, message, param="messages") from exc

    def _encode(self, text: str, *, special: bool = True) -> list[int]:
        return list(self.tokenizer.encode(text, add_special_tokens=special))
