"""LiteLLM: chat and text completions, streamed or not, log-probabilities, tools, JSON."""

import json

import litellm
from known import MODEL, SAID, SCHEMA_FORM, TOOL, TOOL_CALL, user

NAME = f"openai/{MODEL}"
chat = litellm.completion(NAME, user("S"), temperature=0, logprobs=True, top_logprobs=2)
assert chat.choices[0].message.content == SAID and chat.usage.completion_tokens == 5
assert len(chat.choices[0].logprobs.content) == 4
stream = litellm.completion(NAME, user("S"), stream=True, stream_options={"include_usage": True})
assert "".join(p.choices[0].delta.content or "" for p in stream if p.choices) == SAID
text = litellm.text_completion(model=f"text-completion-openai/{MODEL}", prompt="S")
assert text.choices[0].text.strip() == SAID
(call,) = litellm.completion(NAME, user("T"), tools=[TOOL]).choices[0].message.tool_calls
assert (call.function.name, json.loads(call.function.arguments)) == TOOL_CALL
forced = litellm.completion(NAME, user("S"), response_format=SCHEMA_FORM)
assert json.loads(forced.choices[0].message.content) == {"a": 1}
