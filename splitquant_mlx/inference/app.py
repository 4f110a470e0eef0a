"""The ASGI application: the paths of OpenAI's API."""

import asyncio
import json
import logging
import time
from collections.abc import AsyncIterator
from typing import Any

import anyio
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from splitquant_mlx.inference.endpoints import Chat, Completions, usage_of
from splitquant_mlx.inference.guard import Guard, refusal_response
from splitquant_mlx.inference.protocol import Refusal, failure, parse
from splitquant_mlx.inference.responses import Responses
from splitquant_mlx.inference.service import Service
from splitquant_mlx.inference.settings import ServeSettings


def application(service: Service) -> Any:
    """Return the ASGI application that answers with a service."""
    created, name = int(time.time()), service.names[0]
    slots = asyncio.Semaphore(service.settings.max_concurrent)

    async def models(request: Request) -> Response:
        asked = request.path_params.get("name")
        service.check_model(asked)
        model = {"id": name, "object": "model", "created": created, "owned_by": "splitquant-mlx"}
        return JSONResponse(model if asked else {"object": "list", "data": [model]})

    async def health(request: Request) -> Response:
        return JSONResponse({"status": "ok"})

    async def refused(request: Request, exc: Any) -> Response:
        return refusal_response(exc)

    async def no_route(request: Request, exc: Any) -> Response:
        text = f"{request.method} {request.url.path}: {exc.detail.lower()}"
        response = refusal_response(Refusal(exc.status_code, text, code="unknown_url"))
        response.headers.update(exc.headers or {})
        return response

    async def failed(request: Request, exc: Exception) -> Response:
        return refusal_response(failure())

    endpoints = {
        "/chat/completions": Chat(service),
        "/completions": Completions(service),
        "/responses": Responses(service),
    }
    routes = [Route("/health", health)]
    for prefix in ("/v1", ""):
        routes += [Route(prefix + path, models) for path in ("/models", "/models/{name:path}")]
        for path, endpoint in endpoints.items():
            routes.append(Route(prefix + path, Post(endpoint, slots), methods=["POST"]))
    handlers = {HTTPException: no_route, Refusal: refused, Exception: failed}
    return Guard(Starlette(routes=routes, exception_handlers=handlers), service.settings)


class Post:
    """ASGI application that answers what is posted to an endpoint, while there are slots."""

    def __init__(self, endpoint: Completions, slots: asyncio.Semaphore) -> None:
        self.endpoint, self.slots, self.service = endpoint, slots, endpoint.service

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Answer one request."""
        message = Request(scope, receive)
        request = parse(await _body(message, self.service.settings), self.endpoint.kind)
        self.service.check_model(request.model)
        if self.slots.locked():
            text = f"{self.service.settings.max_concurrent} requests are being answered: try again"
            raise Refusal(429, text, code="rate_limit_exceeded")
        began, answers = time.perf_counter(), []
        async with self.slots:
            try:
                answers += await run_in_threadpool(self.endpoint.answers, request)
                for answer in answers:
                    answer.start(self.service.engine)
                chunks = self.endpoint.chunks(request, answers)
                if request.stream:
                    events = _events(chunks, named=self.endpoint.named_events)
                    response: Response = StreamingResponse(events, media_type="text/event-stream")
                else:
                    response = JSONResponse(self.endpoint.collect(await _all(chunks, message)))
                await response(scope, receive, send)
            finally:
                for answer in answers:
                    answer.job.cancelled = True
                usage, took_s = usage_of(answers), time.perf_counter() - began
                prompt, said = usage["prompt_tokens"], usage["completion_tokens"]
                speed = f"{said / took_s:.1f} tokens/s"
                scope["note"] = f"{prompt} prompt + {said} answer tokens, {speed}, "


async def _body(request: Request, settings: ServeSettings) -> bytes:
    """Return a request's body, within the limits. Raises Refusal (408, 413)."""
    limit_s, limit, body = settings.request_timeout, settings.max_request_bytes, bytearray()
    too_large = Refusal(413, f"the body is larger than {limit} bytes")
    if int(request.headers.get("content-length", "0")) > limit:
        raise too_large
    try:
        with anyio.fail_after(limit_s):
            async for piece in request.stream():
                body += piece
                if len(body) > limit:
                    raise too_large
    except TimeoutError:
        raise Refusal(408, f"the request took longer than {limit_s:g} s to arrive") from None
    except ClientDisconnect:
        raise Refusal(400, "the client left before the end of the request") from None
    return bytes(body)


async def _all(chunks: AsyncIterator[Any], request: Request) -> list[Any]:
    """Return all chunks, unless the client leaves before."""
    found = []
    async for chunk in chunks:
        if await request.is_disconnected():
            raise Refusal(400, "the client left")
        found.append(chunk)
    return found


async def _events(chunks: AsyncIterator[Any], *, named: bool) -> AsyncIterator[str]:
    """Yield chunks as server-sent events."""

    def event(chunk: dict[str, Any], kind: str) -> str:
        data = json.dumps(chunk, ensure_ascii=False)
        return f"event: {kind}\ndata: {data}\n\n" if named else f"data: {data}\n\n"

    try:
        async for chunk in chunks:
            yield event(chunk, chunk.get("type", ""))
    except Exception as exc:  # too late for another status
        if not isinstance(exc, Refusal):
            logging.exception("a stream failed")
        yield event((exc if isinstance(exc, Refusal) else failure()).body, "error")
    else:
        if not named:
            yield "data: [DONE]\n\n"
