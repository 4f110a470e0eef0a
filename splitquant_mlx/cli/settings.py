"""Command-line options made from settings classes: values and help stand on the class alone."""

import dataclasses
import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from functools import wraps
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

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
    """
    fields = [field for field in dataclasses.fields(kind) if field.name not in skip]
    spelled = {field.name: (f"--{field.name.replace('_', '-')}",) for field in fields}
    spelled |= dict(flags or {})
    options, help_panels = {}, {field.name: panel for field in fields} | dict(panels or {})
    for field in fields:
        name, words = f"{parameter}_{field.name}", spelled[field.name]
        options[field.name] = _option(kind, field, name, words, help_panels[field.name])

    def decorate(command: Command) -> Command:
        @wraps(command)
        def run(**arguments: Any) -> Any:
            values = {name: arguments.pop(f"{parameter}_{name}") for name in options}
            given = {name: value for name, value in values.items() if value not in (None, [])}
            try:
                return command(**arguments, **{parameter: given})
            except RecipeError as exc:
                raise _naming_flags(exc, spelled) from exc

        signature, parameters = inspect.signature(command, eval_str=True), []
        for old in signature.parameters.values():
            found = options.values() if old.name == parameter else [old]
            parameters += [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in found]
        run.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
        run.__annotations__ = {p.name: p.annotation for p in parameters}
        del run.__wrapped__  # typer is to read this signature
        return run

    return decorate


def _naming_flags(exc: RecipeError, spelled: Mapping[str, Sequence[str]]) -> RecipeError:
    """Return an error about a field as one about its flag."""
    key, colon, reason = str(exc).partition(": ")
    if key not in spelled or not colon:
        return exc
    reason = re.sub(r"\b[a-z]+_[a-z_]+\b", lambda m: spelled.get(m[0], (m[0],))[0], reason)
    return RecipeError(f"{spelled[key][0]}: {reason}")


def _option(
    kind: type, field: dataclasses.Field, name: str, flags: Sequence[str], panel: str | None
) -> inspect.Parameter:
    plain = _plain(field.type)
    choices = get_args(plain) if get_origin(plain) is Literal else ()
    if get_origin(plain) is tuple:
        plain = list[str]
    help_text = descriptions(kind)[field.name]
    option = typer.Option(
        *flags,
        help=help_text[0].upper() + help_text[1:],
        metavar="|".join(map(str, choices)) or None,
        rich_help_panel=panel,
    )
    annotation = Annotated[(type(choices[0]) if choices else plain) | None, option]  # type: ignore[operator]
    return inspect.Parameter(
        name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation
    )


def _plain(annotation: Any) -> Any:
    """Return a type without `Annotated` and `None`."""
    if get_origin(annotation) is Annotated:
        return _plain(get_args(annotation)[0])
    if get_origin(annotation) in (Union, UnionType):
        return _plain(next(part for part in get_args(annotation) if part is not NoneType))
    return annotation
