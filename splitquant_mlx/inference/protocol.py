"""Parse and validate requests of OpenAI's API.

Unknown fields are rejected because they may change the answer; `IGNORED_FIELDS` do not. Null is the
same as an absent field.
"""

import json
from typing import Annotated, Any, Literal, NoReturn, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import from_json

from splitquant_mlx.inference.decoding import Probability
from splitquant_mlx.settings import problem

IGNORED_FIELDS = {
    *("user", "store", "metadata", "service_tier", "safety_identifier", "prompt_cache_key"),
    *("prompt_cache_retention", "keep_alive", "cache_prompt", "include"),
}
ERROR_CODES = {  # by pydantic's type of the error
    "extra_forbidden": "unknown_parameter",
    "missing": "missing_required_parameter",
}
SHUTTING_DOWN = "the server is shutting down"


class APIError(Exception):
    """An error response of OpenAI's API.

    Args:
        status: HTTP status, 400 to 599.
        message: text for the user.
        param: the invalid field of the request.
        code: error code.
    """

    def __init__(
        self, status: int, message: str, *, param: str | None = None, code: str | None = None
    ) -> None:
        super().__init__(message)
        self.status = status
        kind = "server_error" if status >= 500 else "invalid_request_error"
        self.body = {"error": {"message": message, "type": kind, "param": param, "code": code}}


def internal_error() -> APIError:
    """Return the APIError (500) for an unexpected exception."""
    return APIError(500, "internal server error: see the server's log")


def reject(path: str, message: str, got: object) -> NoReturn:
    """Raise an APIError (400) for a field or a part of it."""
    text = json.dumps(got, default=str)
    text = text if len(text) <= 60 else f"{text[:60]}..."
    raise APIError(400, f"{path}: {message}, got {text}", param=path.split(".")[0])


def join_text_parts(content: Any) -> Any:
    """Return the joined text of a list of text parts; anything but a list is unchanged."""
    if not isinstance(content, list):
        return content
    texts = []
    for part in content:
        match part:
            case {"type": "text" | "input_text" | "output_text", "text": str(text)}:
                texts.append(text)
            case {"type": "refusal", "refusal": str(text)}:
                texts.append(text)
            case _:
                raise ValueError("expected text parts (this model reads text only)")
    return "".join(texts)


class StrictModel(BaseModel):
    """A request or a part of one; unknown fields are errors."""

    model_config = ConfigDict(strict=True, extra="forbid")


class Function(StrictModel):
    """A function that the model may call; `parameters` is a JSON schema."""

    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None

    def call_schema(self) -> dict[str, Any]:
        """Return the JSON schema of a call."""
        arguments = self.parameters or {"type": "object"}
        properties = {"name": {"const": self.name}, "arguments": arguments}
        closed = {"required": ["name", "arguments"], "additionalProperties": False}
        return {"type": "object", "properties": properties, **closed}


class Tool(StrictModel):
    """A tool that the model may call."""

    type: Literal["function"]
    function: Function


class CalledFunction(StrictModel, extra="allow"):
    """The function of an earlier call; chat templates expect its arguments decoded from JSON."""

    name: str
    arguments: Any = None

    @model_validator(mode="after")
    def _decode_arguments(self) -> "CalledFunction":
        if isinstance(self.arguments, str | None):
            try:
                self.arguments = from_json(self.arguments or "{}")
            except ValueError as exc:
                raise ValueError(f"expected arguments in JSON: {exc}") from exc
        return self


class ToolCall(StrictModel, extra="allow"):
    """An earlier call of a tool."""

    function: CalledFunction


class Message(StrictModel, extra="allow"):
    """A message; unknown fields are passed to the chat template."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Annotated[str | None, BeforeValidator(join_text_parts)] = None
    tool_calls: list[ToolCall] | None = None

    @model_validator(mode="after")
    def _for_templates(self) -> "Message":
        """Use the content and roles that chat templates expect."""
        if self.content is None and self.role != "assistant":
            raise ValueError("expected content")
        self.content = self.content or ""
        self.role = "system" if self.role == "developer" else self.role
        return self


Penalty = Annotated[float, Field(ge=-2, le=2)]
Context = Annotated[int, Field(ge=0, le=2**20)]
One = Annotated[int, Field(ge=1, le=1)]
Tokens = Annotated[int, Field(ge=-1)]
TokenId = Annotated[str, Field(pattern=r"^[0-9]{1,9}$")]
Stop = Annotated[str, Field(min_length=1, max_length=256)]
AsList = BeforeValidator(lambda value: [value] if isinstance(value, str) else value)


def _prompts(value: Any) -> Any:
    is_batch = isinstance(value, list) and value and isinstance(value[0], str | list)
    return value if is_batch else [value]


class Request(StrictModel):
    """Fields common to completions and chat completions."""

    model: str | None = None
    stream: bool = False
    stream_options: dict[Literal["include_usage", "include_obfuscation"], bool | None] = {}
    n: One = 1
    max_tokens: Tokens | None = None
    temp: Annotated[float | None, Field(ge=0, le=2, alias="temperature")] = None
    top_p: Probability | None = None
    top_k: Annotated[int, Field(ge=-1, le=2**31)] | None = None
    min_p: Probability | None = None
    repetition_penalty: Annotated[float, Field(ge=0, le=10)] = 0.0
    repetition_context_size: Context = 20
    presence_penalty: Penalty = 0.0
    presence_context_size: Context = 20
    frequency_penalty: Penalty = 0.0
    frequency_context_size: Context = 20
    logit_bias: dict[TokenId, Annotated[float, Field(ge=-100, le=100)]] = {}
    seed: int | None = None
    stop: Annotated[list[Stop], Field(max_length=16), AsList] = []


class CompletionRequest(Request):
    """A request of /v1/completions."""

    prompt: Annotated[list[str | list[int]], BeforeValidator(_prompts)]
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

    def conversation(self) -> list[dict[str, Any]]:
        """Return the messages for the chat template."""
        return [message.model_dump(exclude_none=True) for message in self.messages]

    def offered_tools(self) -> list[dict[str, Any]]:
        """Return the tools that the model may call, for the chat template."""
        tools = [] if self.tool_choice == "none" else self.tools
        return [tool.model_dump(exclude_none=True) for tool in tools]

    def forced_tools(self) -> list[Function]:
        """Return the functions of which the model must call one; empty if a call is optional."""
        functions = [tool.function for tool in self.tools]
        match self.tool_choice:
            case "none" | "auto":
                return []
            case {"function": {"name": name}}:
                functions = [function for function in functions if function.name == name]
            case choice if choice != "required":
                functions = []
        expected = "expected none, auto, required or one of tools"
        return functions or reject("tool_choice", expected, self.tool_choice)

    def schema(self) -> dict[str, Any] | None:
        """Return the JSON schema of the answer, if one is required."""
        if forced := self.forced_tools():
            return {"anyOf": [function.call_schema() for function in forced]}
        match self.response_format:
            case {"type": "text"}:
                return None
            case {"type": "json_object"}:
                return {"type": "object"}
            case {"type": "json_schema", "json_schema": {"schema": dict(schema)}}:
                return schema
        expected = "expected type text, json_object, or json_schema with a json_schema.schema"
        reject("response_format", expected, self.response_format)


R = TypeVar("R", bound=BaseModel)


def parse(body: bytes, kind: type[R]) -> R:
    """Parse a request's body as a `kind` of request. Raises APIError (400)."""
    try:
        fields = from_json(body.removeprefix(b"\xef\xbb\xbf"), allow_inf_nan=False)
    except ValueError as exc:
        raise APIError(400, f"the request: expected JSON in UTF-8: {exc}") from exc
    if not isinstance(fields, dict):
        reject("the request", "expected a JSON object", fields)
    return validate({k: v for k, v in fields.items() if k not in IGNORED_FIELDS}, kind)


def validate(fields: dict[str, Any], kind: type[R]) -> R:
    """Validate fields as a `kind` of request. Raises APIError (400)."""
    try:
        return kind.model_validate({k: v for k, v in fields.items() if v is not None})
    except ValidationError as exc:
        field, text, error = problem(exc)
    code = ERROR_CODES.get(error)
    if code == "unknown_parameter":
        text = "unknown field, which could change the answer: omit it"
    raise APIError(400, f"{field}: {text}", param=field.partition(".")[0], code=code)
