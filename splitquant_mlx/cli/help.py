"""Help in panels that fit 80 columns, with unbroken option names and an example at the end."""

import re
from typing import Any

import typer
import typer.core
from pydantic import ValidationError

from splitquant_mlx.settings import problem

# UsageError of click, which some versions of typer vendor
UsageError: type[Exception] = typer.BadParameter.__mro__[1]
COMMON = "Common"  # panel of options without a panel
GLOBAL_OPTIONS = (
    ("--quiet", "Print results and errors only."),
    ("--debug", "Show the traceback of an error."),
    ("-h, --help", "Show this help."),
)
MAX_COLUMNS = 100
# commands of mlx-lm, ollama, LM Studio and llama.cpp -> commands of this program
ALIASES = {
    **dict.fromkeys(("list", "ls", "ps"), "models"),
    **dict.fromkeys(("info", "show"), "inspect"),
    **dict.fromkeys(("pull", "download", "get", "create", "quantize", "import"), "convert"),
    **dict.fromkeys(("server", "start"), "serve"),
    **dict.fromkeys(("evaluate", "perplexity", "ppl"), "eval"),
    **dict.fromkeys(("benchmark", "speed"), "bench"),
    **dict.fromkeys(("push", "share"), "upload"),
    **dict.fromkeys(("check", "test"), "verify"),
    **dict.fromkeys(("completion", "completions"), "--install-completion"),
}
NAMES_COLUMNS = 30


class Command(typer.core.TyperCommand):
    """A command with help by `print_help`; its epilog is the example."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Parse a command line; errors name the likely intention."""
        try:
            return super().parse_args(ctx, args)
        except UsageError as exc:
            raise UsageError(_explain_usage_error(exc, self.params), ctx) from exc

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Print the help."""
        print_help(self, ctx)


def _explain_usage_error(exc: Any, parameters: list[Any]) -> str:
    """Return a message with the likely intention or the expected value."""
    text = exc.format_message()
    if near := getattr(exc, "possibilities", None):
        return f"No such option: {exc.option_name}. Did you mean {near[0]}?"
    extra = re.search(r"unexpected extra .*\((.*)\)$", text)
    if extra and any("--mlx-path" in parameter.opts[:1] for parameter in parameters):
        return f"unexpected argument {extra[1]}: the directory to write is --mlx-path"
    if isinstance(exc.__cause__, ValidationError):
        reason = problem(exc.__cause__).text
        reason = re.sub(r"^('.*') is not one of (.*)\.$", r"expected one of \2, got \1", reason)
        return f"{exc.param.opts[0]}: {reason}"
    return text


class Group(typer.core.TyperGroup):
    """A group of commands with help by `print_help` and errors for commands of other programs."""

    def resolve_command(self, ctx: Any, args: list[str]) -> tuple[str | None, Any, list[str]]:
        """Find a command; `help` is --help, and the error for an alias names the command."""
        if args[0] == "help" and "help" not in self.commands:
            name, command, _ = super().resolve_command(ctx, args[1:] or ["--help"])
            return name, command, ["--help"]
        try:
            return super().resolve_command(ctx, args)
        except UsageError as exc:
            name = ALIASES.get(args[0], "")
            if name in self.commands or name.startswith("--"):
                exc.message = f"there is no command {args[0]!r}: use {name!r}"  # type: ignore[attr-defined]
            raise

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Print the help."""
        print_help(self, ctx)


def print_help(command: Any, ctx: Any) -> None:
    """Print usage, description, panels of options and commands, and the example."""
    from rich.console import Console
    from rich.markup import escape

    console = Console(highlight=False)
    console.width = min(console.width, MAX_COLUMNS)
    console.print(f"[bold]Usage:[/] {escape(f'{ctx.command_path} {_usage(command)}')}\n")
    console.print(escape(command.help or "") + "\n")
    panels: dict[str, list[tuple[str, str]]] = {COMMON: []}
    for name in getattr(command, "list_commands", lambda ctx: [])(ctx):
        if not (subcommand := command.get_command(ctx, name)).hidden:
            panels.setdefault(subcommand.rich_help_panel or "Commands", []).append(
                (name, subcommand.get_short_help_str(200))
            )
    for parameter in command.params:
        if not getattr(parameter, "hidden", False):
            panel = parameter.rich_help_panel or COMMON
            panels.setdefault(panel, []).append((_names(parameter), _text(parameter)))
    panels["Global options"] = list(GLOBAL_OPTIONS)
    for title, rows in panels.items():
        if rows:
            console.print(_panel(title, rows))
    if command.epilog:
        console.print(escape(command.epilog))


def _usage(command: Any) -> str:
    """Return the usage after the command's name, with optional arguments in brackets."""
    pieces = ["[OPTIONS]"]
    for parameter in command.params:
        if parameter.param_type_name == "argument":
            name = _names(parameter)
            optional = not parameter.required and not name.startswith("[")
            pieces.append(f"[{name}]" if optional else name)
    return " ".join(pieces) + (" COMMAND" if hasattr(command, "commands") else "")


def _panel(title: str, rows: list[tuple[str, str]]) -> Any:
    from rich.panel import Panel
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, show_header=False, padding=(0, 1, 0, 0), expand=True)
    width = min(NAMES_COLUMNS, max(len(names) for names, _ in rows) + 2)
    table.add_column(width=width, overflow="fold")
    table.add_column(ratio=1)
    for names, text in rows:
        table.add_row(Text(names, style="cyan"), Text(text))
    return Panel(table, title=title, title_align="left", border_style="dim")


def _names(parameter: Any) -> str:
    """Return the short and the first long option, and the placeholder of the value."""
    if parameter.param_type_name == "argument":
        return str(parameter.metavar or parameter.name.upper())
    short = [name for name in parameter.opts if not name.startswith("--")]
    long = [name for name in parameter.opts if name.startswith("--")]
    names = ", ".join([*short, *long[:1]])
    if parameter.is_flag:
        return names
    word = long[0].rpartition("-")[2].upper()
    whole = f"{names} {parameter.metavar or word}"
    return whole if len(whole) <= NAMES_COLUMNS else f"{names} {word}"


def _text(parameter: Any) -> str:
    """Return the help text, other option names and the default."""
    text = parameter.help or ""
    long = [name for name in parameter.opts if name.startswith("--")]
    more = [f"also {', '.join(long[1:])}"] if len(long) > 1 else []
    default = parameter.default
    if parameter.required:
        more.append("required")
    elif isinstance(default, int | float | str) and not isinstance(default, bool):
        more.append(f"default: {default}")
    elif isinstance(default, list | tuple) and default:
        more.append(f"default: {', '.join(map(str, default))}")
    if parameter.envvar:
        more.append(f"or ${parameter.envvar}")
    return f"{text} [{'; '.join(more)}]".strip() if more else text
