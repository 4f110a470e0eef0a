"""`serve` and requests that are wrong: an error in OpenAI's form, and the server goes on."""

import json
import time

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from serving import CHAT, STORY, TEXT, check_error, message, serve_to
from splitquant_mlx.inference.fields import CHAT as CHAT_FIELDS
from splitquant_mlx.inference.fields import COMMON, Refusal
from splitquant_mlx.inference.fields import TEXT as TEXT_FIELDS
from splitquant_mlx.inference.request import Limits, Served, check_request
from tiny import write_checkpoint

SERVED = Served(
    name="m",
    vocab_size=100,
    limits=Limits(max_tokens_limit=50),
    defaults={"max_tokens": 50, "temperature": 0.5},
    template_parameters={"chat_template"},
)
HELLO = [{"role": "user", "content": "hello"}]


def check(body: object, *, chat: bool = True) -> dict:
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    return check_request(raw, chat=chat, served=SERVED)


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"hello",
        b"{",
        b"\xff\xfe{}",
        b'{"messages": "\xc3"}',
        b'{"prompt": "\\ud800"}',
        b'{"temperature": NaN}',
        b'{"temperature": -Infinity}',
        b'{"seed": ' + b"9" * 5000 + b"}",
        b"[" * 100_000,
        b'{"a":' * 50_000 + b"1" + b"}" * 50_000,
        b"[]",
        b"null",
        b'"x"',
    ],
)
def test_what_is_no_json_object_is_refused(raw):
    with pytest.raises(Refusal) as caught:
        check(raw)
    assert caught.value.status == 400


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("messages", []),
        ("messages", "hello"),
        ("messages", ["hello"]),
        ("messages", [{"content": "x"}]),
        ("messages", [{"role": "wizard", "content": "x"}]),
        ("messages", [{"role": ["user"], "content": "x"}]),
        ("messages", [{"role": "user"}]),
        ("messages", [{"role": "user", "content": 7}]),
        ("messages", [{"role": "user", "content": ["x"]}]),
        ("messages", [{"role": "user", "content": [{"type": "text"}]}]),
        ("messages", [{"role": "assistant", "tool_calls": "x"}]),
        ("temperature", -0.1),
        ("temperature", 2.1),
        ("temperature", "1"),
        ("temperature", True),
        ("top_p", 1.1),
        ("top_k", 1.5),
        ("top_k", -1),
        ("min_p", []),
        ("max_tokens", 0),
        ("max_tokens", 51),
        ("max_tokens", 10**30),
        ("max_tokens", True),
        ("max_completion_tokens", 51),
        ("xtc_threshold", 0.6),
        ("repetition_context_size", 10**12),
        ("logit_bias", {"100": 1}),
        ("logit_bias", {"-1": 1}),
        ("logit_bias", {"x": 1}),
        ("logit_bias", {"1": "x"}),
        ("logit_bias", []),
        ("logprobs", 1),
        ("top_logprobs", 12),
        ("seed", 2**64),
        ("seed", 0.5),
        ("stop", 5),
        ("stop", [""]),
        ("stop", [["x"]]),
        ("stop", ["x"] * 17),
        ("stop", "x" * 257),
        ("stream", "yes"),
        ("stream_options", True),
        ("stream_options", {"include_usage": 2}),
        ("n", 2),
        ("tools", {}),
        ("tools", ["x"]),
        ("role_mapping", {"user": 1}),
        ("chat_template_kwargs", "x"),
        ("chat_template_kwargs", {"chat_template": "{{ 1 }}"}),
        ("num_draft_tokens", 0),
        ("model", 5),
    ],
)
def test_fields_of_the_wrong_type_or_size_are_named(field, value):
    with pytest.raises(Refusal) as caught:
        check({"messages": HELLO, field: value})
    assert caught.value.status == 400
    assert caught.value.error["param"].split("[")[0].split(".")[0] == field


@pytest.mark.parametrize("value", ["1e999", "-1e999", "1" + "0" * 400])
def test_huge_numbers_are_refused(value):
    with pytest.raises(Refusal, match="temperature: wanted a number from 0 to 2"):
        check(b'{"prompt": "x", "temperature": %s}' % value.encode(), chat=False)


@pytest.mark.parametrize("prompt", [5, ["a", "b"], [1, 2], {}, None])
def test_a_prompt_is_one_string(prompt):
    with pytest.raises(Refusal, match="prompt: "):
        check({"prompt": prompt}, chat=False)


@pytest.mark.parametrize("field", ["image_url", "input_image", "image"])
def test_pictures_are_not_fetched(field):
    part = {"type": field, "image_url": {"url": "http://127.0.0.1:9/"}}
    with pytest.raises(Refusal, match="wanted parts of type text"):
        check({"messages": [{"role": "user", "content": [part]}]})


@pytest.mark.parametrize(
    ("body", "status"),
    [
        ({"model": "/etc"}, 404),
        ({"model": "mlx-community/other"}, 404),
        ({"draft_model": "/etc"}, 400),
        ({"adapters": "/etc"}, 400),
    ],
)
def test_nothing_is_loaded_on_request(body, status):
    with pytest.raises(Refusal) as caught:
        check({"messages": HELLO, **body})
    assert caught.value.status == status


def test_what_is_right_passes_as_it_is():
    body = {"messages": HELLO, "temperature": 1.5, "logit_bias": {"99": -100}, "stop": "x"}
    checked = check({**body, "top_p": None, "top_k": 100, "xtc_probability": 1, "unknown": [1]})
    assert checked == {
        **body,
        "model": "m",
        "max_tokens": 50,
        "stop": ["x"],
        "top_k": 0,
        "xtc_probability": 1.0,
        "unknown": [1],
    }
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    call = {"id": "1", "function": {"name": "f", "arguments": "{}"}}
    messages = [
        {"role": "user", "content": parts, "name": "x"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
    ]
    assert [m["content"] for m in check({"messages": messages})["messages"]] == ["ab", ""]


NAMES = [*COMMON, *CHAT_FIELDS, *TEXT_FIELDS, "model", "max_tokens", "adapters", "role", "content"]
JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.sampled_from(["", "m", "user", "text", "1", "é\n", "\ud800"]),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(NAMES), inner, max_size=3)
    ),
    max_leaves=8,
)


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.dictionaries(st.sampled_from(NAMES), JSON, max_size=4), st.booleans())
def test_any_json_is_refused_or_made_fit(body, chat):
    body = {"messages": HELLO, "prompt": "x", **body}
    try:
        checked = check(body, chat=chat)
    except Refusal as refusal:
        assert refusal.status in (400, 404)
        assert str(refusal).isprintable()
        return
    assert checked["model"] == "m" and 1 <= checked["max_tokens"] <= 50
    assert check(checked, chat=chat) == checked


def test_over_http_every_error_is_an_answer(split_stories):
    head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\n"
    ok = json.dumps({"prompt": STORY, "max_tokens": 2}).encode()

    def client(server):
        ask, raw = server.ask, server.raw
        check_error(ask("POST", TEXT, b"{"), 400, "not JSON")
        check_error(ask("POST", CHAT, {}), 400, "messages: missing")
        check_error(ask("POST", TEXT, {"prompt": "x", "seed": 1, "stop": 5}), 400, "stop")
        check_error(ask("POST", "/v1/embeddings", {}), 404, "/v1/embeddings")
        check_error(ask("GET", "/nowhere"), 404)
        check_error(ask("GET", "/v1/models/other"), 404)
        check_error(ask("GET", CHAT), 405, "wants POST")
        for method in ("POST", "PUT", "DELETE", "PATCH", "BREW"):
            check_error(ask(method, "/v1/models"), 405)
        assert ask("HEAD", "/v1/models")[0] == 405
        assert ask("GET", "/v1/models?x=1")[0] == 200
        assert ask("OPTIONS", CHAT)[0] == 204
        check_error(ask("POST", TEXT, b" " * 3000), 413, "2000 bytes")
        check_error(raw(message(b"", length=10**30)), 413)
        check_error(raw(head + b"\r\n" + ok), 411)
        chunked = b"Transfer-Encoding: chunked\r\n\r\n"
        check_error(raw(head + chunked + b"2\r\n{}\r\n0\r\n\r\n"), 411)
        check_error(raw(message(ok, "Transfer-Encoding: chunked")), 411)
        check_error(raw(message(ok, "Content-Length: 5")), 400, "Content-Length")
        for length in ("-1", "+5", "1_0", "x", "", "1.5"):
            check_error(raw(message(ok, length=length)), 400, "Content-Length")
        check_error(raw(message(b"{}", length=50), half_close=True), 400, "2 of 50")
        check_error(raw(b"nonsense\r\n\r\n"), 400)
        check_error(raw(b"GET /v1/models HTTP/9.9\r\n\r\n"), 505)
        check_error(raw(b"GET /" + b"x" * 70_000 + b" HTTP/1.1\r\n\r\n"), 414)
        check_error(raw(head + b"X: y\r\n" * 200 + b"\r\n"), 431)
        check_error(raw(head + b"X: " + b"y" * 70_000 + b"\r\n\r\n"), 431)
        assert server.post(TEXT, prompt=STORY, max_tokens=2)["usage"]["completion_tokens"] == 2

    serve_to(client, split_stories, max_request_bytes=2000)


def test_a_prompt_of_no_tokens_is_refused(tmp_path):
    def client(server):
        for seed in (None, 1):
            body = {"prompt": " ", "seed": seed, "max_tokens": 1}
            check_error(server.ask("POST", TEXT, body), 400, "the prompt has 0 tokens")

    serve_to(client, write_checkpoint(tmp_path / "no-bos"))


def test_slow_requests_run_out_of_time(split_stories):
    def drip(data):
        for i in range(len(data)):
            time.sleep(0.05)
            yield data[i : i + 1]

    def client(server):
        began = time.monotonic()
        check_error(server.raw(message(b'{"prompt"', length=50)), 408, "0.4 s")
        check_error(server.raw(message(b"", length=50), *drip(b'{"prompt"')), 408)
        with server.connect() as connection:
            connection.sendall(b"POST /v1/completions HTTP/1.1\r\n")
            assert connection.recv(100) == b""
        assert time.monotonic() - began < 5
        assert server.ask("GET", "/health")[0] == 200

    serve_to(client, split_stories, request_timeout_s=0.4)


def test_the_key_is_asked_for_before_anything_is_read(split_stories):
    def client(server):
        models, key = "/v1/models", "Schlüssel"
        for sent in ("", "Bearer", "Bearer ", f"Bearer {key}x", key, "Bearer Schlussel"):
            check_error(server.ask("GET", models, Authorization=sent), 401, "API key")
        check_error(server.ask("GET", models), 401, "missing API key")
        check_error(server.raw(message(b"", length=10**9)), 401)
        check_error(server.ask("GET", "/nowhere"), 401)
        right = f"Bearer {key}".encode().decode("latin-1")
        assert server.ask("GET", models, Authorization=right)[0] == 200
        assert server.ask("GET", "/health")[0] == 200

    serve_to(client, split_stories, api_key="Schlüssel")
