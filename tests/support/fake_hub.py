"""Serve, on the loopback, as much of the hub's API as getting and publishing a repo needs."""

import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from hashlib import sha256
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote

import pytest
from fake_hub_writes import Writes

COMMIT = "c0ffee" + "0" * 34
REVISIONS = {"main": COMMIT, "v1": COMMIT, COMMIT: COMMIT}
WHOLE = {
    "config.json": b'{"model_type": "llama"}',
    "model.safetensors": b"weights" * 1000,
    "tokenizer.model": b"pieces",
    "chat_template.jinja": b"{{ messages }}",
    "README.md": b"# model",
    "run.py": b"raise SystemExit",
    "pytorch_model.bin": b"pickle",
    "consolidated.safetensors": b"the same weights again",
    "onnx/config.json": b"{}",
}
INDEX = {
    "weight_map": {
        "a": "model-00001-of-00002.safetensors",
        "b": "model-00002-of-00002.safetensors",
    }
}
SHARDED = {
    "config.json": b"{}",
    "model.safetensors.index.json": json.dumps(INDEX).encode(),
    "model-00001-of-00002.safetensors": b"one",
    "model-00002-of-00002.safetensors": b"two",
}


@dataclass(frozen=True, kw_only=True)
class Failure:
    """Answer a request with an error; `code` is the hub's own header that says which."""

    status: int
    code: str = ""
    where: str = ""  # a part of the request's path; empty: every request
    message: str = ""


@dataclass
class FakeHub:
    repos: dict[str, dict[str, bytes]] = field(
        default_factory=lambda: {"org/whole": WHOLE, "org/sharded": SHARDED}
    )
    failure: Failure | None = None
    silent: bool = False  # accepts connections and never answers
    dribbling: bool = False  # sends a header now and then and never the last
    truncated: bool = False  # stops in the middle of a file's body
    stalled: str = ""  # the file in the middle of whose body it sends nothing more
    sent: list[str] = field(default_factory=list)  # files of which a body was asked for
    requests: list[str] = field(default_factory=list)
    tokens: set[str | None] = field(default_factory=set)
    role: str = "write"  # of the token
    chunk_size: int | None = None  # of a large file's parts; None takes files whole
    private: set[str] = field(default_factory=set)
    objects: dict[str, bytes] = field(default_factory=dict)  # large files, by their hash
    parts: dict[str, dict[int, bytes]] = field(default_factory=dict)
    stored: list[str] = field(default_factory=list)  # the hash of each part that was sent
    commits: list[tuple[str, str, str]] = field(default_factory=list)
    titles: list[str] = field(default_factory=list)
    received: list[tuple[str, bool, bytes]] = field(default_factory=list)

    def __enter__(self) -> "FakeHub":
        hub = self
        self.closing = threading.Event()

        class Handler(_Handler):
            server_hub = hub

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.endpoint = f"http://127.0.0.1:{self.server.server_address[1]}"
        self.thread = threading.Thread(target=self.server.serve_forever, args=(0.01,))
        self.thread.start()
        return self

    def files(self, repo: str, revision: str) -> dict[str, bytes] | None:
        """Return the files of a repo, of a branch `repos` has under repo@branch."""
        return self.repos.get(repo if revision in REVISIONS else f"{repo}@{revision}")

    def close(self) -> None:
        if not self.closing.is_set():
            self.closing.set()
            self.server.shutdown()
            self.server.server_close()
            self.thread.join()

    @contextmanager
    def instead_of_the_real_one(
        self, monkeypatch: pytest.MonkeyPatch, cache: Path
    ) -> Iterator[None]:
        """Point huggingface_hub, which reads its environment once, at this hub and `cache`."""
        from huggingface_hub import close_session, constants

        close_session()  # its client remembers the proxy settings
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        file_url = self.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "ENDPOINT", self.endpoint)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", file_url)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        # There hf_xet notes what it sent where; an earlier hub may have had this one's port.
        monkeypatch.setenv("HF_XET_CACHE", str(cache / "xet"))
        # Some releases ask for a list of agents first, once a process, and keep it in HF_HOME.
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_TELEMETRY", True)
        yield
        close_session()

    def __exit__(self, *exc_info: object) -> None:
        self.close()


class _Handler(Writes, BaseHTTPRequestHandler):
    server_hub: FakeHub

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        if self.refuse(path):
            return
        if path == "/api/whoami-v2":
            self.whoami()
        elif "/xet-write-token/" in path:
            self.xet_token()
        elif match := re.fullmatch(r"/api/models/(.+?)/discussions/1", path):
            self.discussion(match[1])
        elif match := re.fullmatch(r"/api/models/(.+?)/tree/(.+)", path):
            self.answer_tree(*match.groups())
        elif match := re.fullmatch(r"/api/models/(.+?)(?:/revision/(.+))?", path):
            self.answer_info(match[1], unquote(match[2] or "main"))
        elif match := re.fullmatch(r"/(.+?)/resolve/([^/]+)/(.+)", path):
            self.answer_file(match[1], match[3])
        else:
            self.answer(404)

    def refuse(self, path: str, body: bytes = b"") -> bool:
        """Note a request, and fail it if this hub is to."""
        hub = self.server_hub
        hub.requests.append(path)
        authorization = self.headers.get("Authorization")
        hub.tokens.add(authorization)
        del self.headers["Authorization"]
        seen = f"{self.command} {self.path}\n{self.headers}".encode() + body
        hub.received.append((path, authorization is not None, seen))
        if hub.silent:
            hub.closing.wait(30)
        elif hub.dribbling:
            self.dribble()
        elif hub.failure and hub.failure.where in path:
            message = {"error": hub.failure.message} if hub.failure.message else None
            self.answer_json(message, status=hub.failure.status, code=hub.failure.code)
        else:
            return False
        return True

    def dribble(self) -> None:
        self.wfile.write(b"HTTP/1.0 200 OK\r\n")
        with suppress(OSError):
            while not self.server_hub.closing.wait(0.05):
                self.wfile.write(b"X-Wait: more\r\n")

    def answer_info(self, repo: str, revision: str) -> None:
        files = self.server_hub.files(repo, revision)
        if repo not in self.server_hub.repos:
            self.answer(401, code="RepoNotFound")
        elif files is None:
            self.answer(404, code="RevisionNotFound")
        else:
            siblings = [{"rfilename": name} for name in files]
            self.answer_json({"id": repo, "sha": COMMIT, "siblings": siblings})

    def answer_tree(self, repo: str, revision: str) -> None:
        files = self.server_hub.repos[repo].items()
        self.answer_json(
            [
                {"type": "file", "path": name, "size": len(body), "oid": sha256(body).hexdigest()}
                for name, body in files
            ]
        )

    def answer_file(self, repo: str, name: str) -> None:
        body = self.server_hub.repos[repo][name]
        headers = {"X-Repo-Commit": COMMIT, "ETag": f'"{sha256(body).hexdigest()}"'}
        start = 0
        if match := re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", "")):
            start = int(match[1])
            headers["Content-Range"] = f"bytes {start}-{len(body) - 1}/{len(body)}"
        end = len(body) // 2 if self.server_hub.truncated else len(body)
        headers["Content-Length"] = str(len(body) - start)
        if self.command == "GET":
            self.server_hub.sent.append(name)
        stalled = name == self.server_hub.stalled and self.command == "GET"
        self.answer(
            206 if start else 200, headers=headers, body=body[start : end // 2 if stalled else end]
        )
        if stalled:
            self.wfile.flush()
            self.server_hub.closing.wait(30)

    def answer_json(self, value: object, *, status: int = 200, code: str = "") -> None:
        body = b"" if value is None else json.dumps(value).encode()
        headers = {"Content-Type": "application/json", "Content-Length": str(len(body))}
        self.answer(status, code=code, headers=headers, body=body)

    def answer(
        self, status: int, *, code: str = "", headers: dict[str, str] | None = None, body=b""
    ) -> None:
        self.send_response(status)
        for name, value in (headers or {"Content-Length": "0"}).items():
            self.send_header(name, value)
        if code:
            self.send_header("X-Error-Code", code)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)
