"""OpenAI's Python client: answers whole and streamed, log-probabilities, tools, JSON, responses."""

import json

from known import MODEL, SAID, SCHEMA, TOOL, TOOL_CALL, user
from openai import OpenAI

api = OpenAI(max_retries=0)
assert [model.id for model in api.models.list()] == [MODEL]
chat = {"model": MODEL, "messages": user("S")}
whole = api.chat.completions.create(**chat, logprobs=True, top_logprobs=2)
assert whole.choices[0].message.content == SAID
assert [len(token.top_logprobs) for token in whole.choices[0].logprobs.content] == [2] * 4
pieces = list(api.chat.completions.create(**chat, stream=True, logprobs=True))
assert "".join(piece.choices[0].delta.content or "" for piece in pieces) == SAID
told = [piece.choices[0].logprobs.content for piece in pieces if piece.choices[0].logprobs]
assert sum(map(len, told)) == 4
text = api.completions.create(model=MODEL, prompt="S", logprobs=1, echo=True)
assert text.choices[0].text == "S " + SAID

(call,) = (
    api.chat.completions.create(**chat | {"messages": user("T")}, tools=[TOOL])
    .choices[0]
    .message.tool_calls
)
assert (call.function.name, json.loads(call.function.arguments)) == TOOL_CALL
form = {"type": "json_schema", "json_schema": {"name": "r", "strict": True, "schema": SCHEMA}}
assert json.loads(
    api.chat.completions.create(**chat, response_format=form).choices[0].message.content
) == {"a": 1}
assert api.responses.create(model=MODEL, input="S").output_text == SAID
with api.responses.stream(model=MODEL, input="S") as stream:
    assert list(stream)[-1].type == "response.completed"
