"""Settings and records as frozen, keyword-only dataclasses that pydantic validates.

All validation of the package is declared here: by types and `Field` constraints. An error is one
line, "key: expected X, got Y". Command-line help and the recipe reference are generated from the
"Attributes" section of each class.
"""

import dataclasses
import json
import re
from collections.abc import Mapping
from functools import wraps
from typing import Annotated, Any, NamedTuple, TypeVar, get_args

from pydantic import BeforeValidator, ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass as validated_dataclass
from typing_extensions import dataclass_transform

from splitquant_mlx.errors import RecipeError

T = TypeVar("T")
# types are not converted, unknown keys are errors
STRICT = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)
PositiveInt = Annotated[int, Field(ge=1, lt=2**63)]
NonNegativeInt = Annotated[int, Field(ge=0, lt=2**63)]
# TOML and JSON have lists only
Strings = Annotated[tuple[str, ...], Field(strict=False)]


@dataclass_transform(frozen_default=True, kw_only_default=True, field_specifiers=(Field,))
def settings(cls: type[T]) -> type[T]:
    """Make `cls` a frozen, keyword-only dataclass that raises RecipeError for a bad value."""
    built: Any = record(cls)
    construct = built.__init__

    @wraps(construct)
    def __init__(self: Any, **values: Any) -> None:
        try:
            construct(self, **values)
        except ValidationError as exc:
            found = problem(exc, built)
            raise RecipeError(found.text, field=found.field) from None

    built.__init__ = __init__
    return built


@dataclass_transform(frozen_default=True, kw_only_default=True, field_specifiers=(Field,))
def record(cls: type[T]) -> type[T]:
    """Make `cls` a frozen, keyword-only dataclass that raises ValidationError for a bad value."""
    return validated_dataclass(cls, frozen=True, kw_only=True, config=STRICT)  # type: ignore[return-value]


def from_mapping(kind: type[T], values: Mapping[str, Any]) -> T:
    """Build settings from the plain values of TOML or JSON. Raises RecipeError."""
    if not isinstance(values, Mapping):
        raise RecipeError(f"expected a table, got {values!r:.80}")
    if bad := next((key for key in values if not str(key).isidentifier()), None):
        raise RecipeError(f"{bad!r:.80}: unknown key, expected one of {', '.join(_names(kind))}")
    return kind(**values)


def nested(kind: type[T]) -> BeforeValidator:
    """Return the annotation of a field of class `kind` that also accepts a mapping."""
    return BeforeValidator(
        lambda value: from_mapping(kind, value) if isinstance(value, Mapping) else value
    )


class Problem(NamedTuple):
    """A problem of a validation.

    Attributes:
        field: path of the field; empty if this package's own message is about the whole.
        text: "expected X, got Y", on one line.
        kind: pydantic's type of the error.
    """

    field: str
    text: str
    kind: str


def explain(exc: ValidationError, kind: Any = None) -> str:
    """Return one problem of a validation on one line, "key: expected X, got Y"; see `problem`."""
    found = problem(exc, kind)
    return f"{found.field}: {found.text}" if found.field else found.text


def problem(exc: ValidationError, kind: Any = None) -> Problem:
    """Return one problem of a validation.

    An unknown key comes first: it explains why another one is missing.

    Args:
        exc: the error.
        kind: the class that was validated, whose fields are listed for an unknown key.
    """
    problems = exc.errors(include_url=False, include_context=False)
    first = min(problems, key=lambda error: error["type"] not in UNKNOWN_KEY)
    error, path, message = first["type"], first["loc"], first["msg"]
    field = f"{' '.join('.'.join(map(str, path)).split()) or 'content':.80}"
    if error in UNKNOWN_KEY:
        known = ", ".join(_names(kind, path[:-1]))
        text = "unknown key" + (f", expected one of {known}" if known else "")
        return Problem(field, text, error)
    if error.startswith("dataclass"):
        message = "Input should be a valid dictionary"
    if error.startswith("missing"):
        return Problem(field, "expected a value, got none", error)
    if error == "value_error":  # this package's own message
        return Problem(field if path else "", message.removeprefix("Value error, "), error)
    message = re.sub(r", unable to parse .*", "", message)
    expected = re.sub(r"^Input should be (a valid |an instance of )?", "expected ", message)
    for theirs, ours in WORDS.items():
        expected = expected.replace(theirs, ours)
    return Problem(field, " ".join(f"{expected}, got {first['input']!r:.80}".split()), error)


UNKNOWN_KEY = ("unexpected_keyword_argument", "extra_forbidden")
# pydantic's terms -> those of TOML and JSON
WORDS = {
    "expected integer": "expected an integer",
    "expected string": "expected a string",
    "expected number": "expected a number",
    "expected boolean": "expected true or false",
    "expected dictionary": "expected a table",
    "expected tuple": "expected a list",
    "expected list": "expected a list",
    "greater than or equal to": "at least",
    "less than or equal to": "at most",
}


def load_json(kind: type[T], content: str | bytes | Mapping[str, Any]) -> T:
    """Return an instance of `kind` from JSON text or a parsed JSON object.

    Raises:
        ValueError: with a message of one line.
    """
    try:
        text = json.dumps(content) if isinstance(content, Mapping) else content
        return TypeAdapter(kind).validate_json(text)
    except ValidationError as exc:
        raise ValueError(explain(exc, kind)) from None
    except TypeError as exc:  # not a JSON value
        raise ValueError(f"content: expected JSON values: {exc}") from None


def descriptions(kind: type) -> dict[str, str]:
    """Return each field's description from the "Attributes" section of the class's docstring."""
    _, _, section = (kind.__doc__ or "").partition("Attributes:\n")
    entries = re.findall(r"^ {8}(\w+): (.*(?:\n {12,}.*)*)", section, re.MULTILINE)
    texts = {name: " ".join(text.split()) for name, text in entries}
    return {field.name: texts[field.name] for field in dataclasses.fields(kind)}  # type: ignore[arg-type]


def _names(kind: Any, path: tuple[int | str, ...] = ()) -> list[str]:
    """Return the field names of a settings class, or of the nested one at `path`."""
    if not dataclasses.is_dataclass(kind):
        inner = [_names(argument, path) for argument in get_args(kind)]
        return next(filter(None, inner), [])
    fields = {field.name: field.type for field in dataclasses.fields(kind)}
    return _names(fields.get(str(path[0])), path[1:]) if path else list(fields)
