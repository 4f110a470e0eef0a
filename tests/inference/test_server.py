"""`serve` as a command: how it starts, what it passes on, how it stops."""

import http.client
import inspect
import json
import signal
import socket
import threading

import pytest
from serving import CHAT, STORY, TEXT, serving

from splitquant_mlx.cli import run
from splitquant_mlx.cli.serve import _warning
from splitquant_mlx.models.loader import load


@pytest.fixture(scope="module")
def server(split_stories):
    with serving("--model", str(split_stories), "--max-tokens", "24") as server:
        yield server


@pytest.fixture(scope="module")
def continuation(split_stories):
    """Return what `generate` says after STORY."""
    from mlx_lm import generate

    return generate(*load(split_stories), STORY, max_tokens=24)


def test_the_model_is_listed_and_nothing_else(server, split_stories):
    status, models = server.ask("GET", "/v1/models")
    assert status == 200
    assert [model["id"] for model in models["data"]] == [str(split_stories)]
    assert server.ask("GET", "/health") == (200, {"status": "ok"})


def test_completions_say_what_generate_says(server, split_stories, continuation):
    # --max-tokens was passed on to mlx_lm.server.
    answer = server.post(TEXT, prompt=STORY)
    assert answer["choices"][0]["text"] == continuation
    for name in (str(split_stories), "default_model"):
        named = server.post(TEXT, prompt=STORY, model=name)
        assert named["choices"][0]["text"] == continuation
        assert named["model"] == str(split_stories)


@pytest.mark.parametrize("seed", [None, 1])
def test_an_answer_can_be_continued(server, split_stories, seed):
    """A prompt that is an earlier one with its answer has nothing left to compute, almost."""
    from mlx_lm import generate

    # the first space of an answer is not part of its text
    start = "One day, a" if seed else "The sun was"
    answer = server.post(TEXT, prompt=start, max_tokens=4, seed=seed)
    begun = f"{start} {answer['choices'][0]['text']}"
    more = server.post(TEXT, prompt=begun, max_tokens=8, seed=seed)
    assert more["choices"][0]["text"] == generate(*load(split_stories), begun, max_tokens=8)
    details = more["usage"]["prompt_tokens_details"]
    assert details["cached_tokens"] == more["usage"]["prompt_tokens"] - 1


def test_chat_completions_stream_the_same_text(server):
    body = {"messages": [{"role": "user", "content": "Tell me a story"}], "max_tokens": 12}
    whole = server.post(CHAT, **body)["choices"][0]["message"]["content"]
    status, text = server.ask("POST", CHAT, body | {"stream": True})
    assert status == 200
    events = [line[6:] for line in text.splitlines() if line.startswith("data: ")]
    assert events.pop() == "[DONE]"
    deltas = [json.loads(event)["choices"][0]["delta"] for event in events]
    assert whole
    assert "".join(delta.get("content") or "" for delta in deltas) == whole


def test_ctrl_c_does_not_wait_for_the_answers_under_way(split_stories):
    body = {"prompt": STORY, "max_tokens": 1_000_000, "stream": True, "seed": 1}
    with serving("--model", str(split_stories), "--max-tokens-limit", "1000000") as server:
        connection = http.client.HTTPConnection(*server.address, timeout=30)
        connection.request("POST", TEXT, json.dumps(body))
        assert connection.getresponse().readline()
        server.process.send_signal(signal.SIGINT)
        assert server.process.wait(timeout=10) == 0
        connection.close()


def test_sigterm_stops_it_quietly(split_stories):
    with serving("--model", str(split_stories), "--log-level", "ERROR") as server:
        assert server.post(TEXT, prompt=STORY, max_tokens=3)
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(timeout=10) == 0
        assert not [line for line in server.log if "POST" not in line]


def test_the_key_comes_from_the_environment_and_a_network_is_warned_of(split_stories, monkeypatch):
    monkeypatch.setenv("SPLITQUANT_API_KEY", "secret")
    with serving("--model", str(split_stories), "--host", "0.0.0.0") as server:
        assert server.ask("GET", "/v1/models")[0] == 401
        assert server.ask("GET", "/v1/models", Authorization="Bearer secret")[0] == 200
        assert server.log[0].startswith("warning: 0.0.0.0 can be reached over the network")
        assert "secret" not in "".join(server.log)


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
def test_loopback_is_not_warned_of(url):
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
        (["--port", "70000"], "--port: wanted 0 to 65535, got 70000"),
        (["--hots", "x"], "mlx_lm.server: unrecognized arguments: --hots x"),
        (["--temp", "warm"], "mlx_lm.server: argument --temp: invalid float value: 'warm'"),
        (["--api-key", ""], "--api-key: wanted printable characters"),
        (["--api-key", "a\n"], "--api-key: wanted printable characters"),
        (["--max-concurrent", "0"], "--max-concurrent: wanted a number above 0, got 0"),
        (["--request-timeout", "nan"], "--request-timeout: wanted a number above 0, got nan"),
        (["--top-p", "7"], "with these options: top_p: wanted a number from 0 to 1, got 7.0"),
        (["--max-tokens", "0"], "max_tokens: wanted an integer from 1 to 8192, got 0"),
        (["--adapter-path", "missing"], "adapter missing cannot be loaded"),
        (["--draft-model", "./missing"], "no such path: './missing'"),
    ],
)
def test_refusals_are_one_line_and_leave_no_thread(split_stories, capsys, options, message):
    assert message in refusal(capsys, "--model", str(split_stories), *options)


def test_what_is_used_of_mlx_lm_is_there():
    """Not all of it is public; a version without one of these would fail in obscure ways."""
    from mlx_lm import server

    def parameters(function):
        return list(inspect.signature(function).parameters)

    for name in (
        "load",
        "sharded_load",
        "run",
        "main",
        "argparse",
        "Thread",
        "Response",
        "GenerationContext",
    ):
        assert hasattr(server, name), name
    assert parameters(server.ResponseGenerator._generate) == ["self"]
    assert parameters(server.ResponseGenerator._tokenize)[:4] == [
        "self",
        "tokenizer",
        "request",
        "args",
    ]
    assert parameters(server.ResponseGenerator._serve_single)[:2] == ["self", "request"]
    assert "_is_distributed" in inspect.getsource(server.ResponseGenerator.__init__)
    assert parameters(server.APIHandler._set_completion_headers) == ["self", "status_code"]
    assert "budget" in parameters(server.TimeBudget)
    assert callable(server.GenerationContext.stop)
    # 0.31 takes stop words out of the text in one place, later versions in another
    assert hasattr(server, "_process_control_tokens") != hasattr(server, "TextStateMachine")


def test_a_broken_checkpoint_is_noticed_before_the_port_opens(split_stories, tmp_path, capsys):
    (tmp_path / "config.json").write_bytes((split_stories / "config.json").read_bytes())
    assert str(tmp_path) in refusal(capsys, "--model", str(tmp_path))


def test_a_port_in_use_is_named(split_stories, capsys):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        error = refusal(capsys, "--model", str(split_stories), "--port", str(port))
    assert f"cannot listen on 127.0.0.1, port {port}: " in error
