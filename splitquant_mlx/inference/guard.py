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
from ipaddress import ip_address
from typing import Any
from urllib.parse import quote

from starlette.datastructures import Headers
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import JSONResponse

from splitquant_mlx.inference.protocol import ENDS, Refusal
from splitquant_mlx.inference.settings import ServeSettings

LOG = logging.getLogger("splitquant_mlx.serve")
CONTAINERS = "host.docker.internal"  # what containers call the machine that they run on
ADDRESS = re.compile(r"(?:[a-z0-9.+-]+:)?//(?:\[([^]]*)\]|([^][:/@\\?#]*))(?::[0-9]*)?")
HEADERS = {401: {"WWW-Authenticate": "Bearer"}, 429: {"Retry-After": "1"}}


class Guard:
    """ASGI middleware that checks Host, Origin, key and content type, and logs each request.

    Args:
        app: the application.
        settings: of the server.
    """

    def __init__(self, app: Any, settings: ServeSettings) -> None:
        listed = ",".join(settings.allowed_origins).split(",")
        self.origins = {origin.strip().rstrip("/") for origin in listed} - {""}
        self.hosts = {_host(origin) for origin in self.origins} | {settings.host, CONTAINERS}
        self.key, self.exposed = settings.api_key, not is_local(settings.host)
        guard, self.app = self, app

        class Cors(CORSMiddleware):
            def is_allowed_origin(self, origin: str) -> bool:
                return guard.knows_origin(origin)

        self.cors = Cors(self._checked, (), ("GET", "POST"), "*", allow_private_network=True)

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

    def knows_origin(self, origin: str) -> bool:
        """Return whether pages of an origin may use the server."""
        return bool(self.origins & {"*", origin}) or is_local(_host(origin))

    def _check_source(self, headers: Headers) -> None:
        host = headers.get("host")
        name = _host(f"//{host}")
        known = name in self.hosts or is_local(name) or (self.exposed and _is_ip(name))
        if host is not None and not known and "*" not in self.origins:
            message = f"Host {host!r} is not this server: use localhost, or see --allowed-origins"
            raise Refusal(403, message, code="host_not_allowed")
        for origin in headers.getlist("origin"):
            if not self.knows_origin(origin):
                message = f"pages of {origin!r} may not use this server: see --allowed-origins"
                raise Refusal(403, message, code="origin_not_allowed")

    async def _checked(self, scope: Any, receive: Any, send: Any) -> None:
        headers = Headers(scope=scope)
        try:
            self._check_key(headers, scope["path"])
            kind = headers.get("content-type", "application/json").partition(";")[0].strip()
            if scope["method"] == "POST" and kind.lower() != "application/json":
                raise Refusal(415, f"Content-Type: expected application/json, got {kind}")
            if (coding := headers.get("content-encoding", "identity").lower()) != "identity":
                raise Refusal(415, f"Content-Encoding: expected none, got {coding}")
        except Refusal as exc:
            return await refusal_response(exc)(scope, receive, send)
        await self.app(scope, receive, send)

    def _check_key(self, headers: Headers, path: str) -> None:
        scheme, _, given = headers.get("authorization", "").partition(" ")
        right = (self.key or "").encode()
        if self.key is None or path == "/health":
            return
        if scheme.lower() != "bearer" or not hmac.compare_digest(given.encode("latin-1"), right):
            what = "wrong" if given else "missing"
            message = f"{what} API key: expected 'Authorization: Bearer KEY'"
            raise Refusal(401, message, code="invalid_api_key")


def is_local(host: str) -> bool:
    """Return whether a host is this machine, whatever a name server says."""
    loopback = _is_ip(host) and ip_address(host).is_loopback
    return loopback or host == "localhost" or host.endswith(".localhost")


def refusal_response(exc: Refusal) -> JSONResponse:
    """Return the answer that says why there is none."""
    return JSONResponse(exc.body, exc.status, headers=HEADERS.get(exc.status))


def _host(address: str) -> str:
    """Return the host of `//host:port` or an origin; empty for anything else."""
    found = ADDRESS.fullmatch(address.lower())
    return (found[1] or found[2]).rstrip(".") if found else ""


def _is_ip(host: str) -> bool:
    try:
        return bool(ip_address(host))
    except ValueError:
        return False
