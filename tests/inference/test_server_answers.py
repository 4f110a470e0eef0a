"""Answers of `serve` with models that write fixed texts."""

import json

import pytest
from scripted import LAST, TOOLS, write_scripted
from serving import CHAT, TEXT, check_error, running

from splitquant_mlx.errors import RecipeError
from splitquant_mlx.inference.server import model_names
from splitquant_mlx.inference.settings import ServeSettings
from splitquant_mlx.models.source import Source

CALL_END = "</tool_call>"
SCRIPTS = {
    "U": [b"Hi ", b"\xf0", b"\x9f", b"\xa6", b"\x99", b" and ", b"\xe6", b"\x97", b"\xa5", b"!"],
    "S": [b" alpha", b" be", b"ta ga", b"mma", b" delta", b" eps"],
    "T": [
        "<tool_call>",
        b'{"name": "weather", ',
        b'"arguments": {"city": "Oslo"}}',
        "</tool_call>",
    ],
    "R": ["<think>", b"hm, ", b"well\n", "</think>", b"\n", b"Yes."],
    "X": [b"plain ", b"prose"],
}
CITY = {
    "type": "object",
    "properties": {"city": {"enum": ["Oslo"]}},
    "required": ["city"],
    "additionalProperties": False,
}
WEATHER = {"type": "function", "function": {"name": "weather", "parameters": CITY}}
DONE = "data: [DONE]"


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    path = tmp_path_factory.mktemp("scripted") / "talker"
    with running(write_scripted(path, SCRIPTS, TOOLS), served_model_name=("the-talker",)) as server:
        yield server


def chunks(server, path, **body):
    """Return the chunks of a stream."""
    status, text = server.ask("POST", path, {"temperature": 0, **body, "stream": True})
    assert status == 200, text
    *events, end = [line for line in text.splitlines() if line]
    assert end == DONE
    return [json.loads(event.removeprefix("data: ")) for event in events]


def complete(server, prompt, stream=False, **body):
    """Return text and finish_reason of a completion."""
    body = {"prompt": prompt, "temperature": 0, **body}
    if not stream:
        choice = server.post(TEXT, **body)["choices"][0]
        return choice["text"], choice["finish_reason"]
    choices = [chunk["choices"][0] for chunk in chunks(server, TEXT, **body)]
    assert all(choice["finish_reason"] is None for choice in choices[:-1])
    return "".join(choice["text"] for choice in choices), choices[-1]["finish_reason"]


def say(server, text, stream=False, **body):
    """Return message and finish_reason of a chat completion."""
    body = {"messages": [{"role": "user", "content": text}], "temperature": 0, **body}
    if not stream:
        choice = server.post(CHAT, **body)["choices"][0]
        return choice["message"], choice["finish_reason"]
    message: dict = {}
    choices = [chunk["choices"][0] for chunk in chunks(server, CHAT, **body)]
    for delta in (choice["delta"] for choice in choices):
        for name, value in delta.items():
            message[name] = message[name] + value if name in message else value
    return message, choices[-1]["finish_reason"]


both = pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])


@both
def test_an_answer_ends_at_a_stop_string(server, stream):
    whole = " alpha beta gamma delta eps"
    assert complete(server, "S", stream) == (whole, "stop")
    for stop in ("beta gamma", "gam", "ta", " alpha", "delta eps", "s", "mma d"):
        assert complete(server, "S", stream, stop=stop) == (whole.split(stop)[0], "stop")
    assert complete(server, "S", stream, stop=["zzz", "gam", "ta"]) == (" alpha be", "stop")
    assert complete(server, "S", stream, stop="eps!") == (whole, "stop")
    assert complete(server, "S", stream, stop="gamma!", max_tokens=3) == (
        " alpha beta ga",
        "length",
    )
    assert say(server, "S", stream, stop="beta")[0]["content"] == "alpha "


@both
def test_characters_of_several_tokens_are_not_split(server, stream):
    assert complete(server, "U", stream) == ("Hi 🦙 and 日!", "stop")
    assert say(server, "U", stream)[0]["content"] == "Hi 🦙 and 日!"
    assert complete(server, "U", stream, stop="日") == ("Hi 🦙 and ", "stop")


@both
def test_tools(server, stream):
    message, finish = say(server, "T", stream, tools=[WEATHER])
    (call,) = message["tool_calls"]
    assert finish == "tool_calls" and not message["content"]
    assert call["function"] == {"name": "weather", "arguments": '{"city": "Oslo"}'}
    # a truncated call, or one without tools, is normal text
    message, finish = say(server, "T", stream, tools=[WEATHER], max_tokens=2)
    assert (message["content"], finish) == ('{"name": "weather", ', "length")
    message, finish = say(server, "T", stream, tools=[WEATHER], tool_choice="none")
    assert "tool_calls" not in message and finish == "stop"
    assert message["content"].startswith("<tool_call>")
    assert say(server, "X", stream, tools=[WEATHER])[0]["content"] == "plain prose"


@both
@pytest.mark.parametrize(
    "choice", ["required", {"type": "function", "function": {"name": "weather"}}]
)
def test_a_forced_tool_is_called(server, stream, choice):
    message, finish = say(server, "X", stream, tools=[WEATHER], tool_choice=choice)
    (call,) = message["tool_calls"]
    assert finish == "tool_calls" and call["function"]["name"] == "weather"
    assert json.loads(call["function"]["arguments"]) == {"city": "Oslo"}


@both
def test_json_follows_its_schema(server, stream):
    schema = {"type": "object", "properties": {"a": {"enum": [1, 22]}}, "required": ["a"]}
    schema["additionalProperties"] = False
    form = {"type": "json_schema", "json_schema": {"name": "r", "strict": True, "schema": schema}}
    message, finish = say(server, "X", stream, response_format=form)
    assert finish == "stop" and json.loads(message["content"])["a"] in (1, 22)
    bad = {"type": "json_schema", "json_schema": {"schema": {"type": "wizard"}}}
    body = {"messages": [{"role": "user", "content": "X"}], "response_format": bad}
    check_error(server.ask("POST", CHAT, body), 400, "unsupported JSON schema")


def test_json_without_llguidance_is_rejected(server, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "llguidance", None)
    body = {"messages": [{"role": "user", "content": "X"}]}
    for field in ({"response_format": {"type": "json_object"}}, {"tools": [WEATHER]}):
        forced = {"tool_choice": "required"} if "tools" in field else {}
        error = check_error(server.ask("POST", CHAT, {**body, **field, **forced}), 400)
        assert error["message"].endswith("need llguidance: pip install llguidance")


@pytest.mark.parametrize(
    ("lacks", "schema"),
    [
        ("{", {"type": "object"}),
        ("Q", {"type": "object", "properties": {"aQ": {"type": "integer"}}}),
        ("Q", {"type": "array", "items": {"enum": ["yes", "Q"]}}),
    ],
)
def test_json_with_characters_missing_from_the_vocabulary_is_rejected(tmp_path, lacks, schema):
    """llguidance skips characters without tokens, so that the answer would not be JSON."""
    model = write_scripted(tmp_path / "mute", SCRIPTS, TOOLS)
    settings = json.loads((model / "tokenizer.json").read_text())
    vocab = settings["model"]["vocab"].items()
    settings["model"]["vocab"] = {f"~~{i}" if lacks in name else name: i for name, i in vocab}
    (model / "tokenizer.json").write_text(json.dumps(settings))
    form = {"type": "json_schema", "json_schema": {"name": "r", "schema": schema}}
    plain = {"messages": [{"role": "user", "content": "X"}], "temperature": 0}
    with running(model) as server:
        body = {**plain, "response_format": form}
        error = check_error(server.ask("POST", CHAT, body), 400, "unsupported JSON schema")
        assert error["message"].endswith(f"no tokens for {lacks}")
        assert error["param"] == "response_format"
        assert server.ask("POST", CHAT, plain)[0] == 200


@both
def test_reasoning_is_separated(server, stream):
    message, _ = say(server, "R", stream, stop="\n")
    assert message["reasoning_content"] == "hm, well\n"
    assert message["content"] == "Yes."


def test_the_conversation_continues_with_the_answer(server):
    messages = [{"role": "user", "content": "T"}]
    message, _ = say(server, "T", tools=[WEATHER])
    messages += [message, {"role": "tool", "tool_call_id": "1", "content": "rain X"}]
    answer = server.post(CHAT, messages=messages, tools=[WEATHER])
    assert answer["choices"][0]["message"]["content"] == "plain prose"
    messages = [{"role": "assistant", "content": None}, {"role": "developer", "content": "X"}]
    assert server.post(CHAT, messages=messages)["choices"][0]["message"]["content"] == "plain prose"


def test_chat_log_probabilities(server):
    body = {"messages": [{"role": "user", "content": "U"}], "logprobs": True, "top_logprobs": 2}
    content = server.post(CHAT, **body)["choices"][0]["logprobs"]["content"]
    assert b"".join(bytes(token["bytes"]) for token in content).decode() == "Hi 🦙 and 日!"
    assert [token["token"] for token in content][:2] == ["Hi ", "bytes:\\xf0"]
    for token in content:
        best = token["top_logprobs"]
        assert len(best) == 2 and best[0]["logprob"] >= best[1]["logprob"]
        assert best[0] == {name: token[name] for name in ("token", "logprob", "bytes")}
    streamed = [chunk["choices"][0]["logprobs"] for chunk in chunks(server, CHAT, **body)]
    assert [token for part in streamed if part for token in part["content"]] == content
    stopped = server.post(CHAT, **body, stop="a")["choices"][0]["logprobs"]["content"]
    assert stopped == content[:6]  # the token where the stop string starts has text before it


def test_integer_logprobs_and_echo(server):
    answer = server.post(TEXT, prompt=[[83, 88], [85]], max_tokens=1, echo=True, logprobs=1)
    first, second = answer["choices"]
    assert (first["index"], first["text"], second["text"]) == (0, "SXplain ", "UHi ")
    logprobs = first["logprobs"]
    assert logprobs["tokens"] == ["S", "X", "plain "] and logprobs["text_offset"] == [0, 1, 2]
    assert logprobs["token_logprobs"][0] is logprobs["top_logprobs"][0] is None
    assert set(logprobs["top_logprobs"][1]) == {"X", " alpha"}  # itself and the most likely
    assert logprobs["top_logprobs"][2] == {"plain ": logprobs["token_logprobs"][2]}
    scored = server.post(TEXT, prompt="SX", max_tokens=0, echo=True, logprobs=1)["choices"][0]
    assert scored["text"] == "SX"
    assert scored["logprobs"]["token_logprobs"] == logprobs["token_logprobs"][:2]
    check_error(server.ask("POST", TEXT, {"prompt": "X", "max_tokens": 0}), 400, "without echo")


def test_usage_and_length(server):
    assert server.post(TEXT, prompt="SX", max_tokens=10**6)["usage"] == {
        "prompt_tokens": 2,
        "completion_tokens": 3,  # including the end-of-text token
        "total_tokens": 5,
        "prompt_tokens_details": {"cached_tokens": 0},
    }
    usage = {"stream_options": {"include_usage": True}, "max_completion_tokens": 1}
    *_, end = chunks(server, CHAT, messages=[{"role": "user", "content": "X"}], **usage)
    assert end["choices"] == [] and end["usage"]["completion_tokens"] == 1
    assert server.post(TEXT, prompt="X", max_tokens=-1)["choices"][0]["finish_reason"] == "stop"
    error = check_error(server.ask("POST", TEXT, {"prompt": "S" * 513}), 400, "1 to 511")
    assert error["code"] == "context_length_exceeded"
    check_error(server.ask("POST", TEXT, {"prompt": ""}), 400, "tokens, got 0")
    check_error(server.ask("POST", TEXT, {"prompt": [10**6]}), 400, "prompt: expected token ids")
    clamped = server.post(TEXT, prompt="X" * 510, max_tokens=100)
    assert clamped["usage"]["completion_tokens"] == 2


@pytest.mark.parametrize("name", ["the-talker", "talker", "talker/", "./talker"])
def test_names(server, name):
    assert server.post(TEXT, prompt="X", model=name)["model"] == "the-talker"
    assert server.ask("GET", f"/v1/models/{name}")[1]["id"] == "the-talker"


def test_a_gguf_file_is_also_named_without_its_suffix(tmp_path):
    file = tmp_path / "smol.Q4_1.gguf"
    source = Source(name="./models/smol.Q4_1.gguf", path=file, revision=None)
    names = model_names(source, ServeSettings())
    assert names[0] == "models/smol.Q4_1.gguf"
    assert {"smol.Q4_1.gguf", "smol.Q4_1", str(file)} <= set(names)


def test_an_unknown_model_name_is_answered_with_the_right_one(server):
    error = check_error(server.ask("POST", TEXT, {"prompt": "X", "model": "gpt-4"}), 404)
    assert "'the-talker'" in error["message"] and error["code"] == "model_not_found"
    assert "--served-model-name" in error["message"]
    check_error(server.ask("GET", "/v1/models/gpt-4"), 404)


def test_responses(server):
    answer = server.post("/v1/responses", input="S", max_output_tokens=3)
    assert answer["status"] == "incomplete"
    assert answer["output"][0]["content"][0]["text"] == "alpha beta ga"
    tool = {"type": "function", **WEATHER["function"]}
    answer = server.post("/v1/responses", input="T", tools=[tool])
    assert answer["status"] == "completed"
    assert [item["type"] for item in answer["output"]] == ["function_call"]


STRICT = "{% if messages[0].role == 'assistant' %}{{ raise_exception('Not so.') }}{% endif %}"


def test_an_error_of_the_template_is_reported(tmp_path):
    with running(write_scripted(tmp_path / "strict", {"X": [b"ok"]}, STRICT + LAST)) as server:
        body = {"messages": [{"role": "developer", "content": "X"}]}
        assert server.post(CHAT, **body)["choices"][0]["message"]["content"] == "ok"
        body = {"messages": [{"role": "assistant", "content": "X"}]}
        check_error(server.ask("POST", CHAT, body), 400, "Not so.")
        tools = {"messages": [{"role": "user", "content": "X"}], "tools": [WEATHER]}
        check_error(server.ask("POST", CHAT, tools), 400, "unsupported by this model")


@pytest.mark.parametrize("draft", [True, False], ids=["draft", "quantized cache"])
def test_sequential_answers_are_the_same(tmp_path, draft):
    path = write_scripted(tmp_path / "model", SCRIPTS, TOOLS)
    with pytest.raises(RecipeError, match="--kv-bits, --kv-group-size: unsupported by this model"):
        running(path, kv_bits=8).__enter__()
    settings: dict = {"kv_bits": 8, "quantized_kv_start": 0, "kv_group_size": 32}
    with running(path, **({"draft_model": str(path)} if draft else settings)) as server:
        for _ in range(2):  # from the prompt cache, the second time
            assert complete(server, "S") == (" alpha beta gamma delta eps", "stop")
            assert complete(server, "S", stop="gam") == (" alpha beta ", "stop")
            assert complete(server, "S", max_tokens=2) == (" alpha be", "length")
