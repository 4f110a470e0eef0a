"""Check single fields of OpenAI's requests: a value in, the value for mlx_lm.server out.

A check takes a field's name, for the message, and its value; it returns what mlx_lm.server is to
get, or raises a `Refusal`. Ranges are those within which mlx-lm computes something sensible, and
OpenAI's where they are narrower.
"""

import json
from collections.abc import Callable
from typing import Any, NoReturn

ROLES = ("system", "developer", "user", "assistant", "tool")
MAX_STOPS, MAX_STOP_CHARACTERS = 16, 256


class Refusal(Exception):
    """Tell a client why there is no answer, as OpenAI's API does.

    Args:
        status: of HTTP, 400 to 599.
        message: what was wrong, wanted and got.
        param: the field of the request to blame.
        code: a word for programs.
    """

    def __init__(
        self, status: int, message: str, *, param: str | None = None, code: str | None = None
    ) -> None:
        super().__init__(message)
        self.status = status
        self.error = {
            "message": message,
            "type": "server_error" if status >= 500 else "invalid_request_error",
            "param": param,
            "code": code,
        }


Check = Callable[[str, Any], Any]


def refuse(name: str, wanted: str, got: object, param: str | None = None) -> NoReturn:
    """Raise the Refusal of a field, `name`, that is within the request's field `param`."""
    raise Refusal(400, f"{name}: wanted {wanted}, got {show(got)}", param=param or name)


def show(value: object) -> str:
    """Return the beginning of a value as JSON."""
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:60]}..."


def _of_type(kind: type, wanted: str) -> Check:
    def check(name: str, value: Any) -> Any:
        return value if isinstance(value, kind) else refuse(name, wanted, value)

    return check


def integer(low: int, high: int) -> Check:
    """Return the check for an integer, which true and false are not."""

    def check(name: str, value: Any) -> int:
        if isinstance(value, int) and not isinstance(value, bool) and low <= value <= high:
            return value
        refuse(name, f"an integer from {low} to {high}" if low < high else str(low), value)

    return check


def _number(low: float, high: float) -> Check:
    def check(name: str, value: Any) -> float:
        # Comparisons are false for NaN; JSON's 1e999 is infinite.
        if isinstance(value, int | float) and not isinstance(value, bool) and low <= value <= high:
            return float(value)
        refuse(name, f"a number from {low:g} to {high:g}", value)

    return check


def _seed(name: str, value: Any) -> int:
    return integer(-(2**63), 2**64 - 1)(name, value) % 2**64


def _stream_options(name: str, value: Any) -> dict[str, bool]:
    usage = _object(name, value).get("include_usage") or False
    return {"include_usage": _boolean(f"{name}.include_usage", usage)}


def _logit_bias(name: str, value: Any) -> dict[str, float]:
    number, biases = _number(-100, 100), {}
    for token, bias in _object(name, value).items():
        if not (token.isascii() and token.isdigit() and len(token) < 10):
            refuse(name, "token ids", token)
        biases[token] = number(f"{name}.{token}", bias)
    return biases


def _stop(name: str, value: Any) -> list[str]:
    words = [value] if isinstance(value, str) else value
    right = isinstance(words, list) and len(words) <= MAX_STOPS
    if right and all(isinstance(w, str) and 0 < len(w) <= MAX_STOP_CHARACTERS for w in words):
        return words
    refuse(name, f"up to {MAX_STOPS} strings of 1 to {MAX_STOP_CHARACTERS} characters", value)


def _prompt(name: str, value: Any) -> str:
    if isinstance(value, list) and len(value) == 1:
        value = value[0]
    return _string(name, value)


def _text(name: str, value: Any) -> str | None:
    """Return the text of a message; pictures and sound are refused, wherever they are."""
    if value is None or isinstance(value, str):
        return value
    if not isinstance(value, list):
        refuse(name, "a string or a list of text parts", value)
    for part in value:
        if not (isinstance(part, dict) and part.get("type") == "text"):
            refuse(name, "parts of type text", part)
    return "".join(_string(f"{name}.text", part.get("text")) for part in value)


def _messages(name: str, value: Any) -> list[dict[str, Any]]:
    if not isinstance(value, list) or not value:
        refuse(name, "a list of messages", value)
    messages = []
    for i, message in enumerate(value):
        where = f"{name}[{i}]"
        role = _object(where, message).get("role")
        if role not in ROLES:
            refuse(f"{where}.role", f"one of {', '.join(ROLES)}", role, name)
        content = _text(f"{where}.content", message.get("content"))
        calls = _objects(f"{where}.tool_calls", message.get("tool_calls") or [])
        if content is None and not calls:
            refuse(f"{where}.content", "text", None, name)
        messages.append({**message, "content": content or ""})
    return messages


def _objects(name: str, value: Any) -> list[dict[str, Any]]:
    if isinstance(value, list) and all(isinstance(item, dict) for item in value):
        return value
    refuse(name, "a list of objects", value)


def _role_mapping(name: str, value: Any) -> dict[str, str]:
    return {role: _string(f"{name}.{role}", text) for role, text in _object(name, value).items()}


_string = _of_type(str, "a string")
_boolean = _of_type(bool, "true or false")
_object = _of_type(dict, "an object")
_one = integer(1, 1)
_context = integer(0, 2**20)

# mlx_lm.server ignores fields that it does not know, and so do we, except where the answer would
# be another than the one asked for.
COMMON: dict[str, Check] = {
    "stream": _boolean,
    "stream_options": _stream_options,
    "n": _one,
    "temperature": _number(0, 2),
    "top_p": _number(0, 1),
    "top_k": integer(0, 2**31 - 1),
    "min_p": _number(0, 1),
    "num_draft_tokens": integer(1, 32),
    "repetition_penalty": _number(0, 10),
    "repetition_context_size": _context,
    "presence_penalty": _number(-2, 2),
    "presence_context_size": _context,
    "frequency_penalty": _number(-2, 2),
    "frequency_context_size": _context,
    "xtc_probability": _number(0, 1),
    "xtc_threshold": _number(0, 0.5),
    "logit_bias": _logit_bias,
    "logprobs": _boolean,
    "top_logprobs": integer(0, 11),
    "seed": _seed,
    "stop": _stop,
    "chat_template_kwargs": _object,
}
CHAT: dict[str, Check] = {
    "messages": _messages,
    "tools": _objects,
    "role_mapping": _role_mapping,
}
TEXT: dict[str, Check] = {
    "prompt": _prompt,
    "best_of": _one,
    "echo": lambda name, value: refuse(name, "false", value) if value else value,
}
