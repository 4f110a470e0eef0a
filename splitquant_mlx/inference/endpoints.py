"""POST endpoints of OpenAI's API: answers as a stream of chunks, or merged into one response."""

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
    APIError,
    ChatRequest,
    CompletionRequest,
    internal_error,
    parse,
)
from splitquant_mlx.inference.settings import ServeSettings
from splitquant_mlx.inference.stops import REASONING, TOOL

Chunk = dict[str, Any]


class Completions:
    """/v1/completions as an ASGI application, and the base class of the other endpoints.

    Args:
        service: plans the answers.
        slots: limits the number of concurrent requests.
    """

    kind: type[Any] = CompletionRequest
    object, chunk_object, prefix = "text_completion", "text_completion", "cmpl-"
    named_events = False

    def __init__(self, service: Service, slots: asyncio.Semaphore) -> None:
        self.service, self.slots = service, slots

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Answer one request."""
        http_request = Request(scope, receive)
        service, settings = self.service, self.service.settings
        request = parse(await _body(http_request, settings), self.kind)
        service.check_model(request.model)
        if self.slots.locked():
            text = f"{settings.max_concurrent} requests are already in progress: try again later"
            raise APIError(429, text, code="rate_limit_exceeded")
        start, answers = time.perf_counter(), []
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
                    collected = []
                    async for chunk in chunks:
                        collected.append(chunk)
                        if await http_request.is_disconnected():
                            raise APIError(400, "the client disconnected")
                    response = JSONResponse(self.merge(collected))
                await response(scope, receive, send)
            finally:
                for answer in answers:
                    answer.cancelled = True
                usage, duration_s = count_usage(answers), time.perf_counter() - start
                prompt, completion = usage["prompt_tokens"], usage["completion_tokens"]
                speed = f"{completion / duration_s:.1f} tokens/s"
                scope["note"] = f"{prompt} prompt + {completion} answer tokens, {speed}, "

    def answers(self, request: Any) -> list[Answer]:
        """Plan the answers. Raises APIError."""
        return self.service.completions(request)

    def choice(self, request: Any, part: Part) -> Chunk:
        """Return the chunk's choice for a part of an answer."""
        logprobs = None
        if request.logprobs is not None and part.tokens:
            logprobs = self.service.token_texts.completion_logprobs(part.tokens)
        return {"text": part.text, "logprobs": logprobs, "finish_reason": part.finish}

    async def chunks(self, request: Any, answers: Sequence[Answer]) -> AsyncIterator[Chunk]:
        """Yield the chunks of a stream."""
        head = self.envelope(self.chunk_object)
        for index, answer in enumerate(answers):
            async for part in answer.parts():
                yield {**head, "choices": [{"index": index, **self.choice(request, part)}]}
        if request.stream_options.get("include_usage") or not request.stream:
            yield {**head, "choices": [], "usage": count_usage(answers)}

    def merge(self, chunks: Sequence[Chunk]) -> Chunk:
        """Merge the chunks of a stream into one response."""
        choices: dict[int, Chunk] = {}
        for chunk in chunks:
            for choice in chunk["choices"]:
                _merge(choices.setdefault(choice["index"], {}), choice)
        return {**chunks[-1], "object": self.object, "choices": list(choices.values())}

    def envelope(self, kind: str) -> Chunk:
        """Return the fields common to all chunks of an answer."""
        created, model = int(time.time()), self.service.names[0]
        return {"id": new_id(self.prefix), "object": kind, "created": created, "model": model}

    async def _server_sent(self, chunks: AsyncIterator[Chunk]) -> AsyncIterator[str]:
        """Format chunks as server-sent events."""

        def event(chunk: Chunk, kind: str) -> str:
            name = f"event: {kind}\n" if self.named_events else ""
            return f"{name}data: {json.dumps(chunk, ensure_ascii=False)}\n\n"

        try:
            async for chunk in chunks:
                yield event(chunk, chunk.get("type", ""))
        except Exception as exc:  # the status has been sent
            if not isinstance(exc, APIError):
                logging.exception("a stream failed")
            yield event((exc if isinstance(exc, APIError) else internal_error()).body, "error")
        else:
            if not self.named_events:
                yield "data: [DONE]\n\n"


class Chat(Completions):
    """/v1/chat/completions."""

    kind = ChatRequest
    object, chunk_object, prefix = "chat.completion", "chat.completion.chunk", "chatcmpl-"

    def answers(self, request: ChatRequest) -> list[Answer]:
        """Plan the answer. Raises APIError."""
        return [self.service.chat(request)]

    def choice(self, request: ChatRequest, part: Part) -> Chunk:
        """Return the chunk's choice for a part of an answer."""
        deltas = {
            BEGIN: {"role": "assistant", "content": ""},
            REASONING: {"reasoning": part.text, "reasoning_content": part.text},
            TOOL: {"tool_calls": list(part.calls)},
            END: {},
        }
        delta = deltas.get(part.kind, {"content": part.text})
        logprobs = None
        if request.logprobs and part.tokens:
            logprobs = self.service.token_texts.chat_logprobs(part.tokens)
        return {"delta": delta, "logprobs": logprobs, "finish_reason": part.finish}

    def merge(self, chunks: Sequence[Chunk]) -> Chunk:
        """Merge the chunks of a stream into one response."""
        answer = super().merge(chunks)
        choice = answer["choices"][0]
        choice["message"] = message = choice.pop("delta")
        for call in message.get("tool_calls", ()):
            del call["index"]
            message["content"] = message["content"] or None
        return answer


def _merge(whole: Chunk, part: Chunk) -> None:
    """Add `part` to `whole`: concatenate strings and lists, merge dicts, replace other values."""
    for name, value in part.items():
        before = whole.get(name)
        if isinstance(value, dict) and before:
            _merge(before, value)
        elif isinstance(value, str | list) and before:
            whole[name] += value
        elif value is not None or name not in whole:
            whole[name] = value


async def _body(request: Request, settings: ServeSettings) -> bytes:
    """Read a request's body within the limits. Raises APIError (400, 408, 413)."""
    limit_s, limit, body = settings.request_timeout, settings.max_request_bytes, bytearray()
    too_large = APIError(413, f"expected a body of at most {limit} bytes")
    if int(request.headers.get("content-length", "0")) > limit:
        raise too_large
    try:
        with anyio.fail_after(limit_s):
            async for data in request.stream():
                body += data
                if len(body) > limit:
                    raise too_large
    except TimeoutError:
        raise APIError(408, f"expected the complete request within {limit_s:g} s") from None
    except ClientDisconnect:
        raise APIError(400, "the client disconnected before the end of the request") from None
    return bytes(body)


def count_usage(answers: Sequence[Answer]) -> Chunk:
    """Return `usage`: the total token counts of answers."""
    prompt = sum(len(answer.plan.prompt) for answer in answers)
    completion = sum(answer.completion_tokens for answer in answers)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": sum(answer.cached for answer in answers)},
    }


def new_id(prefix: str) -> str:
    """Return a new id."""
    return prefix + uuid4().hex[:24]
