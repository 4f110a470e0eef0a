"""Validation of requests: invalid fields are named, valid requests pass, any JSON is handled."""

import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from splitquant_mlx.inference.protocol import APIError, ChatRequest, CompletionRequest, parse
from splitquant_mlx.inference.responses import ResponsesRequest

HELLO = [{"role": "user", "content": "hello"}]
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}


def chat(body: object, kind=ChatRequest):
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    return parse(raw, kind)


@pytest.mark.parametrize(
    "raw",
    [
        *(b"", b"hello", b"{", b"\xff\xfe{}", b"[]", b"null", b'"x"', b"[" * 100_000),
        *(b'{"messages": "\xc3"}', b'{"user": "\\ud800"}', b'{"temperature": NaN}'),
        *(b'{"temperature": -Infinity}', b'{"a":' * 50_000 + b"1" + b"}" * 50_000),
    ],
)
def test_anything_but_a_json_object_is_rejected(raw):
    with pytest.raises(APIError) as caught:
        chat(raw)
    assert caught.value.status == 400


@pytest.mark.parametrize(
    ("field", "values"),
    {
        "messages": [
            *([], "hello", ["hello"], [{"content": "x"}], [{"role": "wizard", "content": "x"}]),
            *([{"role": ["user"], "content": "x"}], [{"role": "User", "content": "x"}]),
            *([{"role": "user"}], [{"role": "user", "content": 7}]),
            *(
                [{"role": "user", "content": ["x"]}],
                [{"role": "user", "content": [{"type": "text"}]}],
            ),
            [
                {
                    "role": "user",
                    "content": [{"type": "image_url", "image_url": {"url": "http://x"}}],
                }
            ],
            [{"role": "assistant", "tool_calls": "x"}],
            [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}],
            [{"role": "assistant", "tool_calls": [{"function": {"arguments": "{}"}}]}],
        ],
        "temperature": [-0.1, 2.1, "1", True],
        "top_p": [1.1],
        "top_k": [1.5, -2],
        "min_p": [[]],
        "max_tokens": [-2, 1.5, "1", True],
        "max_completion_tokens": [-2],
        "logit_bias": [{"-1": 1}, {"x": 1}, {"1": "x"}, {"1": 101}, []],
        "logprobs": [1],
        "top_logprobs": [21],
        "seed": [0.5, "x"],
        "stop": [5, [""], "", [["x"]], ["x"] * 17, "x" * 257],
        "stream": ["yes", 1],
        "stream_options": [True, {"include_usage": 2}, {"x": True}],
        "n": [2, 0],
        "model": [5],
        "tools": [{}, ["x"], [{"type": "web_search"}]],
        "tool_choice": ["sometimes", "required", {"type": "function", "function": {"name": "g"}}],
        "response_format": [{"type": "xml"}, {"type": "json_schema"}, {}],
        "chat_template_kwargs": ["x"],
        "modalities": [["audio"]],
    }.items(),
)
def test_fields_of_the_wrong_type_or_size_are_named(field, values):
    for value in values:
        with pytest.raises(APIError) as caught:
            request = chat({"messages": HELLO, field: value})
            request.conversation(), request.schema()
        assert caught.value.status == 400
        error = caught.value.body["error"]
        assert error["param"] == field and str(caught.value).startswith(field)


@pytest.mark.parametrize(
    "field", ["guided_json", "grammar", "functions", "function_call", "suffix"]
)
def test_unknown_fields_that_may_change_the_answer_are_refused(field):
    with pytest.raises(APIError, match=f"{field}: unknown field"):
        chat({"messages": HELLO, field: "x"})
    assert chat({"messages": HELLO, field: None, "user": "x", "metadata": {}, "store": True})


def test_messages_are_converted_for_chat_templates():
    parts = [{"type": "text", "text": "a"}, {"type": "input_text", "text": "b"}]
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}
    messages = [
        {"role": "developer", "content": parts, "name": "me"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "1", "content": "sunny"},
        {"role": "assistant", "content": [{"type": "refusal", "refusal": "no"}]},
        {"role": "assistant", "content": None},
    ]
    result = chat(b"\xef\xbb\xbf" + json.dumps({"messages": messages}).encode()).conversation()
    assert [message["role"] for message in result][:2] == ["system", "assistant"]
    assert [message["content"] for message in result] == ["ab", "", "sunny", "no", ""]
    assert result[0]["name"] == "me" and result[2]["tool_call_id"] == "1"
    assert result[1]["tool_calls"][0]["function"]["arguments"] == {"x": 1}


def test_a_forced_tool_has_a_schema():
    def schema(choice):
        other = {"type": "function", "function": {"name": "g"}}
        return chat({"messages": HELLO, "tools": [TOOL, other], "tool_choice": choice}).schema()

    assert schema("none") is schema("auto") is None
    names = [s["properties"]["name"]["const"] for s in schema("required")["anyOf"]]
    assert names == ["f", "g"]
    (named,) = schema({"type": "function", "function": {"name": "g"}})["anyOf"]
    assert named["properties"]["name"] == {"const": "g"}


def test_a_response_is_converted_to_a_chat_completion():
    tool = {"type": "function", "name": "f", "parameters": {"type": "object"}, "strict": True}
    schema = {"type": "json_schema", "name": "r", "schema": {"type": "object"}}
    body = {
        "instructions": "Be brief.",
        "input": [
            {"role": "user", "content": [{"type": "input_text", "text": "Hi"}]},
            {"type": "function_call", "call_id": "1", "name": "f", "arguments": "{}"},
            {"type": "function_call_output", "call_id": "1", "output": "sunny"},
        ],
        "tools": [tool],
        "tool_choice": {"type": "function", "name": "f"},
        "text": {"format": schema},
        "max_output_tokens": 7,
    }
    request = chat(body, ResponsesRequest).chat()
    roles = [message["role"] for message in request.conversation()]
    assert roles == ["system", "user", "assistant", "tool"]
    assert request.max_tokens == 7 and request.forced_tools()[0].name == "f"
    assert request.response_format["json_schema"]["schema"] == {"type": "object"}
    for field, value in (
        ("previous_response_id", "x"),
        ("background", True),
        ("truncation", "auto"),
    ):
        with pytest.raises(APIError, match=field):
            chat({"input": "Hi", field: value}, ResponsesRequest)
    with pytest.raises(APIError, match="function"):
        chat({"input": "Hi", "tools": [{"type": "web_search"}]}, ResponsesRequest).chat()


NAMES = [*ChatRequest.model_fields, *CompletionRequest.model_fields, *ResponsesRequest.model_fields]
NAMES += ["role", "content", "type", "function", "name", "arguments", "text"]
JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.sampled_from(["", "m", "user", "assistant", "message", "function", "text", "1", "é\n"]),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(NAMES), inner, max_size=3)
    ),
    max_leaves=8,
)


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    st.dictionaries(st.sampled_from(NAMES), JSON, max_size=4),
    st.sampled_from([ChatRequest, CompletionRequest, ResponsesRequest]),
)
def test_any_json_is_rejected_or_parsed(body, kind):
    given = {"messages": HELLO, "prompt": "x", "input": "x", **body}
    try:
        request = chat({k: v for k, v in given.items() if k in kind.model_fields}, kind)
        if isinstance(request, ResponsesRequest):
            request = request.chat()
        if isinstance(request, ChatRequest):
            request.conversation(), request.schema()
    except APIError as refusal:
        assert refusal.status == 400
        assert "\n" not in str(refusal)
