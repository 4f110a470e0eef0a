"""OpenAI's /v1/responses, implemented with chat completions: text and function calls."""

from collections.abc import AsyncIterator, Sequence
from itertools import count
from typing import Annotated, Any, Literal

from pydantic import Field

from splitquant_mlx.inference.answers import Answer
from splitquant_mlx.inference.endpoints import Chunk, Completions, count_usage, new_id
from splitquant_mlx.inference.protocol import ChatRequest, StrictModel, reject, validate
from splitquant_mlx.inference.stops import NORMAL


class ResponsesRequest(StrictModel):
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
        """Return the equivalent chat completion request. Raises APIError."""
        if unknown := set(self.text) - {"format", "verbosity"}:
            reject("text", "expected format", sorted(unknown))
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
    """Nest all fields but `type` under `kind`, as in chat completions."""
    rest = {name: value for name, value in flat.items() if name != "type"}
    return {"type": flat.get("type"), kind: rest} if rest else flat


def _messages(items: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Convert input items to messages of a chat completion."""
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
            call_id, output = item.get("call_id"), item.get("output")
            messages.append({"role": "tool", "tool_call_id": call_id, "content": output})
        elif kind != "reasoning":  # not used by chat templates
            expected = "expected message, function_call or function_call_output"
            reject(f"input.{i}.type", expected, kind)
    return messages


class Responses(Completions):
    """/v1/responses."""

    kind = ResponsesRequest
    object, prefix = "response", "resp_"
    named_events = True

    def answers(self, request: ResponsesRequest) -> list[Answer]:
        """Plan the answer. Raises APIError."""
        return [self.service.chat(request.chat())]

    def merge(self, chunks: Sequence[Chunk]) -> Chunk:
        """Return the complete response, which is in the last event."""
        return chunks[-1]["response"]

    async def chunks(
        self, request: ResponsesRequest, answers: Sequence[Answer]
    ) -> AsyncIterator[Chunk]:
        """Yield the events of a stream."""
        envelope, output, text, finish = self.envelope(self.object), [], "", None
        created = envelope.pop("created")
        response = {
            **envelope,
            **request.model_dump(exclude={"input", "stream", "background", "model"}),
            **{"error": None, "incomplete_details": None, "usage": None, "metadata": {}},
            **{"created_at": created, "status": "in_progress", "output": []},
        }
        message = _item("message", role="assistant", content=[])
        numbers = count()

        def event(kind: str, of: Chunk | None = None, /, **fields: Any) -> Chunk:
            ids = {"output_index": output.index(of), "item_id": of["id"]} if of else {}
            number = next(numbers)
            return {"type": f"response.{kind}", "sequence_number": number, **ids, **fields}

        yield event("created", response=response)
        yield event("in_progress", response=response)
        async for part in answers[0].parts():
            if part.kind == NORMAL and part.text:
                if not text:
                    output.append(message)
                    yield event("output_item.added", message, item=message)
                    yield event("content_part.added", message, content_index=0, part=_text(""))
                text += part.text
                fields = {"content_index": 0, "delta": part.text, "logprobs": []}
                yield event("output_text.delta", message, **fields)
            for call in part.calls:
                function = call["function"]
                item = _item("function_call", call_id=call["id"], **function)
                output.append(item)
                yield event("output_item.added", item, item={**item, "arguments": ""})
                arguments = {"delta": function["arguments"]}
                yield event("function_call_arguments.delta", item, **arguments)
                yield event("function_call_arguments.done", item, **function)
                item["status"] = "completed"
                yield event("output_item.done", item, item=item)
            finish = part.finish
        if text:
            message.update(status="completed", content=[_text(text)])
            yield event("output_text.done", message, content_index=0, text=text, logprobs=[])
            yield event("content_part.done", message, content_index=0, part=_text(text))
            yield event("output_item.done", message, item=message)
        counts = count_usage(answers)
        usage = {
            "input_tokens": counts["prompt_tokens"],
            "input_tokens_details": counts["prompt_tokens_details"],
            "output_tokens": counts["completion_tokens"],
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": counts["total_tokens"],
        }
        status = "incomplete" if finish == "length" else "completed"
        details = {"reason": "max_output_tokens"} if finish == "length" else None
        end = {"status": status, "incomplete_details": details, "output": output, "usage": usage}
        yield event(status, response={**response, **end})


def _item(kind: str, **fields: Any) -> Chunk:
    name = new_id("msg_" if kind == "message" else "fc_")
    return {"id": name, "type": kind, "status": "in_progress", **fields}


def _text(text: str) -> Chunk:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}
