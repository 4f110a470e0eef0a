"""Handle HTTP requests of OpenAI's API: mlx_lm.server's handler behind a key, limits and checks.

Whatever is wrong with a request is answered in OpenAI's form, {"error": {"message", "type",
"param", "code"}}. What passes is handed to mlx_lm.server as if it had come so from the client.
"""

import hmac
import io
import json
import logging
import socket
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from http.client import HTTPMessage
from threading import BoundedSemaphore
from typing import Any
from urllib.parse import unquote, urlsplit

from mlx_lm import server

from splitquant_mlx.inference.fields import Refusal
from splitquant_mlx.inference.generator import FAILED, Exchange, Generator, Unwind
from splitquant_mlx.inference.request import ALIAS, Served, check_request

MODELS = "/v1/models"
METHODS = {
    MODELS: "GET",
    "/health": "GET",
    "/v1/completions": "POST",
    "/v1/chat/completions": "POST",
    "/chat/completions": "POST",
}
# How long a refused client has to read why, while it may still be sending.
DRAIN_S = 2.0


@dataclass(frozen=True, kw_only=True)
class Service:
    """Gather what all requests share.

    Args:
        generator: computes the answers.
        served: the model and the limits.
        api_key: that clients must send, or None.
    """

    generator: Generator
    served: Served
    api_key: str | None
    slots: BoundedSemaphore = field(init=False)
    created: int = field(init=False, default_factory=lambda: int(time.time()))

    def __post_init__(self) -> None:
        slots = BoundedSemaphore(self.served.limits.max_concurrent)
        object.__setattr__(self, "slots", slots)


class _TimedReader(io.RawIOBase):
    """Read from a connection until a point in time, however slowly the bytes drip."""

    def __init__(self, connection: socket.socket, timeout_s: float) -> None:
        self.connection = connection
        self.deadline = time.monotonic() + timeout_s

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        self.connection.settimeout(max(self.deadline - time.monotonic(), 0.001))
        return self.connection.recv_into(buffer)


class Handler(server.APIHandler):
    """Answer one request of one client."""

    # A request line without a version is answered with a status, too.
    default_request_version = "HTTP/1.0"
    answering = False

    def __init__(self, service: Service, *args: Any, system_fingerprint: str) -> None:
        self.service = service
        super().__init__(service.generator, *args, system_fingerprint=system_fingerprint)  # type: ignore[arg-type]

    def setup(self) -> None:
        """Put a time limit on the whole request."""
        super().setup()
        self.rfile.close()
        timeout_s = self.service.served.limits.request_timeout_s
        self.rfile = io.BufferedReader(_TimedReader(self.connection, timeout_s))

    def do_GET(self) -> None:
        """Answer /v1/models, /v1/models/ID and /health."""
        self._guard(self._get)

    def do_POST(self) -> None:
        """Answer completions and chat completions."""
        self._guard(self._post)

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """Refuse what http.server cannot make out: its request line, headers or method."""
        vars(self).setdefault("headers", HTTPMessage())
        self._fail(Refusal(405 if code == 501 else code, message or "bad request"))

    def end_headers(self) -> None:
        """Note that it is too late for another status."""
        super().end_headers()
        self.answering = True

    def _guard(self, answer: Callable[[], None]) -> None:
        try:
            self.path = urlsplit(self.path).path
            self._authorize()
            self._route()
            answer()
        except Unwind as exc:
            self._fail(exc.cause)
        except Exception as exc:
            self._fail(exc)

    def _authorize(self) -> None:
        key = self.service.api_key
        if key is None or self.path == "/health":
            return
        given = self.headers.get("Authorization", "").encode("latin-1", "replace")
        if not hmac.compare_digest(given, b"Bearer " + key.encode()):
            what = "wrong" if given else "missing"
            raise Refusal(
                401, f"{what} API key: wanted 'Authorization: Bearer KEY'", code="invalid_api_key"
            )

    def _method(self) -> str | None:
        return "GET" if self.path.startswith(f"{MODELS}/") else METHODS.get(self.path)

    def _route(self) -> None:
        method = self._method()
        if method is None:
            raise Refusal(404, f"no such route: {self.path}", code="unknown_url")
        if method != self.command:
            raise Refusal(405, f"{self.path} wants {method}, not {self.command}")

    def _get(self) -> None:
        if self.path == "/health":
            return super().do_GET()
        name = self.service.served.name
        model = {
            "id": name,
            "object": "model",
            "created": self.service.created,
            "owned_by": "splitquant-mlx",
        }
        if self.path == MODELS:
            return self._answer(200, {"object": "list", "data": [model]})
        wanted = unquote(self.path.removeprefix(f"{MODELS}/"))
        if wanted not in (name, ALIAS):
            raise Refusal(404, f"only {name!r} is served, not {wanted!r}", code="model_not_found")
        self._answer(200, model)

    def _post(self) -> None:
        service, limits = self.service, self.service.served.limits
        chat = self.path.endswith("/chat/completions")
        body = check_request(self._read_body(), chat=chat, served=service.served)
        checked = json.dumps(body).encode()
        self.rfile = io.BytesIO(checked)
        self.headers.replace_header("Content-Length", str(len(checked)))
        if not service.slots.acquire(blocking=False):
            raise Refusal(
                429,
                f"{limits.max_concurrent} requests are being answered: try again",
                code="rate_limit_exceeded",
            )
        try:
            self.response_generator = Exchange(  # type: ignore[assignment]
                service.generator,
                self.connection,
                timeout_s=limits.request_timeout_s,
                stream=body.get("stream", False),
            )
            super().do_POST()
        finally:
            service.slots.release()

    def _read_body(self) -> bytes:
        limits = self.service.served.limits
        lengths = self.headers.get_all("Content-Length", [])
        if "Transfer-Encoding" in self.headers or not lengths:
            raise Refusal(411, "wanted a body with a Content-Length")
        if len(lengths) > 1 or not (lengths[0].isascii() and lengths[0].isdigit()):
            raise Refusal(400, f"Content-Length: wanted a number, got {', '.join(lengths)}")
        if len(lengths[0]) > 15 or int(lengths[0]) > limits.max_request_bytes:
            raise Refusal(413, f"the body is larger than {limits.max_request_bytes} bytes")
        length = int(lengths[0])
        try:
            raw = self.rfile.read(length)
        except TimeoutError as exc:
            raise Refusal(
                408, f"the request took longer than {limits.request_timeout_s:g} s to arrive"
            ) from exc
        if len(raw) < length:
            raise Refusal(400, f"the body ended after {len(raw)} of {length} bytes")
        self.connection.settimeout(limits.request_timeout_s)
        return raw

    def _answer(self, status: int, value: object) -> None:
        body = json.dumps(value).encode()
        self._set_completion_headers(status)
        if status == 401:
            self.send_header("WWW-Authenticate", "Bearer")
        elif status == 405:
            self.send_header("Allow", self._method() or "GET, POST")
        elif status == 429:
            self.send_header("Retry-After", "1")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _fail(self, exc: Exception) -> None:
        if isinstance(exc, ConnectionError | TimeoutError):
            self.log_message("%s", f"the client left: {exc}")
            return
        if not isinstance(exc, Refusal):
            logging.error("a request failed", exc_info=exc)
            exc = Refusal(500, FAILED)
        error = {"error": exc.error}
        with suppress(OSError):
            if self.answering:  # only a stream can fail so late
                self.wfile.write(f"data: {json.dumps(error)}\n\n".encode())
            else:
                self._answer(exc.status, error)
            self._drain()

    def _drain(self) -> None:
        """Read on for a while: closing on a client that still sends would cost it the answer."""
        self.connection.shutdown(socket.SHUT_WR)
        reader = _TimedReader(self.connection, DRAIN_S)
        buffer = bytearray(2**16)
        while reader.readinto(buffer):
            pass
