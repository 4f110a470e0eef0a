"""OpenAI's /v1/responses by way of chat completions: text and function calls."""

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import Field

from splitquant_mlx.inference.answers import Answer, Planned
from splitquant_mlx.inference.endpoints import (
    Chunk,
    Chunks,
    Endpoint,
    chat_deltas,
    new_id,
    usage_of,
)
from splitquant_mlx.inference.protocol import ChatRequest, Strict, refuse, text_of, validate


class ResponsesRequest(Strict):
    """A request of /v1/responses."""

    input: str | list[dict[str, Any]]
    model: str | None = None
    instructions: str | None = None
    stream: bool = False
    background: Literal[False] = False
    truncation: Literal["disabled"] = "disabled"
    max_output_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: float | None = None
    top_p: float | None = None
    tools: list[dict[str, Any]] = Field([])
    tool_choice: str | dict[str, Any] = "auto"
    parallel_tool_calls: bool = True
    text: dict[str, Any] = Field({})
    reasoning: dict[str, Any] = Field({})

    def chat(self) -> ChatRequest:
        """Return the chat completion that asks for the same."""
        if unknown := set(self.text) - {"format", "verbosity"}:
            refuse("text", "format", sorted(unknown))
        items = [{"role": "user", "content": self.input}]
        items = items if isinstance(self.input, str) else self.input
        if self.instructions:
            items = [{"role": "system", "content": self.instructions}, *items]
        form, choice = self.text.get("format") or {"type": "text"}, self.tool_choice
        fields = {
            "messages": _messages(items),
            "max_tokens": self.max_output_tokens,
            "temperature": self.temperature,
            "top_p": self.top_p,
            "tools": [_nested(tool, "function") for tool in self.tools],
            "tool_choice": _nested(choice, "function") if isinstance(choice, dict) else choice,
            "parallel_tool_calls": self.parallel_tool_calls,
            "response_format": _nested(form, "json_schema"),
            "reasoning_effort": self.reasoning.get("effort"),
        }
        return validate(fields, ChatRequest)


def _nested(flat: dict[str, Any], kind: str) -> dict[str, Any]:
    """Return what chat completions nest under the name of its type."""
    rest = {name: value for name, value in flat.items() if name != "type"}
    return {"type": flat.get("type"), kind: rest} if rest else flat


def _messages(items: list[dict[str, Any]]) -> list[dict[str, Any]]:
    messages: list[dict[str, Any]] = []
    for i, item in enumerate(items):
        kind = item.get("type", "message")
        if kind == "message":
            messages.append({"role": item.get("role"), "content": item.get("content")})
        elif kind == "function_call":
            function = {name: item.get(name) for name in ("name", "arguments")}
            call = {"id": item.get("call_id"), "type": "function", "function": function}
            if not messages or messages[-1]["role"] != "assistant":
                messages.append({"role": "assistant", "content": None})
            messages[-1].setdefault("tool_calls", []).append(call)
        elif kind == "function_call_output":
            said = text_of(item.get("output"), f"input[{i}].output")
            name = item.get("call_id")
            messages.append({"role": "tool", "tool_call_id": name, "content": said})
        elif kind != "reasoning":  # which no chat template asks for
            refuse(f"input[{i}].type", "message, function_call or function_call_output", kind)
    return messages


class Responses(Endpoint):
    """/v1/responses."""

    kind = ResponsesRequest
    object, prefix = "response", "resp_"
    named_events = True

    def plan(self, request: ResponsesRequest) -> list[Planned]:
        """Return the one answer to compute."""
        return [self.service.chat(request.chat())]

    async def whole(self, request: ResponsesRequest, answers: Sequence[Answer]) -> Chunk:
        """Return the response as it is at the end."""
        events = [event async for event in self.chunks(request, answers) if event]
        return events[-1]["response"]

    async def chunks(self, request: ResponsesRequest, answers: Sequence[Answer]) -> Chunks:
        """Yield the events of a stream, numbered."""
        number = 0
        async for event in self._events(request, answers):
            yield event and {**event, "sequence_number": number}
            number += event is not None

    async def _events(self, request: ResponsesRequest, answers: Sequence[Answer]) -> Chunks:
        response, output, reason = self._begun(request), [], None
        yield {"type": "response.created", "response": response}
        yield {"type": "response.in_progress", "response": response}
        message: dict[str, Any] | None = None
        async for part in chat_deltas(self.service, request.chat(), answers[0]):
            if part is None:
                yield None
                continue
            delta, _, reason = part
            if text := delta.get("content"):
                if message is None:
                    message = _item("message", role="assistant", content=[])
                    place = {"output_index": len(output), "item_id": message["id"]}
                    output.append(message)
                    yield {"type": "response.output_item.added", **place, "item": dict(message)}
                    message["content"].append(_text(""))
                    place["content_index"] = 0
                    yield {"type": "response.content_part.added", **place, "part": _text("")}
                message["content"][0]["text"] += text
                yield {"type": "response.output_text.delta", **place, "delta": text, "logprobs": []}
            for call in delta.get("tool_calls", ()):
                async for event in _call_events(call, output):
                    yield event
        if message is not None:
            message["status"], text = "completed", message["content"][0]
            done = {"text": text["text"], "logprobs": []}
            yield {"type": "response.output_text.done", **place, **done}
            yield {"type": "response.content_part.done", **place, "part": text}
            yield {"type": "response.output_item.done", **place, "item": message}
        counts = usage_of(answers)
        usage = {
            "input_tokens": counts["prompt_tokens"],
            "input_tokens_details": counts["prompt_tokens_details"],
            "output_tokens": counts["completion_tokens"],
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": counts["total_tokens"],
        }
        status = "incomplete" if reason == "length" else "completed"
        why = {"reason": "max_output_tokens"} if reason == "length" else None
        end = {"status": status, "incomplete_details": why, "output": output, "usage": usage}
        yield {"type": f"response.{status}", "response": {**response, **end}}

    def _begun(self, request: ResponsesRequest) -> Chunk:
        head = self.envelope(self.object)
        asked = request.model_dump(exclude={"input", "stream", "background", "model"})
        nothing = {"error": None, "incomplete_details": None, "usage": None, "metadata": {}}
        created = {"created_at": head.pop("created"), "status": "in_progress", "output": []}
        return {**head, **asked, **nothing, **created}


async def _call_events(call: dict[str, Any], output: list[dict[str, Any]]) -> Chunks:
    function = call["function"]
    item = _item("function_call", call_id=call["id"], name=function["name"], arguments="")
    place, kind = {"output_index": len(output), "item_id": item["id"]}, "function_call_arguments"
    yield {"type": "response.output_item.added", **place, "item": item}
    yield {"type": f"response.{kind}.delta", **place, "delta": function["arguments"]}
    yield {"type": f"response.{kind}.done", **place, **function}
    item = {**item, "arguments": function["arguments"], "status": "completed"}
    output.append(item)
    yield {"type": "response.output_item.done", **place, "item": item}


def _item(kind: str, **fields: Any) -> dict[str, Any]:
    name = new_id("msg_" if kind == "message" else "fc_")
    return {"id": name, "type": kind, "status": "in_progress", **fields}


def _text(text: str) -> dict[str, Any]:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}
