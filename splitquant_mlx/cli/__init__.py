"""Command line of the library: a command parses its options, makes one call and prints the result.

Exit codes: 0 on success, 2 after an error, which is one line on stderr, 128 plus the signal number
after an interrupt (130 after Ctrl-C).
"""

import sys
import traceback
import warnings
from typing import Any

import typer

from splitquant_mlx._version import __version__
from splitquant_mlx.cli import console, interrupt
from splitquant_mlx.cli.bench import Bench, bench
from splitquant_mlx.cli.chat import chat
from splitquant_mlx.cli.console import plain, printable
from splitquant_mlx.cli.convert import convert
from splitquant_mlx.cli.demo import demo
from splitquant_mlx.cli.doctor import doctor
from splitquant_mlx.cli.eval import evaluate
from splitquant_mlx.cli.generate import generate
from splitquant_mlx.cli.help import Command, Group, UsageError
from splitquant_mlx.cli.inspect import inspect
from splitquant_mlx.cli.launched import launched_rank, only_rank_0_prints
from splitquant_mlx.cli.library import cache, models
from splitquant_mlx.cli.report import report
from splitquant_mlx.cli.run import run as run_study
from splitquant_mlx.cli.serve import serve
from splitquant_mlx.cli.upload import upload
from splitquant_mlx.cli.verify import verify
from splitquant_mlx.errors import RankError, SplitQuantError, SplitQuantWarning
from splitquant_mlx.models.hub import hide_token

PROGRAM = "splitquant-mlx"
VARIABLES = (
    "Variables: SPLITQUANT_MODEL (model of commands without one), SPLITQUANT_CACHE (cache "
    "directory), SPLITQUANT_API_KEY (key of serve), SPLITQUANT_MEMORY_CHECK (off: run even if "
    "memory is too small), NO_COLOR, and HF_HOME, HF_TOKEN and HF_HUB_OFFLINE of the hub: see "
    "docs/configuration.md.\n"
    "Exit codes: 0 success, 2 error, 130 interrupted (Ctrl-C)."
)

app = typer.Typer(
    name=PROGRAM,
    cls=Group,
    help="Low-bit LLMs on Apple silicon without a calibration data set: SplitQuantV2 for MLX.",
    epilog=VARIABLES,
    invoke_without_command=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _add(panel: str, name: str, function: object, example: str) -> None:
    app.command(
        name,
        cls=Command,
        rich_help_panel=panel,
        epilog=f"Example: {PROGRAM} {example}",
    )(function)  # type: ignore[type-var]


EVERYDAY, MEASURE, PUBLISH = "Everyday", "Inspect and measure", "Publish"
_add(EVERYDAY, "convert", convert, "convert meta-llama/Llama-3.2-1B-Instruct --method auto")
_add(EVERYDAY, "chat", chat, "chat Llama-3.2-1B-Instruct-auto-4.5bpw")
_add(EVERYDAY, "generate", generate, "generate Llama-3.2-1B-Instruct-auto-4.5bpw -p 'Hello'")
_add(EVERYDAY, "serve", serve, "serve Llama-3.2-1B-Instruct-auto-4.5bpw")
_add(EVERYDAY, "models", models, "models")
_add(EVERYDAY, "cache", cache, "cache --clear")
_add(EVERYDAY, "demo", demo, "demo")
_add(MEASURE, "inspect", inspect, "inspect Llama-3.2-1B-Instruct-auto-4.5bpw --layers")
_add(MEASURE, "verify", verify, "verify Llama-3.2-1B-Instruct-auto-4.5bpw")
_add(MEASURE, "eval", evaluate, "eval my-model --task kl --reference meta-llama/Llama-3.2-1B")
_add(MEASURE, "doctor", doctor, "doctor")
_add(PUBLISH, "run", run_study, "run recipes/tiny.toml --model my-model")
_add(PUBLISH, "report", report, "report results/tiny")
_add(PUBLISH, "upload", upload, "upload my-model --upload-repo me/my-model --dry-run")
app.add_typer(
    bench,
    name="bench",
    cls=Bench,
    rich_help_panel=MEASURE,
    help="Measure speed and memory of models and conversions.",
    epilog=f"Example: {PROGRAM} bench my-model --against my-other-model",
)


def _print_version(requested: bool) -> None:
    if requested:
        print(f"{PROGRAM} {__version__}")
        raise typer.Exit()


@app.callback(epilog=VARIABLES)
def _options(
    context: typer.Context,
    version: bool = typer.Option(
        False, "--version", callback=_print_version, is_eager=True, help="Show the version."
    ),
) -> None:
    if context.invoked_subcommand is None:
        context.get_help()


def run(arguments: list[str], *, debug: bool = False) -> int:
    """Run a command line and return its exit code.

    `--quiet` and `--debug` may be anywhere in it. Ranks fail together and rank 0 prints the error;
    an error known to one rank only is printed by that rank.
    """
    debug = debug or "--debug" in arguments
    console.set_quiet("--quiet" in arguments)
    arguments = [argument for argument in arguments if argument not in ("--quiet", "--debug")]
    with interrupt.watch_signals():
        return _run(arguments, debug=debug)


def _run(arguments: list[str], *, debug: bool) -> int:
    rank, prefix = launched_rank(), ""
    warnings.showwarning = _show_warning
    try:
        with only_rank_0_prints():
            code = app(arguments, prog_name=PROGRAM, standalone_mode=False) or 0
        if code != 130:
            return code
        raise KeyboardInterrupt  # typer converts it to this exit code
    except SplitQuantError as exc:
        message, cause = str(exc), exc
        prefix = f"rank {rank}: " if isinstance(exc, RankError) and rank else ""
    except (KeyboardInterrupt, typer.Abort):
        if not rank:
            print(f"{interrupt.line_break()}{interrupt.message()}", file=sys.stderr)
        return interrupt.exit_code()
    except UsageError as exc:
        context = getattr(exc, "ctx", None)
        command = context.command_path if context else PROGRAM
        text = exc.format_message() or "expected a command, got none"  # type: ignore[attr-defined]
        message, cause = f"{text} (see {command} --help)", exc
    except BrokenPipeError:
        sys.stderr.close()  # the reader of the output has exited
        return 2
    except Exception as exc:
        message, cause = f"unexpected {type(exc).__name__}: {exc} (--debug shows where)", exc
        prefix = f"rank {rank}: " if rank else ""
    if rank and not prefix:
        return 2
    if debug:
        text = "".join(traceback.format_exception(cause))
        print(printable(hide_token(text)), end="", file=sys.stderr)
    console.print_stderr(f"{PROGRAM}: error: {prefix}{plain(hide_token(message))}")
    return 2


def _show_warning(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, *_: Any
) -> None:
    """Print warnings of this package on one line, and those of other packages as Python does."""
    if issubclass(category, SplitQuantWarning):
        console.print_stderr(f"{PROGRAM}: note: {plain(hide_token(str(message)))}")
    else:
        print(warnings.formatwarning(message, category, filename, lineno), end="", file=sys.stderr)
