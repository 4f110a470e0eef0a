"""LangChain's chat model: answers whole and streamed, log-probabilities, tools, JSON."""

from known import MODEL, SAID, SCHEMA, TOOL, TOOL_CALL
from langchain_core.messages import ToolMessage
from langchain_openai import ChatOpenAI

for responses in (False, True):
    model = ChatOpenAI(model=MODEL, stream_usage=True, use_responses_api=responses)
    assert model.invoke("S").text == SAID
    chunks = list(model.stream("S"))
    assert "".join(chunk.text for chunk in chunks) == SAID
    assert any(chunk.usage_metadata for chunk in chunks)
    able = model.bind_tools([TOOL["function"]])
    asked = able.invoke("T")
    (call,) = asked.tool_calls
    assert (call["name"], call["args"]) == TOOL_CALL
    result = ToolMessage("S", tool_call_id=call["id"])
    assert able.invoke([("user", "T"), asked, result]).text == SAID
    shape = {"title": "r", "description": "one", **SCHEMA}
    for method in ("json_schema", "function_calling"):
        assert model.with_structured_output(shape, method=method).invoke("S") == {"a": 1}
told = ChatOpenAI(model=MODEL, logprobs=True, top_logprobs=2).invoke("S")
assert len(told.response_metadata["logprobs"]["content"]) == 4
