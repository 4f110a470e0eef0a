"""Command-line options generated from settings classes, with their types, defaults and help."""

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

Given = dict[str, Any]  # values given on the command line, by field name
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
    """Replace a parameter of a command by one option per field of a settings class.

    The command receives the given values as a dict in `parameter`. In an error about a field, the
    flags replace the names of fields.

    Args:
        kind: settings class.
        parameter: name of the command's parameter, annotated as `Given`.
        flags: flags by field name, other than `--field-name`.
        skip: fields without an option.
        panel: heading of the options in the help.
        panels: other headings, by field name.
        variables: environment variables of options, by field name.
        with_defaults: show the defaults of the fields.
    """
    fields = [field for field in dataclasses.fields(kind) if field.name not in skip]
    flags_of = {field.name: (f"--{field.name.replace('_', '-')}",) for field in fields}
    flags_of |= dict(flags or {})
    options, headings = {}, {field.name: panel for field in fields} | dict(panels or {})
    for field in fields:
        option_type, choices = _option_type(field.type)
        option = typer.Option(
            *flags_of[field.name],
            help=_help(kind, field),
            metavar=choices,
            envvar=(variables or {}).get(field.name),
            rich_help_panel=headings[field.name],
        )
        options[field.name] = inspect.Parameter(
            f"{parameter}_{field.name}",
            inspect.Parameter.KEYWORD_ONLY,
            default=field.default if with_defaults and field.default != () else None,
            annotation=Annotated[option_type | None, option],
        )

    def decorate(command: Command) -> Command:
        @wraps(command)
        def run(**arguments: Any) -> Any:
            values = {name: arguments.pop(f"{parameter}_{name}") for name in options}
            given = {name: value for name, value in values.items() if value not in (None, [])}
            try:
                return command(**arguments, **{parameter: given})
            except RecipeError as exc:
                raise _name_flags(exc, flags_of) from exc

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
            values = kind(**{name: arguments.pop(name) for name in options})
            return command(**arguments, **{parameter: values})

        return _with_options(run, command, parameter, options)

    return decorate


def _with_options(
    run: Any, command: Command, parameter: str, options: Mapping[str, inspect.Parameter]
) -> Command:
    """Give `run` the signature of a command with options in place of a parameter."""
    signature, parameters = inspect.signature(command, eval_str=True), []
    for old in signature.parameters.values():
        new = options.values() if old.name == parameter else [old]
        parameters += [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in new]
    run.__signature__ = signature.replace(parameters=parameters)
    run.__annotations__ = {p.name: p.annotation for p in parameters}
    del run.__wrapped__  # else typer reads the signature of the command
    return run


def _name_flags(exc: RecipeError, flags: Mapping[str, Sequence[str]]) -> RecipeError:
    """Return an error with the names of fields replaced by their flags."""
    if exc.field not in flags:
        return exc
    reason = re.sub(r"\b[a-z]+_[a-z_]+\b", lambda m: flags.get(m[0], (m[0],))[0], exc.reason)
    return RecipeError(reason, field=flags[exc.field][0])


def _help(kind: type, field: dataclasses.Field) -> str:
    """Return a field's description from its annotation or from the docstring of its class."""
    if get_origin(field.type) is Annotated and isinstance(text := get_args(field.type)[1], str):
        return text
    text = descriptions(kind)[field.name]
    return text[0].upper() + text[1:]


def _option_type(annotation: Any) -> tuple[Any, str | None]:
    """Return the type of an option and its choices, or None, from the type of a field."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _option_type(arguments[0])
    if origin in (Union, UnionType):
        return _option_type(next(part for part in arguments if part is not NoneType))
    if origin is Literal:
        return type(arguments[0]), "|".join(map(str, arguments))
    return (list[str] if origin is tuple else annotation), None
