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
from splitquant_mlx.inference.guard import Guard, refusal_response
from splitquant_mlx.inference.protocol import Refusal, failure
from splitquant_mlx.inference.responses import Responses


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

    async def index(request: Request) -> Response:
        paths = [f"POST /v1{path}" for path in posts]
        paths += ["GET /v1/models", "GET /health"]
        said = f"splitquant-mlx serves {name} with OpenAI's API, whose base URL ends in /v1"
        return JSONResponse({"message": said, "model": name, "paths": paths})

    async def refused(request: Request, exc: Any) -> Response:
        if isinstance(exc, HTTPException):  # Starlette's, of its routes
            text = (
                f"{request.method} {request.url.path}: {exc.detail.lower()} (GET / lists the paths)"
            )
            response = refusal_response(Refusal(exc.status_code, text, code="unknown_url"))
            response.headers.update(exc.headers or {})
            return response
        return refusal_response(exc if isinstance(exc, Refusal) else failure())

    posts = {"/chat/completions": Chat, "/completions": Completions, "/responses": Responses}
    routes = [Route("/health", health), Route("/", index), Route("/v1", index)]
    for prefix in ("/v1", ""):
        routes += [Route(prefix + path, models) for path in ("/models", "/models/{name:path}")]
        for path, endpoint in posts.items():
            routes.append(Route(prefix + path, endpoint(service, slots), methods=["POST"]))
    handlers: Any = dict.fromkeys((HTTPException, Refusal, Exception), refused)
    return Guard(Starlette(routes=routes, exception_handlers=handlers), service.settings)
