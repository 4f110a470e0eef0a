"""What is posted, answered in the shapes of OpenAI's API: in chunks or, collected, whole."""

import asyncio
import json
import logging
import time
from collections.abc import AsyncIterator, Sequence
from typing import Any
from uuid import uuid4

import anyio
from starlette.concurrency import run_in_threadpool
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse

from splitquant_mlx.inference.answers import BEGIN, END, Answer, Part, Service
from splitquant_mlx.inference.protocol import (
    ChatRequest,
    CompletionRequest,
    Refusal,
    failure,
    parse,
)
from splitquant_mlx.inference.settings import ServeSettings
from splitquant_mlx.inference.stops import REASONING, TOOL

Chunk = dict[str, Any]


class Completions:
    """/v1/completions as an ASGI application, and what other endpoints share with it.

    Args:
        service: plans the answers.
        slots: places for requests that are being answered.
    """

    kind: type[Any] = CompletionRequest
    object, chunk_object, prefix = "text_completion", "text_completion", "cmpl-"
    named_events = False

    def __init__(self, service: Service, slots: asyncio.Semaphore) -> None:
        self.service, self.slots = service, slots

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Answer one request."""
        posted, service, settings = Request(scope, receive), self.service, self.service.settings
        request = parse(await _body(posted, settings), self.kind)
        service.check_model(request.model)
        if self.slots.locked():
            text = f"{settings.max_concurrent} requests are being answered: try again"
            raise Refusal(429, text, code="rate_limit_exceeded")
        began, answers = time.perf_counter(), []
        async with self.slots:
            try:
                answers += await run_in_threadpool(self.answers, request)
                for answer in answers:
                    answer.start(service.engine)
                chunks = self.chunks(request, answers)
                if request.stream:
                    events = self._server_sent(chunks)
                    response: Response = StreamingResponse(events, media_type="text/event-stream")
                else:
                    found = []
                    async for chunk in chunks:
                        found.append(chunk)
                        if await posted.is_disconnected():
                            raise Refusal(400, "the client left")
                    response = JSONResponse(self.collect(found))
                await response(scope, receive, send)
            finally:
                for answer in answers:
                    answer.cancelled = True
                usage, took_s = usage_of(answers), time.perf_counter() - began
                prompt, said = usage["prompt_tokens"], usage["completion_tokens"]
                speed = f"{said / took_s:.1f} tokens/s"
                scope["note"] = f"{prompt} prompt + {said} answer tokens, {speed}, "

    def answers(self, request: Any) -> list[Answer]:
        """Return the answers to compute. Raises Refusal."""
        return self.service.completions(request)

    def choice(self, request: Any, part: Part) -> Chunk:
        """Return what a part of an answer adds to its choice: lists, strings, what comes once."""
        wanted = request.logprobs is not None and part.tokens
        logprobs = self.service.texts.completion_logprobs(part.tokens) if wanted else None
        return {"text": part.text, "logprobs": logprobs, "finish_reason": part.finish}

    async def chunks(self, request: Any, answers: Sequence[Answer]) -> AsyncIterator[Chunk]:
        """Yield what a stream consists of."""
        head = self.envelope(self.chunk_object)
        for index, answer in enumerate(answers):
            async for part in answer.parts():
                yield {**head, "choices": [{"index": index, **self.choice(request, part)}]}
        if request.stream_options.get("include_usage") or not request.stream:
            yield {**head, "choices": [], "usage": usage_of(answers)}

    def collect(self, chunks: Sequence[Chunk]) -> Chunk:
        """Return the chunks of a stream in one."""
        choices: dict[int, Chunk] = {}
        for chunk in chunks:
            for choice in chunk["choices"]:
                _merge(choices.setdefault(choice["index"], {}), choice)
        return {**chunks[-1], "object": self.object, "choices": list(choices.values())}

    def envelope(self, kind: str) -> Chunk:
        """Return what all chunks of an answer share."""
        created, model = int(time.time()), self.service.names[0]
        return {"id": new_id(self.prefix), "object": kind, "created": created, "model": model}

    async def _server_sent(self, chunks: AsyncIterator[Chunk]) -> AsyncIterator[str]:
        """Yield chunks as server-sent events."""

        def event(chunk: Chunk, kind: str) -> str:
            name = f"event: {kind}\n" if self.named_events else ""
            return f"{name}data: {json.dumps(chunk, ensure_ascii=False)}\n\n"

        try:
            async for chunk in chunks:
                yield event(chunk, chunk.get("type", ""))
        except Exception as exc:  # too late for another status
            if not isinstance(exc, Refusal):
                logging.exception("a stream failed")
            yield event((exc if isinstance(exc, Refusal) else failure()).body, "error")
        else:
            if not self.named_events:
                yield "data: [DONE]\n\n"


class Chat(Completions):
    """/v1/chat/completions."""

    kind = ChatRequest
    object, chunk_object, prefix = "chat.completion", "chat.completion.chunk", "chatcmpl-"

    def answers(self, request: ChatRequest) -> list[Answer]:
        """Return the one answer to compute."""
        return [self.service.chat(request)]

    def choice(self, request: ChatRequest, part: Part) -> Chunk:
        """Return what a part of an answer adds to its message."""
        deltas = {
            BEGIN: {"role": "assistant", "content": ""},
            REASONING: {"reasoning": part.text, "reasoning_content": part.text},
            TOOL: {"tool_calls": list(part.calls)},
            END: {},
        }
        delta = deltas.get(part.kind, {"content": part.text})
        wanted = request.logprobs and part.tokens
        logprobs = self.service.texts.chat_logprobs(part.tokens) if wanted else None
        return {"delta": delta, "logprobs": logprobs, "finish_reason": part.finish}

    def collect(self, chunks: Sequence[Chunk]) -> Chunk:
        """Return the chunks of a stream in one."""
        answer = super().collect(chunks)
        choice = answer["choices"][0]
        choice["message"] = message = choice.pop("delta")
        for call in message.get("tool_calls", ()):
            del call["index"]
            message["content"] = message["content"] or None
        return answer


def _merge(whole: Chunk, part: Chunk) -> None:
    """Add a part of a choice to what there is of it."""
    for name, value in part.items():
        before = whole.get(name)
        if isinstance(value, dict) and before:
            _merge(before, value)
        elif isinstance(value, str | list) and before:
            whole[name] += value
        elif value is not None or name not in whole:
            whole[name] = value


async def _body(posted: Request, settings: ServeSettings) -> bytes:
    """Return a request's body, within the limits. Raises Refusal (408, 413)."""
    limit_s, limit, body = settings.request_timeout, settings.max_request_bytes, bytearray()
    too_large = Refusal(413, f"the body is larger than {limit} bytes")
    if int(posted.headers.get("content-length", "0")) > limit:
        raise too_large
    try:
        with anyio.fail_after(limit_s):
            async for piece in posted.stream():
                body += piece
                if len(body) > limit:
                    raise too_large
    except TimeoutError:
        raise Refusal(408, f"the request took longer than {limit_s:g} s to arrive") from None
    except ClientDisconnect:
        raise Refusal(400, "the client left before the end of the request") from None
    return bytes(body)


def usage_of(answers: Sequence[Answer]) -> Chunk:
    """Return the token counts of answers together."""
    prompt = sum(len(answer.plan.prompt) for answer in answers)
    said = sum(answer.completion_tokens for answer in answers)
    cached = {"cached_tokens": sum(answer.cached for answer in answers)}
    counts = {"prompt_tokens": prompt, "completion_tokens": said, "total_tokens": prompt + said}
    return {**counts, "prompt_tokens_details": cached}


def new_id(prefix: str) -> str:
    """Return a new id."""
    return prefix + uuid4().hex[:24]
