"""The ASGI application: the paths of OpenAI's API."""

import asyncio
import time
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from splitquant_mlx.inference.answers import Service
from splitquant_mlx.inference.endpoints import Chat, Completions
from splitquant_mlx.inference.guard import Guard, error_response
from splitquant_mlx.inference.protocol import APIError, internal_error
from splitquant_mlx.inference.responses import Responses


def application(service: Service) -> Any:
    """Return the ASGI application of a service."""
    created, name = int(time.time()), service.names[0]
    slots = asyncio.Semaphore(service.settings.max_concurrent)

    async def models(request: Request) -> Response:
        requested = request.path_params.get("name")
        service.check_model(requested)
        model = {"id": name, "object": "model", "created": created, "owned_by": "splitquant-mlx"}
        return JSONResponse(model if requested else {"object": "list", "data": [model]})

    async def health(request: Request) -> Response:
        return JSONResponse({"status": "ok"})

    async def index(request: Request) -> Response:
        paths = [f"POST /v1{path}" for path in posts]
        paths += ["GET /v1/models", "GET /health"]
        message = f"splitquant-mlx serves {name} with OpenAI's API; the base URL ends in /v1"
        return JSONResponse({"message": message, "model": name, "paths": paths})

    async def on_error(request: Request, exc: Any) -> Response:
        if isinstance(exc, HTTPException):  # raised by Starlette's router
            text = (
                f"{request.method} {request.url.path}: {exc.detail.lower()} (GET / lists the paths)"
            )
            response = error_response(APIError(exc.status_code, text, code="unknown_url"))
            response.headers.update(exc.headers or {})
            return response
        return error_response(exc if isinstance(exc, APIError) else internal_error())

    posts = {"/chat/completions": Chat, "/completions": Completions, "/responses": Responses}
    routes = [Route("/health", health), Route("/", index), Route("/v1", index)]
    for prefix in ("/v1", ""):
        routes += [Route(prefix + path, models) for path in ("/models", "/models/{name:path}")]
        for path, endpoint in posts.items():
            routes.append(Route(prefix + path, endpoint(service, slots), methods=["POST"]))
    handlers: Any = dict.fromkeys((HTTPException, APIError, Exception), on_error)
    return Guard(Starlette(routes=routes, exception_handlers=handlers), service.settings)
