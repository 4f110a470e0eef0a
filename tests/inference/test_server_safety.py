"""Access control and limits of the server."""

import json
import time
from contextlib import ExitStack

import pytest
from scripted import write_scripted
from serving import CHAT, TEXT, check_error, message, running

from splitquant_mlx.inference.server import MAX_CONNECTIONS

OK = json.dumps({"prompt": "X", "max_tokens": 2}).encode()
LIMITS = {"max_request_bytes": 2000, "request_timeout": 0.5}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_scripted(tmp_path_factory.mktemp("scripted") / "model", {"X": [b"plain ", b"y"]})


@pytest.fixture(scope="module")
def server(model):
    with running(model, **LIMITS, allowed_origins=("https://chat.example", "app://x")) as server:
        yield server


@pytest.mark.parametrize(
    ("host", "origin", "status"),
    [
        ("localhost", None, 200),
        ("127.0.0.1:1", "http://localhost:5173", 200),
        ("LOCALHOST", "http://[::1]:3000", 200),
        ("[::1]:8080", "https://chat.example", 200),
        ("host.docker.internal:8080", "app://x", 200),
        ("chat.example", "tauri://localhost", 200),
        ("evil.example", None, 403),
        ("192.168.1.2", None, 403),
        ("localhost.evil.example", None, 403),
        ("127.0.0.1.evil.example", None, 403),
        ("localhost@evil.example", None, 403),
        ("evil.example@localhost", None, 403),
        ("localhost/evil.example", None, 403),
        ("localhost:evil.example", None, 403),
        ("localhost", "https://evil.example@localhost", 403),
        ("localhost", "https://localhost\r\nOrigin: https://evil.example", 403),
        ("localhost", "https://evil.example", 403),
        ("localhost", "https://localhost.evil.example", 403),
        ("localhost", "http://chat.example", 403),
        ("localhost", "https://chat.example.evil.example", 403),
        ("localhost", "null", 403),
        ("localhost", "http://[", 403),
    ],
)
def test_hosts_and_origins(server, host, origin, status):
    headers = [f"Host: {host}", *([f"Origin: {origin}"] if origin else [])]
    head = "\r\n".join(["GET /v1/models HTTP/1.1", *headers, "Connection: close", "", ""])
    assert server.raw(head.encode())[0] == status


def test_cors_headers_of_allowed_pages(server):
    preflight = {"Access-Control-Request-Method": "POST"}
    preflight["Access-Control-Request-Headers"] = "authorization,content-type,x-stainless-os"
    for origin, status in (("http://localhost:5173", 200), ("https://evil.example", 403)):
        answer, headers = server.head("OPTIONS", CHAT, Origin=origin, **preflight)
        assert answer == status
        allowed = headers.get("access-control-allow-headers", "").lower()
        assert ("authorization" in allowed) == (status == 200)
        assert headers.get("access-control-allow-origin") == (origin if status == 200 else None)
    _, headers = server.head("GET", "/v1/models", Origin="http://localhost:5173")
    assert headers["access-control-allow-origin"] == "http://localhost:5173"


def test_only_json_is_accepted(server):
    for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data"):
        check_error(server.ask("POST", TEXT, OK, **{"Content-Type": kind}), 415, kind)
    check_error(server.ask("POST", TEXT, OK, **{"Content-Encoding": "gzip"}), 415, "gzip")
    kind = {"Content-Type": "Application/JSON; charset=utf-8"}
    assert server.ask("POST", TEXT, b"\xef\xbb\xbf" + OK, **kind)[0] == 200


def test_paths_and_methods(server):
    for path in (TEXT, "/completions", TEXT + "/", "//v1/completions"):
        assert server.ask("POST", path, OK)[0] == 200
    assert server.head("HEAD", "/v1/models")[0] == server.head("HEAD", "/health/")[0] == 200
    assert server.ask("GET", "/v1/models?x=1")[0] == 200
    check_error(server.ask("POST", "/v1/embeddings", OK), 404, "/v1/embeddings")
    for path in ("/v2", "/v1/v1/models"):
        check_error(server.ask("GET", path), 404, "GET / lists the paths")
    for method in ("GET", "PUT", "DELETE", "BREW"):
        check_error(server.ask(method, CHAT), 405)
    assert "POST" in server.head("GET", CHAT)[1]["allow"]


@pytest.mark.parametrize("path", ["/", "/v1", "/v1/"])
def test_the_root_lists_the_paths(server, path):
    status, result = server.ask("GET", path)
    assert status == 200 and "/v1" in result["message"]
    assert "POST /v1/chat/completions" in result["paths"]


def test_a_path_cannot_inject_log_lines(server, caplog):
    check_error(server.ask("GET", "/v1/models/x%0A127.0.0.1%1B[2J"), 404)
    for _ in range(100):  # the line is written after the answer
        if result := [m for m in caplog.messages if "models/x%0A127.0.0.1%1B" in m]:
            break
        time.sleep(0.05)
    assert result[0].isprintable()


def test_bodies_are_read_within_the_limits(server):
    head = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n"
    chunked = head + b"Transfer-Encoding: chunked\r\n\r\n"
    assert server.raw(chunked + b"%x\r\n%s\r\n0\r\n\r\n" % (len(OK), OK))[0] == 200
    assert server.raw(message(OK, "Expect: 100-continue"), strip=b"HTTP/1.1 100")[0] == 200
    many = b"".join(b"3e8\r\n" + b" " * 1000 + b"\r\n" for _ in range(3))
    check_error(server.raw(chunked + many + b"0\r\n\r\n"), 413, "2000 bytes")
    check_error(server.ask("POST", TEXT, b" " * 3000), 413, "2000 bytes")
    check_error(server.raw(message(b"", length=10**15)), 413)
    for length in (10**30, "-1", "+5", "1_0", "x", "", "1.5"):
        assert server.raw(message(OK, length=length))[0] == 400
    assert server.raw(message(OK, "Transfer-Encoding: gzip"))[0] in (400, 501)
    for wrong in (b"nonsense\r\n\r\n", b"GET /" + b"x" * 70_000 + b" HTTP/1.1\r\n\r\n"):
        assert server.raw(wrong)[0] in (400, 414, 431)
    assert server.ask("POST", TEXT, OK)[0] == 200


def test_slow_clients_are_disconnected(server):
    def drip(data):
        for i in range(len(data)):
            time.sleep(0.1)
            yield data[i : i + 1]

    start = time.monotonic()
    check_error(server.raw(message(b'{"prompt"', length=50)), 408, "0.5 s")
    check_error(server.raw(message(b"", length=50), *drip(b'{"prompt"')), 408)
    with server.connect() as silent, server.connect() as half:
        half.sendall(b"POST /v1/completions HTTP/1.1\r\n")
        for connection in (silent, half):
            try:
                assert connection.recv(100) == b""
            except ConnectionResetError:
                pass
    assert time.monotonic() - start < 8
    assert server.ask("GET", "/health")[0] == 200


def test_connections_above_the_limit_are_closed(server):
    with ExitStack() as stack:
        crowd = [stack.enter_context(server.connect()) for _ in range(MAX_CONNECTIONS + 1)]
        crowd[-1].settimeout(10)
        try:
            assert crowd[-1].recv(1) == b""
        except ConnectionResetError:
            pass
    time.sleep(0.2)
    assert server.ask("GET", "/health")[0] == 200


def test_the_key_is_checked_before_the_body_is_read(model):
    key = "Schlüssel"
    with running(model, api_key=key) as server:
        for sent in ("", "Bearer", "Bearer ", f"Bearer {key}x", key, "Bearer Schlussel", "Basic x"):
            answer = server.ask("GET", "/v1/models", Authorization=sent.encode())
            check_error(answer, 401, "API key")
        check_error(server.ask("GET", "/v1/models"), 401, "missing API key")
        check_error(server.raw(message(b"", length=10**9)), 401)
        for scheme in ("Bearer", "bearer", "BEARER"):
            right = f"{scheme} {key}".encode()
            assert server.ask("GET", "/v1/models", Authorization=right)[0] == 200
        assert server.ask("GET", "/health")[0] == 200
        assert server.head("OPTIONS", CHAT, Origin="http://localhost")[0] != 500
