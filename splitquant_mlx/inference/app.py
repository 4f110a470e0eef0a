"""The ASGI application: the paths of OpenAI's API."""

import asyncio
import json
import logging
import time
from collections.abc import AsyncIterator
from typing import Any

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from splitquant_mlx.inference.answers import Answer, Service
from splitquant_mlx.inference.endpoints import Chat, Completions, Endpoint, usage_of
from splitquant_mlx.inference.guard import Guard, refusal_response
from splitquant_mlx.inference.protocol import Refusal, failure, parse
from splitquant_mlx.inference.responses import Responses
from splitquant_mlx.inference.settings import ServeSettings


def application(service: Service) -> Any:
    """Return the ASGI application that answers with a service."""
    created, name, slots = int(time.time()), service.names[0], Slots(service.settings)

    posts = {
        "/chat/completions": Chat(service),
        "/completions": Completions(service),
        "/responses": Responses(service),
    }

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

    routes = [Route("/health", health)]
    for prefix in ("/v1", ""):
        routes += [Route(prefix + path, models) for path in ("/models", "/models/{name:path}")]
        for path, endpoint in posts.items():
            routes.append(Route(prefix + path, Post(endpoint, slots), methods=["POST"]))
    app = Starlette(
        routes=routes,
        exception_handlers={HTTPException: no_route, Refusal: refused, Exception: failed},
    )
    return Guard(app, service.settings)


class Slots:
    """Places for requests that are being answered."""

    def __init__(self, settings: ServeSettings) -> None:
        self.most, self.taken = settings.max_concurrent, 0

    def __enter__(self) -> None:
        if self.taken >= self.most:
            message = f"{self.most} requests are being answered: try again"
            raise Refusal(429, message, code="rate_limit_exceeded")
        self.taken += 1

    def __exit__(self, *raised: object) -> None:
        self.taken -= 1


class Post:
    """ASGI application that answers what is posted to an endpoint."""

    def __init__(self, endpoint: Endpoint, slots: Slots) -> None:
        self.endpoint, self.slots, self.service = endpoint, slots, endpoint.service

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Answer one request."""
        body = await _read(Request(scope, receive), self.service.settings)
        request = parse(body, self.endpoint.kind)
        self.service.check_model(request.model)
        began, answers = time.perf_counter(), []
        with self.slots:
            planned = await run_in_threadpool(self.endpoint.plan, request)
            try:
                answers += [Answer(self.service.engine, plan) for plan in planned]
                if request.stream:
                    events = _events(self.endpoint.chunks(request, answers), self.endpoint)
                    response: Response = StreamingResponse(events, media_type="text/event-stream")
                else:
                    whole = self.endpoint.whole(request, answers)
                    response = JSONResponse(await _unless_left(receive, whole))
                await response(scope, receive, send)
            finally:
                for answer in answers:
                    answer.job.cancelled = True
                usage, took_s = usage_of(answers), time.perf_counter() - began
                prompt, said = usage["prompt_tokens"], usage["completion_tokens"]
                speed = f"{said / took_s:.1f} tokens/s"
                scope["note"] = f"{prompt} prompt + {said} answer tokens, {speed}, "


async def _read(request: Request, settings: ServeSettings) -> bytes:
    """Return a request's body, within the limits. Raises Refusal (408, 413)."""
    limit_s, limit = settings.request_timeout, settings.max_request_bytes
    too_large = Refusal(413, f"the body is larger than {limit} bytes")
    length = request.headers.get("content-length", "0")
    if len(length) > 15 or int(length) > limit:
        raise too_large

    async def read() -> bytes:
        body = bytearray()
        async for piece in request.stream():
            body += piece
            if len(body) > limit:
                raise too_large
        return bytes(body)

    try:
        return await asyncio.wait_for(read(), limit_s)
    except asyncio.TimeoutError:
        raise Refusal(408, f"the request took longer than {limit_s:g} s to arrive") from None
    except ClientDisconnect:
        raise Refusal(400, "the client left before the end of the request") from None


async def _events(chunks: AsyncIterator[Any], endpoint: Endpoint) -> AsyncIterator[str]:
    """Yield chunks as server-sent events."""

    def event(chunk: dict[str, Any], kind: str) -> str:
        data = json.dumps(chunk, ensure_ascii=False)
        return f"event: {kind}\ndata: {data}\n\n" if endpoint.named_events else f"data: {data}\n\n"

    try:
        async for chunk in chunks:
            yield ": keepalive\n\n" if chunk is None else event(chunk, chunk.get("type", ""))
    except Exception as exc:  # too late for another status
        if not isinstance(exc, Refusal):
            logging.exception("a stream failed")
        yield event((exc if isinstance(exc, Refusal) else failure()).body, "error")
    else:
        if not endpoint.named_events:
            yield "data: [DONE]\n\n"


async def _unless_left(receive: Any, answer: Any) -> Any:
    """Return an answer, unless the client leaves before it is there."""

    async def left() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    tasks = [asyncio.ensure_future(answer), asyncio.ensure_future(left())]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        if tasks[0].done():
            return tasks[0].result()
        raise Refusal(400, "the client left")
    finally:
        for task in tasks:
            task.cancel()
