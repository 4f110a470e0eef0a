"""Requests of OpenAI's API: bytes in, a checked request out.

Unknown fields are refused, since they may change the answer; those known not to are listed. Null
means: not given.
"""

import json
from typing import Annotated, Any, Literal, NoReturn, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import from_json

from splitquant_mlx.settings import explain

IGNORED = {
    *("user", "store", "metadata", "service_tier", "safety_identifier", "prompt_cache_key"),
    *("prompt_cache_retention", "keep_alive", "cache_prompt", "include"),
}
CODES = {  # of what `explain` says
    "unknown key": "unknown_parameter",
    "expected a value, got none": "missing_required_parameter",
}
ENDS = "the server ends"


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


def refuse(path: str, message: str, got: object) -> NoReturn:
    """Raise the Refusal (400) of a field, or of a part of it."""
    text = json.dumps(got, default=str)
    text = text if len(text) <= 60 else f"{text[:60]}..."
    raise Refusal(400, f"{path}: {message}, got {text}", param=path.split(".")[0])


def text_of(content: Any) -> Any:
    """Return the text of a list of text parts; what is no list stays."""
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


class Strict(BaseModel):
    """A request, or a part of one, without unknown fields."""

    model_config = ConfigDict(strict=True, extra="forbid")


class Function(Strict):
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


class Tool(Strict):
    """A tool that the model may call."""

    type: Literal["function"]
    function: Function


class Called(Strict, extra="allow"):
    """The function of an earlier call; chat templates expect the value of its arguments."""

    name: str
    arguments: Any = None

    @model_validator(mode="after")
    def _read(self) -> "Called":
        if isinstance(self.arguments, str | None):
            try:
                self.arguments = from_json(self.arguments or "{}")
            except ValueError as exc:
                raise ValueError(f"expected arguments in JSON: {exc}") from exc
        return self


class Call(Strict, extra="allow"):
    """A call that the model has made."""

    function: Called


class Message(Strict, extra="allow"):
    """One message; further fields go to the chat template as they are."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Annotated[str | None, BeforeValidator(text_of)] = None
    tool_calls: list[Call] | None = None

    @model_validator(mode="after")
    def _for_templates(self) -> "Message":
        """Make what chat templates know of a message."""
        if self.content is None and self.role != "assistant":
            raise ValueError("expected content")
        self.content = self.content or ""
        self.role = "system" if self.role == "developer" else self.role
        return self


Number = Annotated[float, Field(ge=0, le=1)]
Penalty = Annotated[float, Field(ge=-2, le=2)]
Context = Annotated[int, Field(ge=0, le=2**20)]
One = Annotated[int, Field(ge=1, le=1)]
Tokens = Annotated[int, Field(ge=-1)]
TokenId = Annotated[str, Field(pattern=r"^[0-9]{1,9}$")]
Stop = Annotated[str, Field(min_length=1, max_length=256)]
Listed = BeforeValidator(lambda given: [given] if isinstance(given, str) else given)


def _prompts(given: Any) -> Any:
    several = isinstance(given, list) and given and isinstance(given[0], str | list)
    return given if several else [given]


class Request(Strict):
    """What completions and chat completions have in common."""

    model: str | None = None
    stream: bool = False
    stream_options: dict[Literal["include_usage", "include_obfuscation"], bool | None] = {}
    n: One = 1
    max_tokens: Tokens | None = None
    temp: Annotated[float | None, Field(ge=0, le=2, alias="temperature")] = None
    top_p: Number | None = None
    top_k: Annotated[int, Field(ge=-1, le=2**31)] | None = None
    min_p: Number | None = None
    repetition_penalty: Annotated[float, Field(ge=0, le=10)] = 0.0
    repetition_context_size: Context = 20
    presence_penalty: Penalty = 0.0
    presence_context_size: Context = 20
    frequency_penalty: Penalty = 0.0
    frequency_context_size: Context = 20
    logit_bias: dict[TokenId, Annotated[float, Field(ge=-100, le=100)]] = {}
    seed: int | None = None
    stop: Annotated[list[Stop], Field(max_length=16), Listed] = []


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
        """Return the messages as chat templates take them."""
        return [message.model_dump(exclude_none=True) for message in self.messages]

    def offered_tools(self) -> list[dict[str, Any]]:
        """Return the tools that the model may call, as chat templates take them."""
        tools = [] if self.tool_choice == "none" else self.tools
        return [tool.model_dump(exclude_none=True) for tool in tools]

    def forced_tools(self) -> list[Function]:
        """Return the functions of which one must be called; none if the model may say otherwise."""
        functions = [tool.function for tool in self.tools]
        match self.tool_choice:
            case "none" | "auto":
                return []
            case {"function": {"name": name}}:
                functions = [function for function in functions if function.name == name]
            case choice if choice != "required":
                functions = []
        expected = "expected none, auto, required or one of tools"
        return functions or refuse("tool_choice", expected, self.tool_choice)

    def schema(self) -> dict[str, Any] | None:
        """Return the JSON schema that the answer must follow, if there is one."""
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
        refuse("response_format", expected, self.response_format)


R = TypeVar("R", bound=BaseModel)


def parse(body: bytes, kind: type[R]) -> R:
    """Return a request's body as a `kind` of request. Raises Refusal (400)."""
    try:
        fields = from_json(body.removeprefix(b"\xef\xbb\xbf"), allow_inf_nan=False)
    except ValueError as exc:
        raise Refusal(400, f"the request is not JSON in UTF-8: {exc}") from exc
    if not isinstance(fields, dict):
        refuse("the request", "expected a JSON object", fields)
    return validate({k: v for k, v in fields.items() if k not in IGNORED}, kind)


def validate(fields: dict[str, Any], kind: type[R]) -> R:
    """Return fields as a `kind` of request. Raises Refusal (400)."""
    try:
        return kind.model_validate({k: v for k, v in fields.items() if v is not None})
    except ValidationError as exc:
        path, _, problem = explain(exc).partition(": ")
    code = CODES.get(problem)
    if code == "unknown_parameter":
        problem = "not known here, and it might change the answer: leave it out"
    raise Refusal(400, f"{path}: {problem}", param=path.partition(".")[0], code=code)
