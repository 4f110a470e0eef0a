"""Middleware that checks the Host, Origin, API key and content type of requests.

Web pages may use the server if their origin is this machine or is listed in `allowed_origins`;
browsers always send a page's Origin. The check of the Host prevents DNS rebinding.
"""

import asyncio
import hmac
import logging
import re
import time
from typing import Any
from urllib.parse import quote, urlsplit

from starlette.datastructures import Headers
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import JSONResponse

from splitquant_mlx.inference.protocol import SHUTTING_DOWN, APIError
from splitquant_mlx.inference.settings import ServeSettings

LOG = logging.getLogger("splitquant_mlx.serve")
LOCAL = r"(?:[\w-]+\.)*localhost|127(?:\.\d+){3}|\[::1\]"  # always this machine
ADDRESS = r"\d+(?:\.\d+){3}|\[[\da-f:.]+\]"
CONTAINERS = "host.docker.internal"  # the host's name inside Docker containers
HEADERS = {401: {"WWW-Authenticate": "Bearer"}, 429: {"Retry-After": "1"}}


class Guard:
    """ASGI middleware that checks and logs each request.

    Args:
        app: the application.
        settings: settings of the server.
    """

    def __init__(self, app: Any, settings: ServeSettings) -> None:
        listed = ",".join(settings.allowed_origins).split(",")
        origins = [origin.strip().rstrip("/") for origin in listed if origin.strip()]
        host = f"[{settings.host}]" if ":" in settings.host else settings.host
        names = [host, CONTAINERS, *(urlsplit(origin).hostname or "" for origin in origins)]
        hosts = [LOCAL, *map(re.escape, filter(None, names))]
        if not re.fullmatch(LOCAL, host):  # reachable over the network by any of its addresses
            hosts.append(ADDRESS)
        hosts = [".*"] if "*" in origins else hosts
        self.hosts = re.compile(rf"(?:{'|'.join(hosts)})\.?(?::\d+)?", re.IGNORECASE)
        self.app, self.key = app, settings.api_key
        self.cors = CORSMiddleware(
            self._check_request,
            allow_origins=origins,
            allow_origin_regex=rf"(?i:[a-z][a-z\d+.-]*://(?:{LOCAL})(?::\d+)?)",
            allow_methods=("GET", "POST"),
            allow_headers="*",
            allow_private_network=True,
        )

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Check a request and pass it to the application."""
        start, status = time.perf_counter(), "client disconnected"
        scope["path"] = re.sub("/+", "/", scope["path"]).rstrip("/") or "/"

        async def record_status(message: Any) -> None:
            nonlocal status
            status = message.get("status", status)
            await send(message)

        try:
            self._check_source(Headers(scope=scope))
            await self.cors(scope, receive, record_status)
        except APIError as exc:
            await error_response(exc)(scope, receive, record_status)
        except asyncio.CancelledError:  # by uvicorn, after its graceful shutdown timeout
            if isinstance(status, str):
                await error_response(APIError(503, SHUTTING_DOWN))(scope, receive, record_status)
        finally:
            client, duration_s = (scope.get("client") or ("-",))[0], time.perf_counter() - start
            request, note = f"{scope['method']} {quote(scope['path'])}", scope.get("note", "")
            LOG.info("%s %s %s, %s%.2f s", client, request, status, note, duration_s)

    def _check_source(self, headers: Headers) -> None:
        if (host := headers.get("host")) is not None and not self.hosts.fullmatch(host):
            message = f"Host: expected this server, got {host!r}: use localhost, or allow the name "
            message += "with --allowed-origins"
            raise APIError(403, message, code="host_not_allowed")
        for origin in headers.getlist("origin"):
            if not self.cors.is_allowed_origin(origin):
                message = f"Origin: {origin!r} is not allowed: add it with --allowed-origins"
                raise APIError(403, message, code="origin_not_allowed")

    async def _check_request(self, scope: Any, receive: Any, send: Any) -> None:
        """Check key and content type; pages of allowed origins can read these errors (CORS)."""
        try:
            headers = Headers(scope=scope)
            scheme, _, key = headers.get("authorization", "").partition(" ")
            matches = hmac.compare_digest(key.encode("latin-1"), (self.key or "").encode())
            authorized = self.key is None or (scheme.lower() == "bearer" and matches)
            if not authorized and scope["path"] != "/health":
                problem = "wrong" if key else "missing"
                message = f"{problem} API key: expected 'Authorization: Bearer KEY'"
                raise APIError(401, message, code="invalid_api_key")
            kind = headers.get("content-type", "application/json").partition(";")[0].strip()
            if scope["method"] == "POST" and kind.lower() != "application/json":
                raise APIError(415, f"Content-Type: expected application/json, got {kind}")
            if (coding := headers.get("content-encoding", "identity").lower()) != "identity":
                raise APIError(415, f"Content-Encoding: expected none, got {coding}")
        except APIError as exc:
            return await error_response(exc)(scope, receive, send)
        await self.app(scope, receive, send)


def error_response(exc: APIError) -> JSONResponse:
    """Return the HTTP response of an error."""
    return JSONResponse(exc.body, exc.status, headers=HEADERS.get(exc.status))
