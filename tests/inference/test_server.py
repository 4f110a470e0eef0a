"""The command `serve`: startup, shutdown and invalid options."""

import json
import signal
import socket
import threading
import time

import pytest
from serving import STORY, TEXT, message, serving

from splitquant_mlx.cli import run
from splitquant_mlx.cli.serve import _warning
from splitquant_mlx.models.loader import load


def test_answers_equal_generate_and_ctrl_c_stops_the_server(split_stories, monkeypatch):
    """One process for all checks: starting one takes seconds."""
    from mlx_lm import generate

    monkeypatch.setenv("SPLITQUANT_API_KEY", "secret")
    options = ("--host", "0.0.0.0", "--max-tokens", "24", "--served-model-name", "stories")
    with serving("--model", str(split_stories), *options) as server:
        assert server.ask("GET", "/v1/models")[0] == 401
        assert server.log[0].startswith("warning: 0.0.0.0 can be reached over the network")
        key = {"Authorization": "Bearer secret"}
        status, answer = server.ask("POST", TEXT, {"prompt": STORY, "model": "stories"}, **key)
        assert status == 200, answer
        # `generate` drops the first space
        text = answer["choices"][0]["text"].lstrip()
        assert text == generate(*load(split_stories), STORY, max_tokens=24)
        body = {"prompt": STORY, "max_tokens": 8000, "logit_bias": {"2": -100}}
        with server.connect() as streamed, server.connect() as whole:
            for connection, stream in ((streamed, True), (whole, False)):
                data = json.dumps({**body, "stream": stream}).encode()
                connection.sendall(message(data, "Authorization: Bearer secret"))
            streamed.recv(1)
            start = time.monotonic()
            server.process.send_signal(signal.SIGINT)
            assert server.process.wait(timeout=10) == 0
            assert time.monotonic() - start < 2 + 2  # on a busy machine
            assert b"the server is shutting down" in b"".join(
                iter(lambda: streamed.recv(2**16), b"")
            )
    log = "".join(server.log)
    assert "POST /v1/completions 200, 5 prompt + 24 answer tokens, " in log
    assert "secret" not in log and "Traceback" not in log


def test_sigterm_stops_the_server_quietly(split_stories):
    with serving("--model", str(split_stories), "--log-level", "ERROR") as server:
        assert server.post(TEXT, prompt=STORY, max_tokens=3)
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(timeout=10) == 0
        assert not server.log


@pytest.mark.parametrize(
    ("url", "key", "word"),
    [
        ("http://0.0.0.0:80", None, "ANYONE who can reach 0.0.0.0"),
        ("http://[::]:80", None, "ANYONE who can reach ::"),
        ("http://192.168.1.2:80", "key", "unencrypted"),
    ],
)
def test_the_warning_is_stronger_without_a_key(url, key, word):
    assert word in (_warning(url, key) or "")


@pytest.mark.parametrize("url", ["http://127.0.0.1:80", "http://127.1.2.3:80", "http://[::1]:80"])
def test_there_is_no_warning_for_loopback(url):
    assert _warning(url, None) is None


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
        (["--port", "70000"], "--port: expected at most 65535, got 70000"),
        (["--hots", "x"], "No such option: --hots. Did you mean --host?"),
        (["--temp", "warm"], "--temp: expected a number, got 'warm'"),
        (["--api-key", ""], "--api-key: expected printable characters"),
        (["--api-key", "a\n"], "--api-key: expected printable characters"),
        (["--max-concurrent", "0"], "--max-concurrent: expected greater than 0, got 0"),
        (["--request-timeout", "nan"], "--request-timeout: expected a finite number, got nan"),
        (["--top-p", "7"], "--top-p: expected at most 1, got 7.0"),
        (["--max-tokens", "0"], "--max-tokens: expected greater than 0, got 0"),
        (["--log-level", "LOUD"], "--log-level: expected 'DEBUG', "),
        (["--chat-template-args", "[1]"], "--chat-template-args: expected a JSON object"),
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
    with socket.create_server(("127.0.0.1", 0)) as other_socket:
        port = other_socket.getsockname()[1]
        error = refusal(capsys, "--model", str(split_stories), "--port", str(port))
    assert f"cannot listen on 127.0.0.1, port {port}: " in error
