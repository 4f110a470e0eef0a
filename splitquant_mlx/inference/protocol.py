"""Requests of OpenAI's API: bytes in, a checked request out.

Unknown fields are refused, since they may change the answer; those known not to are listed. Null
means: not given.
"""

import json
from collections.abc import Mapping
from typing import Annotated, Any, Literal, NoReturn, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError
from pydantic_core import from_json

IGNORED = {
    *("user", "store", "metadata", "service_tier", "safety_identifier", "prompt_cache_key"),
    *("prompt_cache_retention", "keep_alive", "cache_prompt", "include"),
}
ENDS = "the server ends"
TEXT_PARTS = {"text": "text", "input_text": "text", "output_text": "text", "refusal": "refusal"}


class Refusal(Exception):
    """Why there is no answer, as OpenAI's API says it.

    Args:
        status: of HTTP, 400 to 599.
        message: what was wrong, expected and got.
        param: the field of the request to blame.
        code: a word for programs.
    """

    def __init__(
        self, status: int, message: str, *, param: str | None = None, code: str | None = None
    ) -> None:
        super().__init__(message)
        self.status = status
        kind = "server_error" if status >= 500 else "invalid_request_error"
        self.body = {"error": {"message": message, "type": kind, "param": param, "code": code}}


def failure() -> Refusal:
    """Return the Refusal of a server that is at fault itself."""
    return Refusal(500, "the server could not answer; its log says why")


def refuse(name: str, expected: str, got: object) -> NoReturn:
    """Raise the Refusal (400) of a field."""
    text = json.dumps(got, default=str)
    text = text if len(text) <= 60 else f"{text[:60]}..."
    raise Refusal(400, f"{name}: expected {expected}, got {text}", param=name.split("[")[0])


def text_of(content: Any, name: str) -> str:
    """Return the text of a message's content: a string, a list of text parts or null."""
    if content is None or isinstance(content, str):
        return content or ""
    if not isinstance(content, list):
        refuse(name, "a string or a list of text parts", content)
    texts = []
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else None
        text = part.get(TEXT_PARTS[kind]) if isinstance(kind, str) and kind in TEXT_PARTS else None
        if not isinstance(text, str):
            refuse(name, "text parts (this model reads text only)", part)
        texts.append(text)
    return "".join(texts)


class Strict(BaseModel):
    """A request, or a part of one, without unknown fields."""

    model_config = ConfigDict(strict=True, extra="forbid", protected_namespaces=())


class Function(Strict):
    """A function that the model may call; `parameters` is a JSON schema."""

    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(Strict):
    """A tool that the model may call."""

    type: Literal["function"]
    function: Function


class Message(Strict):
    """One message; further fields go to the chat template as they are."""

    model_config = ConfigDict(extra="allow")
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Any = None
    tool_calls: list[dict[str, Any]] | None = None


def _stops(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


Number = Annotated[float, Field(ge=0, le=1)]
Penalty = Annotated[float, Field(ge=-2, le=2)]
Context = Annotated[int, Field(ge=0, le=2**20)]
One = Annotated[int, Field(ge=1, le=1)]
Tokens = Annotated[int, Field(ge=-1)]
TokenId = Annotated[str, Field(pattern=r"^[0-9]{1,9}$")]
Stop = Annotated[str, Field(min_length=1, max_length=256)]


class Request(Strict):
    """What completions and chat completions have in common."""

    model: str | None = None
    stream: bool = False
    stream_options: dict[Literal["include_usage", "include_obfuscation"], bool | None] = {}
    n: One = 1
    max_tokens: Tokens | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Number | None = None
    top_k: Annotated[int, Field(ge=-1, le=2**31)] | None = None
    min_p: Number | None = None
    repetition_penalty: Annotated[float, Field(ge=0, le=10)] = 0.0
    repetition_context_size: Context = 20
    presence_penalty: Penalty = 0.0
    presence_context_size: Context = 20
    frequency_penalty: Penalty = 0.0
    frequency_context_size: Context = 20
    xtc_probability: Number = 0.0
    xtc_threshold: Annotated[float, Field(ge=0, le=0.5)] = 0.1
    logit_bias: dict[TokenId, Annotated[float, Field(ge=-100, le=100)]] = {}
    seed: int | None = None
    stop: Annotated[list[Stop], Field(max_length=16), BeforeValidator(_stops)] = []


class CompletionRequest(Request):
    """A request of /v1/completions."""

    prompt: str | list[int] | list[str] | list[list[int]]
    echo: bool = False
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    best_of: One = 1


class ChatRequest(Request):
    """A request of /v1/chat/completions."""

    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: Tokens | None = None
    logprobs: bool = False
    top_logprobs: Annotated[int, Field(ge=0, le=20)] = 0
    tools: list[Tool] = []
    tool_choice: str | dict[str, Any] = "auto"
    parallel_tool_calls: bool = True
    response_format: dict[str, Any] = {"type": "text"}
    reasoning_effort: Literal["none", "minimal", "low", "medium", "high", "xhigh"] | None = None
    chat_template_kwargs: dict[str, Any] = {}
    modalities: list[Literal["text"]] = ["text"]

    def forced_tools(self) -> list[Function]:
        """Return the functions of which one must be called; none if the model may say otherwise."""
        choice, functions = self.tool_choice, [tool.function for tool in self.tools]
        if choice in ("none", "auto"):
            return []
        if isinstance(choice, dict) and isinstance(choice.get("function"), dict):
            functions = [f for f in functions if f.name == choice["function"].get("name")]
        elif choice != "required":
            functions = []
        return functions or refuse("tool_choice", "none, auto, required or one of tools", choice)

    def schema(self) -> dict[str, Any] | None:
        """Return the JSON schema that the answer must follow, if there is one."""
        if forced := self.forced_tools():
            return {"anyOf": [_call_schema(function) for function in forced]}
        form = self.response_format
        if form.get("type") == "text":
            return None
        given = form.get("json_schema")
        schema = given.get("schema") if isinstance(given, dict) else None
        schema = {"type": "object"} if form.get("type") == "json_object" else schema
        expected = "type text, json_object, or json_schema with a json_schema.schema"
        return schema if isinstance(schema, dict) else refuse("response_format", expected, form)

    def conversation(self) -> list[dict[str, Any]]:
        """Return the messages as chat templates take them."""
        messages = []
        for i, message in enumerate(self.messages):
            where, said = f"messages[{i}]", message.model_dump(exclude_none=True)
            if message.content is None and message.role != "assistant":
                refuse(f"{where}.content", "text", None)
            said["content"] = text_of(message.content, f"{where}.content")
            said["role"] = "system" if message.role == "developer" else message.role
            for call in said.get("tool_calls", ()):
                _read_arguments(call, f"{where}.tool_calls")
            messages.append(said)
        return messages


def _call_schema(function: Function) -> dict[str, Any]:
    arguments = function.parameters or {"type": "object"}
    properties = {"name": {"const": function.name}, "arguments": arguments}
    return {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }


def _read_arguments(call: dict[str, Any], where: str) -> None:
    """Replace a call's arguments, which are JSON, by their value: what chat templates expect."""
    function = call.get("function")
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        refuse(where, "calls of a function with a name", call)
    given = function.get("arguments") or "{}"
    try:
        function["arguments"] = from_json(given) if isinstance(given, str) else given
    except ValueError:
        refuse(f"{where}.function.arguments", "JSON", given)


R = TypeVar("R", bound=BaseModel)


def parse(body: bytes, kind: type[R]) -> R:
    """Return a request's body as a `kind` of request. Raises Refusal (400)."""
    try:
        fields = from_json(body.removeprefix(b"\xef\xbb\xbf"), allow_inf_nan=False)
    except ValueError as exc:
        raise Refusal(400, f"the request is not JSON in UTF-8: {exc}") from exc
    if not isinstance(fields, dict):
        refuse("the request", "a JSON object", fields)
    return validate({k: v for k, v in fields.items() if k not in IGNORED}, kind)


def validate(fields: Mapping[str, Any], kind: type[R]) -> R:
    """Return fields as a `kind` of request. Raises Refusal (400)."""
    try:
        return kind.model_validate({k: v for k, v in fields.items() if v is not None})
    except ValidationError as exc:
        error = exc.errors(include_url=False)[0]
    name, path = str(error["loc"][0]), ".".join(map(str, error["loc"]))
    if error["type"] == "missing" and name == path:
        raise Refusal(400, f"{name}: missing", param=name, code="missing_required_parameter")
    if error["type"] == "extra_forbidden":
        message = f"{path}: not known here, and it might change the answer: leave it out"
        raise Refusal(400, message, param=name, code="unknown_parameter")
    got = json.dumps(error["input"], default=str)
    got = got if len(got) <= 60 else f"{got[:60]}..."
    raise Refusal(400, f"{path}: {error['msg']}, got {got}", param=name)
