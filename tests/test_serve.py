import http.client
import json
import re
import signal
import socket
import subprocess
import sys
import threading
from contextlib import contextmanager

import pytest

from splitquant_mlx.cli import run
from splitquant_mlx.loader import load

COMMAND = [sys.executable, "-m", "splitquant_mlx", "serve", "--device", "cpu", "--port", "0"]
STORY = "Once upon a time"


class Server:
    """Talk to a `serve` that runs as a process of its own."""

    def __init__(self, process: subprocess.Popen) -> None:
        assert process.stdout is not None and process.stderr is not None
        self.process = process
        line = process.stdout.readline()
        found = re.search(r"http://([\d.]+):(\d+)/v1", line)
        assert found, line + process.stderr.read()
        self.address = found[1], int(found[2])
        # Whatever is logged has to go somewhere, or the server waits for a reader.
        self.log: list[str] = []
        threading.Thread(target=self.log.extend, args=(process.stderr,), daemon=True).start()

    def ask(self, method: str, path: str, body: object = None) -> tuple[int, str]:
        connection = http.client.HTTPConnection(*self.address, timeout=30)
        try:
            connection.request(method, path, json.dumps(body))
            response = connection.getresponse()
            return response.status, response.read().decode()
        finally:
            connection.close()

    def post(self, path: str, **body: object) -> dict:
        status, text = self.ask("POST", path, body)
        assert status == 200, text
        return json.loads(text)


@contextmanager
def serving(*arguments: str):
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen([*COMMAND, *arguments], **pipes) as process:
        try:
            yield Server(process)
        finally:
            process.kill()


@pytest.fixture(scope="module")
def server(split_stories):
    with serving("--model", str(split_stories), "--max-tokens", "24") as server:
        yield server


@pytest.fixture(scope="module")
def continuation(split_stories):
    """Return what `generate` says after STORY."""
    from mlx_lm import generate

    return generate(*load(split_stories), STORY, max_tokens=24)


def test_models_are_listed(server, split_stories):
    status, text = server.ask("GET", "/v1/models")
    assert status == 200
    assert str(split_stories.resolve()) in [model["id"] for model in json.loads(text)["data"]]


def test_completions_say_what_generate_says(server, split_stories, continuation):
    # --max-tokens was passed on to mlx_lm.server.
    answer = server.post("/v1/completions", prompt=STORY)
    assert answer["choices"][0]["text"] == continuation
    listed = server.post("/v1/completions", prompt=STORY, model=str(split_stories.resolve()))
    assert listed["choices"][0]["text"] == continuation


def test_chat_completions_stream_the_same_text(server):
    body = {"messages": [{"role": "user", "content": "Tell me a story"}], "max_tokens": 12}
    whole = server.post("/v1/chat/completions", **body)["choices"][0]["message"]["content"]
    status, text = server.ask("POST", "/v1/chat/completions", body | {"stream": True})
    assert status == 200
    events = [line[6:] for line in text.splitlines() if line.startswith("data: ")]
    assert events.pop() == "[DONE]"
    deltas = [json.loads(event)["choices"][0]["delta"] for event in events]
    assert whole
    assert "".join(delta.get("content") or "" for delta in deltas) == whole


def test_a_model_that_is_not_there_is_an_answer(server, tmp_path):
    status, text = server.ask("POST", "/v1/completions", {"prompt": "a", "model": str(tmp_path)})
    assert status == 404
    assert str(tmp_path) in json.loads(text)["error"]


@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_it_quietly(split_stories, stop):
    with serving("--model", str(split_stories), "--log-level", "ERROR") as server:
        assert server.post("/v1/completions", prompt=STORY, max_tokens=3)
        server.process.send_signal(stop)
        assert server.process.wait(timeout=10) == 0
        assert not [line for line in server.log if "POST" not in line]


def test_ctrl_c_does_not_wait_for_the_answers_under_way(split_stories):
    body = {"prompt": STORY, "max_tokens": 1_000_000, "stream": True, "seed": 1}
    with serving("--model", str(split_stories)) as server:
        connection = http.client.HTTPConnection(*server.address, timeout=30)
        connection.request("POST", "/v1/completions", json.dumps(body))
        assert connection.getresponse().readline()
        server.process.send_signal(signal.SIGINT)
        assert server.process.wait(timeout=10) == 0
        connection.close()


def refusal(capsys, *arguments: str) -> str:
    threads = threading.active_count()
    assert run(["serve", "--device", "cpu", "--port", "0", *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert threading.active_count() == threads
    return captured.err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--model", "./missing"], "no such path: './missing'"),
        (["--port", "70000"], "--port: wanted 0 to 65535, got 70000"),
        (["--hots", "x"], "mlx_lm.server: unrecognized arguments: --hots x"),
        (["--temp", "warm"], "mlx_lm.server: argument --temp: invalid float value: 'warm'"),
        (["--adapter-path", "missing"], "adapter missing cannot be loaded"),
        (["--draft-model", "./missing"], "no such path: './missing'"),
    ],
)
def test_refusals_are_one_line_and_leave_no_thread(split_stories, capsys, options, message):
    assert message in refusal(capsys, "--model", str(split_stories), *options)


def test_a_broken_checkpoint_is_noticed_before_the_port_opens(split_stories, tmp_path, capsys):
    (tmp_path / "config.json").write_bytes((split_stories / "config.json").read_bytes())
    assert str(tmp_path) in refusal(capsys, "--model", str(tmp_path))


def test_a_port_in_use_is_named(split_stories, capsys):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        error = refusal(capsys, "--model", str(split_stories), "--port", str(port))
    assert f"cannot listen on 127.0.0.1, port {port}: " in error
