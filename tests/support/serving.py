"""Run `serve`: in this process, with clients in a thread; or as a process of its own."""

import http.client
import json
import queue
import re
import signal
import socket
import subprocess
import sys
import threading
from contextlib import contextmanager, suppress
from typing import IO, Any
from urllib.parse import urlsplit

from splitquant_mlx.inference.answers import Service
from splitquant_mlx.inference.server import bind, listening, load_service
from splitquant_mlx.inference.settings import ServeSettings
from splitquant_mlx.models.source import resolve
from splitquant_mlx.runtime.ranks import join

COMMAND = [sys.executable, "-m", "splitquant_mlx", "serve", "--device", "cpu", "--port", "0"]
STORY = "Once upon a time"
JSON = {"Content-Type": "application/json"}
CHAT, TEXT = "/v1/chat/completions", "/v1/completions"


class Client:
    """Send requests, well-formed or not, to the server at an address."""

    def __init__(self, url: str) -> None:
        self.url = url
        parts = urlsplit(url)
        self.address = parts.hostname or "", parts.port or 0

    def ask(self, method: str, path: str, body: object = None, **headers: Any) -> tuple[int, Any]:
        """Return status and JSON of an answer; `body` is sent as JSON, or as it is if bytes."""
        data = body if isinstance(body, bytes) else None if body is None else json.dumps(body)
        connection = http.client.HTTPConnection(*self.address, timeout=30)
        try:
            connection.request(method, path, data, {**JSON, **headers})
            response = connection.getresponse()
            text = response.read().decode()
            return response.status, json.loads(text) if text[:1] == "{" else text
        finally:
            connection.close()

    def head(self, method: str, path: str, **headers: str) -> tuple[int, dict[str, str]]:
        """Return status and headers of an answer."""
        connection = http.client.HTTPConnection(*self.address, timeout=30)
        try:
            connection.request(
                method, path, None, {k.replace("_", "-"): v for k, v in headers.items()}
            )
            response = connection.getresponse()
            return response.status, {name.lower(): value for name, value in response.getheaders()}
        finally:
            connection.close()

    def post(self, path: str, **body: object) -> Any:
        """Return the JSON of an answer to a request that must succeed."""
        status, answer = self.ask("POST", path, body)
        assert status == 200, answer
        return answer

    def raw(self, *pieces: bytes, strip: bytes = b"HTTP/1.1 000") -> tuple[int, Any]:
        """Send bytes; return status and JSON, or text, of what comes back until the end.

        An answer with the status line `strip` is passed over.
        """
        received = b""
        with self.connect() as connection, suppress(ConnectionError):
            for piece in pieces:
                connection.sendall(piece)
            while piece := connection.recv(2**16):
                received += piece
        head, _, body = received.partition(b"\r\n\r\n")
        if head.startswith(strip):
            head, _, body = body.partition(b"\r\n\r\n")
        return int(head.split()[1]), json.loads(body) if body[:1] == b"{" else body

    def connect(self) -> socket.socket:
        return socket.create_connection(self.address, timeout=30)

    def start(self, **body: object) -> socket.socket:
        """Send a completion request, and return the connection without reading from it."""
        connection = self.connect()
        connection.sendall(message(json.dumps({"prompt": STORY, **body}).encode()))
        return connection


def message(body: bytes, *headers: str, path: str = TEXT, length: object = None) -> bytes:
    """Return a POST request as bytes."""
    length = len(body) if length is None else length
    head = [
        f"POST {path} HTTP/1.1",
        "Host: localhost",
        "Connection: close",
        f"Content-Length: {length}",
        *headers,
    ]
    return "\r\n".join([*head, "", ""]).encode() + body


def check_error(answer: tuple[int, Any], status: int, *words: str) -> dict[str, Any]:
    """Assert that an answer is an error as OpenAI's API gives them; return it."""
    got, body = answer
    assert got == status, answer
    assert set(body) == {"error"}
    error = body["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["type"] == ("server_error" if status >= 500 else "invalid_request_error")
    assert "\n" not in error["message"]
    for word in words:
        assert word in error["message"]
    return error


@contextmanager
def running(model, **settings: Any):
    """Serve `model` here, and yield a Client of it; mlx computes in a thread."""
    chosen = ServeSettings(port=0, **settings)
    source, ready = resolve(str(model)), queue.SimpleQueue()

    def compute() -> None:
        try:
            service = load_service(source, chosen, False, join())
            ready.put(service)
            service.engine.run()
        except BaseException as exc:
            ready.put(exc)

    thread = threading.Thread(target=compute)
    thread.start()
    service = ready.get()
    if not isinstance(service, Service):
        raise service
    try:
        with bind(chosen.host, 0) as listener, listening(service, listener) as url:
            yield Client(url)
    finally:
        service.engine.stopping = True
        thread.join()


class Process(Client):
    """Talk to a `serve` that runs as a process of its own."""

    def __init__(self, process: subprocess.Popen) -> None:
        assert process.stdout is not None and process.stderr is not None
        self.process = process
        line = process.stdout.readline()
        found = re.search(r"(http://.+:\d+)/v1", line)
        assert found, line + process.stderr.read()
        super().__init__(found[1])
        # Whatever is logged has to go somewhere, or the server waits for a reader.
        self.log: list[str] = []
        threading.Thread(target=self._read, args=(process.stderr,), daemon=True).start()

    def _read(self, stream: IO[str]) -> None:
        with suppress(ValueError):  # it is closed while it is read
            self.log.extend(stream)


@contextmanager
def serving(*arguments: str):
    """Run the command, yield its Process, kill it."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    default = {"preexec_fn": lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)}
    with subprocess.Popen([*COMMAND, *arguments], **pipes, **default) as process:
        try:
            yield Process(process)
        finally:
            process.kill()
