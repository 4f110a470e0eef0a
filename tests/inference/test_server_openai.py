"""`serve` and OpenAI's Python client."""

import openai
import pytest
from scripted import TOOLS, write_scripted
from serving import running

SCRIPTS = {
    "S": [b" alpha", b" be", b"ta ga", b"mma"],
    "T": ["<tool_call>", b'{"name": "f", ', b'"arguments": {"x": 1}}', "</tool_call>"],
}
FUNCTION = {"name": "f", "parameters": {"type": "object"}}


@pytest.fixture(scope="module")
def api(tmp_path_factory):
    path = write_scripted(tmp_path_factory.mktemp("scripted") / "talker", SCRIPTS, TOOLS)
    with running(path, api_key="secret") as server:
        with openai.OpenAI(base_url=f"{server.url}/v1", api_key="secret", max_retries=0) as api:
            yield api


def user(text):
    return [{"role": "user", "content": text}]


def test_answers_whole_and_streamed(api):
    (model,) = api.models.list()
    assert api.models.retrieve("talker").id == model.id
    chat = {"model": "talker", "messages": user("S"), "logprobs": True}
    whole = api.chat.completions.create(**chat)
    assert whole.choices[0].message.content == "alpha beta gamma"
    assert whole.choices[0].finish_reason == "stop" and whole.usage.completion_tokens == 5
    assert len(whole.choices[0].logprobs.content) == 4
    options = {"stream": True, "stream_options": {"include_usage": True}}
    *pieces, end = api.chat.completions.create(**chat, **options)
    text = "".join(piece.choices[0].delta.content or "" for piece in pieces)
    assert text == "alpha beta gamma" and end.usage.total_tokens == whole.usage.total_tokens
    stream = api.completions.create(model="talker", prompt="S", stream=True, stop=["gam"])
    assert "".join(piece.choices[0].text for piece in stream) == " alpha beta "


def test_tools_whole_and_streamed(api):
    request = {"model": "talker", "messages": user("T")}
    request["tools"] = [{"type": "function", "function": FUNCTION}]
    (call,) = api.chat.completions.create(**request).choices[0].message.tool_calls
    assert (call.function.name, call.function.arguments) == ("f", '{"x": 1}')
    with api.chat.completions.stream(**request) as stream:
        final = stream.get_final_completion()
    assert final.choices[0].message.tool_calls[0].function.arguments == '{"x": 1}'
    again = [*request["messages"], final.choices[0].message.to_dict()]
    again += [{"role": "tool", "tool_call_id": call.id, "content": "S"}]
    answer = api.chat.completions.create(**{**request, "messages": again})
    assert answer.choices[0].message.content == "alpha beta gamma"


def test_responses_whole_and_streamed(api):
    whole = api.responses.create(model="talker", input="S")
    assert (whole.output_text, whole.status) == ("alpha beta gamma", "completed")
    tool = {"type": "function", "strict": False, **FUNCTION}
    for text, tools in (("S", []), ("T", [tool])):
        with api.responses.stream(model="talker", input=text, tools=tools) as stream:
            kinds = [event.type for event in stream]
            final = stream.get_final_response()
        assert kinds[0] == "response.created" and kinds[-1] == "response.completed"
        if tools:
            assert final.output[0].name == "f" and final.output[0].arguments == '{"x": 1}'
            item = final.output[0].to_dict()
            output = {"type": "function_call_output", "call_id": item["call_id"], "output": "S"}
            again = [*user("T"), item, output]
            assert api.responses.create(model="talker", input=again).output_text.endswith("gamma")
        else:
            assert kinds.count("response.output_text.done") == 1
            assert final.output_text == "alpha beta gamma"


def test_errors_map_to_the_clients_exceptions(api):
    def refusal(kind, **changes):
        with pytest.raises(kind) as caught:
            api.chat.completions.create(**{"model": "talker", "messages": user("S"), **changes})
        return caught.value

    assert refusal(openai.NotFoundError, model="gpt").code == "model_not_found"
    assert refusal(openai.BadRequestError, n=2).param == "n"
    assert refusal(openai.BadRequestError, max_tokens=0).param == "max_tokens"
    long = refusal(openai.BadRequestError, messages=user("S" * 600))
    assert long.code == "context_length_exceeded"
    with pytest.raises(openai.AuthenticationError) as caught:
        api.with_options(api_key="Secret").models.list()
    assert caught.value.code == "invalid_api_key"
    with pytest.raises(openai.NotFoundError):
        api.embeddings.create(model="talker", input="x")
