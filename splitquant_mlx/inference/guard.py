"""What stands between the network and the application: who may ask, from where.

A page in a browser may use the server if its origin is this machine or was allowed: browsers do not
let it hide its Origin, and what sends none is no page. The Host is checked against names that an
attacker has lead here (DNS rebinding).
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

from splitquant_mlx.inference.protocol import ENDS, Refusal
from splitquant_mlx.inference.settings import ServeSettings

LOG = logging.getLogger("splitquant_mlx.serve")
LOCAL = r"(?:[\w-]+\.)*localhost|127(?:\.\d+){3}|\[::1\]"  # this machine, whatever DNS says
ADDRESS = r"\d+(?:\.\d+){3}|\[[\da-f:.]+\]"
CONTAINERS = "host.docker.internal"  # what containers call the machine that they run on
HEADERS = {401: {"WWW-Authenticate": "Bearer"}, 429: {"Retry-After": "1"}}


class Guard:
    """ASGI middleware that checks Host, Origin, key and content type, and logs each request.

    Args:
        app: the application.
        settings: of the server.
    """

    def __init__(self, app: Any, settings: ServeSettings) -> None:
        listed = ",".join(settings.allowed_origins).split(",")
        origins = [origin.strip().rstrip("/") for origin in listed if origin.strip()]
        own = f"[{settings.host}]" if ":" in settings.host else settings.host
        names = [own, CONTAINERS, *(urlsplit(origin).hostname or "" for origin in origins)]
        hosts = [LOCAL, *map(re.escape, filter(None, names))]
        if not re.fullmatch(LOCAL, own):  # open to the network, where it has addresses
            hosts.append(ADDRESS)
        hosts = [".*"] if "*" in origins else hosts
        self.hosts = re.compile(rf"(?:{'|'.join(hosts)})\.?(?::\d+)?", re.IGNORECASE)
        self.app, self.key = app, settings.api_key
        self.cors = CORSMiddleware(
            self._checked,
            allow_origins=origins,
            allow_origin_regex=rf"(?i:[a-z][a-z\d+.-]*://(?:{LOCAL})(?::\d+)?)",
            allow_methods=("GET", "POST"),
            allow_headers="*",
            allow_private_network=True,
        )

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Answer a request, or have the application answer it."""
        began, status = time.perf_counter(), "the client left"
        scope["path"] = re.sub("/+", "/", scope["path"]).rstrip("/") or "/"

        async def noting(message: Any) -> None:
            nonlocal status
            status = message.get("status", status)
            await send(message)

        try:
            self._check_source(Headers(scope=scope))
            await self.cors(scope, receive, noting)
        except Refusal as exc:
            await refusal_response(exc)(scope, receive, noting)
        except asyncio.CancelledError:  # by uvicorn: the server ends, and has waited long enough
            if isinstance(status, str):
                await refusal_response(Refusal(503, ENDS))(scope, receive, noting)
        finally:
            client, took_s = (scope.get("client") or ("-",))[0], time.perf_counter() - began
            what, note = f"{scope['method']} {quote(scope['path'])}", scope.get("note", "")
            LOG.info("%s %s %s, %s%.2f s", client, what, status, note, took_s)

    def _check_source(self, headers: Headers) -> None:
        if (host := headers.get("host")) is not None and not self.hosts.fullmatch(host):
            message = f"Host {host!r} is not this server: use localhost, or see --allowed-origins"
            raise Refusal(403, message, code="host_not_allowed")
        for origin in headers.getlist("origin"):
            if not self.cors.is_allowed_origin(origin):
                message = f"pages of {origin!r} may not use this server: see --allowed-origins"
                raise Refusal(403, message, code="origin_not_allowed")

    async def _checked(self, scope: Any, receive: Any, send: Any) -> None:
        """Check what the right page may get wrong, too; it is told, with CORS headers."""
        try:
            headers = Headers(scope=scope)
            scheme, _, given = headers.get("authorization", "").partition(" ")
            right = hmac.compare_digest(given.encode("latin-1"), (self.key or "").encode())
            known = self.key is None or (scheme.lower() == "bearer" and right)
            if not known and scope["path"] != "/health":
                what = "wrong" if given else "missing"
                message = f"{what} API key: expected 'Authorization: Bearer KEY'"
                raise Refusal(401, message, code="invalid_api_key")
            kind = headers.get("content-type", "application/json").partition(";")[0].strip()
            if scope["method"] == "POST" and kind.lower() != "application/json":
                raise Refusal(415, f"Content-Type: expected application/json, got {kind}")
            if (coding := headers.get("content-encoding", "identity").lower()) != "identity":
                raise Refusal(415, f"Content-Encoding: expected none, got {coding}")
        except Refusal as exc:
            return await refusal_response(exc)(scope, receive, send)
        await self.app(scope, receive, send)


def refusal_response(exc: Refusal) -> JSONResponse:
    """Return the answer that says why there is none."""
    return JSONResponse(exc.body, exc.status, headers=HEADERS.get(exc.status))
