"""Command-line options made from settings classes: values and help stand on the class alone."""

import dataclasses
import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from functools import wraps
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import typer

from splitquant_mlx.errors import RecipeError
from splitquant_mlx.settings import descriptions

Given = dict[str, Any]  # the values that the command line gives, by field name
Command = Callable[..., Any]


def settings_options(
    kind: type,
    parameter: str,
    *,
    flags: Mapping[str, Sequence[str]] | None = None,
    skip: Sequence[str] = (),
    panel: str | None = None,
    panels: Mapping[str, str | None] | None = None,
    variables: Mapping[str, str] | None = None,
    with_defaults: bool = False,
) -> Callable[[Command], Command]:
    """Replace a parameter of a command by one option for each field of a settings class.

    The command receives the values that were given as a dict in `parameter`. An error about one of
    them that begins with the field's name, "group_size: ...", names the flag instead.

    Args:
        kind: the settings class.
        parameter: name of the command's parameter, annotated as `Given`.
        flags: flags by field name, where they are not `--field-name`.
        skip: fields without an option.
        panel: heading of the options in the help.
        panels: other headings, by field name.
        variables: of the environment that stand in for an option, by field name.
        with_defaults: show the fields' own defaults.
    """
    fields = [field for field in dataclasses.fields(kind) if field.name not in skip]
    spelled = {field.name: (f"--{field.name.replace('_', '-')}",) for field in fields}
    spelled |= dict(flags or {})
    options, headings = {}, {field.name: panel for field in fields} | dict(panels or {})
    for field in fields:
        given_as, choices = _option_type(field.type)
        option = typer.Option(
            *spelled[field.name],
            help=_help(kind, field),
            metavar=choices,
            envvar=(variables or {}).get(field.name),
            rich_help_panel=headings[field.name],
        )
        options[field.name] = inspect.Parameter(
            f"{parameter}_{field.name}",
            inspect.Parameter.KEYWORD_ONLY,
            default=field.default if with_defaults and field.default != () else None,
            annotation=Annotated[given_as | None, option],
        )

    def decorate(command: Command) -> Command:
        @wraps(command)
        def run(**arguments: Any) -> Any:
            values = {name: arguments.pop(f"{parameter}_{name}") for name in options}
            given = {name: value for name, value in values.items() if value not in (None, [])}
            try:
                return command(**arguments, **{parameter: given})
            except RecipeError as exc:
                raise _name_flags(exc, spelled) from exc

        return _with_options(run, command, parameter, options)

    return decorate


def dataclass_options(kind: type, parameter: str) -> Callable[[Command], Command]:
    """Replace a parameter of a command by the fields of a dataclass, annotated as options.

    The command receives an instance of the class.
    """
    hints = get_type_hints(kind, include_extras=True)
    options = {
        field.name: inspect.Parameter(
            field.name,
            inspect.Parameter.KEYWORD_ONLY,
            default=field.default,
            annotation=hints[field.name],
        )
        for field in dataclasses.fields(kind)
    }

    def decorate(command: Command) -> Command:
        @wraps(command)
        def run(**arguments: Any) -> Any:
            given = kind(**{name: arguments.pop(name) for name in options})
            return command(**arguments, **{parameter: given})

        return _with_options(run, command, parameter, options)

    return decorate


def _with_options(
    run: Any, command: Command, parameter: str, options: Mapping[str, inspect.Parameter]
) -> Command:
    """Give `run` the signature of a command with options in the place of a parameter."""
    signature, parameters = inspect.signature(command, eval_str=True), []
    for old in signature.parameters.values():
        found = options.values() if old.name == parameter else [old]
        parameters += [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in found]
    run.__signature__ = signature.replace(parameters=parameters)
    run.__annotations__ = {p.name: p.annotation for p in parameters}
    del run.__wrapped__  # typer is to read this signature
    return run


def _name_flags(exc: RecipeError, spelled: Mapping[str, Sequence[str]]) -> RecipeError:
    """Return an error about a field as one about its flag."""
    key, colon, reason = str(exc).partition(": ")
    if key not in spelled or not colon:
        return exc
    reason = re.sub(r"\b[a-z]+_[a-z_]+\b", lambda m: spelled.get(m[0], (m[0],))[0], reason)
    return RecipeError(f"{spelled[key][0]}: {reason}")


def _help(kind: type, field: dataclasses.Field) -> str:
    """Return a field's description: from its annotation, or from the docstring of its class."""
    if get_origin(field.type) is Annotated and isinstance(text := get_args(field.type)[1], str):
        return text
    text = descriptions(kind)[field.name]
    return text[0].upper() + text[1:]


def _option_type(annotation: Any) -> tuple[Any, str | None]:
    """Return the type of what is given on the command line, and its choices where there are."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _option_type(arguments[0])
    if origin in (Union, UnionType):
        return _option_type(next(part for part in arguments if part is not NoneType))
    if origin is Literal:
        return type(arguments[0]), "|".join(map(str, arguments))
    return (list[str] if origin is tuple else annotation), None
