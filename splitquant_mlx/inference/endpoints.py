"""The shapes of OpenAI's answers: completions and chat completions, in chunks or whole."""

import json
import time
import uuid
from collections.abc import AsyncIterator, Sequence
from typing import Any

from splitquant_mlx.inference.answers import Answer, Planned, Service
from splitquant_mlx.inference.protocol import ChatRequest, CompletionRequest
from splitquant_mlx.inference.stops import REASONING, TOOL
from splitquant_mlx.inference.token_text import Placed

Chunk = dict[str, Any]
Chunks = AsyncIterator[Chunk | None]  # None where nothing came for a while
Delta = tuple[Chunk, list[Placed], str | None]  # with its tokens and, at the end, why it ends


class Endpoint:
    """A path to which requests of a kind are posted.

    Args:
        service: plans the answers.
    """

    kind: type[Any]
    object, chunk_object, prefix = "", "", ""
    named_events = False

    def __init__(self, service: Service) -> None:
        self.service = service

    def plan(self, request: Any) -> list[Planned]:
        """Return the answers to compute. Raises Refusal."""
        raise NotImplementedError

    def choices(self, request: Any, answers: Sequence[Answer]) -> Chunks:
        """Yield the parts of the choices, which are lists, strings and what comes once."""
        raise NotImplementedError

    async def chunks(self, request: Any, answers: Sequence[Answer]) -> Chunks:
        """Yield what a stream consists of."""
        head = self.envelope(self.chunk_object)
        async for choice in self.choices(request, answers):
            yield choice and {**head, "choices": [choice]}
        if request.stream_options.get("include_usage"):
            yield {**head, "choices": [], "usage": usage_of(answers)}

    async def whole(self, request: Any, answers: Sequence[Answer]) -> Chunk:
        """Return the answers in one."""
        choices: dict[int, Chunk] = {}
        async for choice in self.choices(request, answers):
            if choice is not None:
                _merge(choices.setdefault(choice.pop("index"), {}), choice)
        listed = [{"index": index, **choice} for index, choice in choices.items()]
        return {**self.envelope(self.object), "choices": listed, "usage": usage_of(answers)}

    def envelope(self, kind: str) -> Chunk:
        """Return what all chunks of an answer share."""
        created, model = int(time.time()), self.service.names[0]
        return {"id": new_id(self.prefix), "object": kind, "created": created, "model": model}


class Chat(Endpoint):
    """/v1/chat/completions."""

    kind = ChatRequest
    object, chunk_object, prefix = "chat.completion", "chat.completion.chunk", "chatcmpl-"

    def plan(self, request: ChatRequest) -> list[Planned]:
        """Return the one answer to compute."""
        return [self.service.chat(request)]

    async def choices(self, request: ChatRequest, answers: Sequence[Answer]) -> Chunks:
        """Yield a choice per delta."""
        async for part in chat_deltas(self.service, request, answers[0]):
            if part is None:
                yield None
                continue
            delta, tokens, finish = part
            wanted = request.logprobs and tokens
            logprobs = self.service.texts.chat_logprobs(tokens) if wanted else None
            yield {"index": 0, "delta": delta, "logprobs": logprobs, "finish_reason": finish}

    async def whole(self, request: ChatRequest, answers: Sequence[Answer]) -> Chunk:
        """Return the answer in one."""
        answer = await super().whole(request, answers)
        choice = answer["choices"][0]
        choice["message"] = message = choice.pop("delta")
        for call in message.get("tool_calls", ()):
            del call["index"]
        if "tool_calls" in message:
            message["content"] = message["content"] or None
        return answer


class Completions(Endpoint):
    """/v1/completions."""

    kind = CompletionRequest
    object = chunk_object = "text_completion"
    prefix = "cmpl-"

    def plan(self, request: CompletionRequest) -> list[Planned]:
        """Return an answer to compute per prompt."""
        return self.service.completions(request)

    async def choices(self, request: CompletionRequest, answers: Sequence[Answer]) -> Chunks:
        """Yield a choice per piece of text, prompt after prompt."""
        texts = self.service.texts

        def choice(text: str, tokens: list[Placed], finish: str | None) -> Chunk:
            wanted = request.logprobs is not None and tokens
            logprobs = texts.completion_logprobs(tokens) if wanted else None
            at = answers.index(answer)
            return {"index": at, "text": text, "logprobs": logprobs, "finish_reason": finish}

        for answer in answers:
            start, waiting = len(answer.echo or ""), []
            if answer.echo is not None:
                scored = await answer.event() if answer.plan.score_prompt else []
                yield choice(answer.echo, texts.place(scored, answer.echo), None)
            async for step in answer.steps():
                if step is None:
                    yield None
                    continue
                waiting += [(token, start + at) for token, at in step.tokens]
                if step.pieces or step.finish:
                    text = "".join(text for _, text in step.pieces)
                    yield choice(text, waiting, step.finish)
                    waiting = []


async def chat_deltas(
    service: Service, request: ChatRequest, answer: Answer
) -> AsyncIterator[Delta | None]:
    """Yield the deltas of a message."""
    forced, held, calls = bool(request.forced_tools()), "", 0
    waiting: list[Placed] = []
    yield {"role": "assistant", "content": ""}, [], None
    async for step in answer.steps():
        if step is None:
            yield None
            continue
        waiting, pieces = waiting + step.tokens, step.pieces
        if forced:  # one call, from the first character to the last
            held += "".join(text for _, text in pieces)
            pieces = [(TOOL, held)] if step.finish and held else []
        for kind, text in pieces:
            found = _calls(service, request, text, calls) if kind == TOOL else []
            calls += len(found)
            if found:
                delta: Chunk = {"tool_calls": found}
            elif kind == REASONING:
                delta = {"reasoning": text, "reasoning_content": text}
            else:  # what looked like a call and is none is text
                delta = {"content": text}
            yield delta, waiting, None
            waiting = []
        if step.finish:
            yield {}, waiting, "tool_calls" if calls and step.finish == "stop" else step.finish


def _calls(service: Service, request: ChatRequest, text: str, before: int) -> list[Chunk]:
    """Return the calls in a text, after those before it; none if it is no call."""
    tools = [tool.model_dump(exclude_none=True) for tool in request.tools]
    calls = []
    try:
        forced = bool(request.forced_tools())
        found = json.loads(text) if forced else service.tokenizer.tool_parser(text, tools)
        for call in found if isinstance(found, list) else [found]:
            given = call.get("arguments") or {}
            given = given if isinstance(given, str) else json.dumps(given, ensure_ascii=False)
            function = {"name": str(call["name"]), "arguments": given}
            index, name = before + len(calls), new_id("call_")
            calls.append({"index": index, "id": name, "type": "function", "function": function})
    except Exception:  # parsers raise what they like; the text was cut off, mostly
        return []
    return calls if request.parallel_tool_calls else calls[: max(1 - before, 0)]


def _merge(whole: Chunk, part: Chunk) -> None:
    """Add a part of a choice to what there is of it."""
    for name, value in part.items():
        before = whole.get(name)
        if isinstance(value, dict) and before:
            _merge(before, value)
        elif value is not None or name not in whole:
            joined = isinstance(value, str | list) and before is not None
            whole[name] = before + value if joined else value  # type: ignore[operator]


def usage_of(answers: Sequence[Answer]) -> Chunk:
    """Return the token counts of answers together."""
    prompt = sum(len(answer.plan.prompt) for answer in answers)
    said = sum(answer.completion_tokens for answer in answers)
    cached = {"cached_tokens": sum(answer.job.cached for answer in answers)}
    counts = {"prompt_tokens": prompt, "completion_tokens": said, "total_tokens": prompt + said}
    return {**counts, "prompt_tokens_details": cached}


def new_id(prefix: str) -> str:
    """Return a new id."""
    return prefix + uuid.uuid4().hex[:24]
