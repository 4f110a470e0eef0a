"""Offer the library on the command line: a command parses, makes one library call, renders."""

import signal
import sys
import traceback
import warnings
from types import FrameType
from typing import Any

import typer

from splitquant_mlx._version import __version__
from splitquant_mlx.cli.bench import bench
from splitquant_mlx.cli.chat import chat
from splitquant_mlx.cli.console import plain, printable
from splitquant_mlx.cli.convert import convert
from splitquant_mlx.cli.demo import demo
from splitquant_mlx.cli.doctor import doctor
from splitquant_mlx.cli.eval import evaluate
from splitquant_mlx.cli.generate import generate
from splitquant_mlx.cli.inspect import inspect
from splitquant_mlx.cli.launched import launched_rank, only_rank_0_prints
from splitquant_mlx.cli.report import report
from splitquant_mlx.cli.run import run as run_study
from splitquant_mlx.cli.serve import serve
from splitquant_mlx.cli.upload import upload
from splitquant_mlx.cli.verify import verify
from splitquant_mlx.errors import RankError, SplitQuantError, SplitQuantWarning
from splitquant_mlx.models.hub import hide_token

PROGRAM = "splitquant-mlx"
# click's UsageError, which typer brings along under a name of its own in some versions
UsageError: type[Exception] = typer.BadParameter.__mro__[1]

app = typer.Typer(
    name=PROGRAM,
    help="Low-bit LLMs on Apple silicon without a calibration data set: SplitQuantV2 for MLX.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command()(convert)
app.command()(generate)
app.command()(chat)
app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})(serve)
app.command()(upload)
app.command("eval")(evaluate)
app.command("run")(run_study)
app.command()(report)
app.command()(inspect)
app.command()(verify)
app.command()(doctor)
app.command()(demo)
app.add_typer(bench, name="bench", help="Measure speed and memory of models and conversions.")


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"{PROGRAM} {__version__}")
        raise typer.Exit()


@app.callback()
def _options(
    version: bool = typer.Option(
        False, "--version", callback=_print_version, is_eager=True, help="Show the version."
    ),
    debug: bool = typer.Option(False, "--debug", help="Show the traceback of an error."),
) -> None:
    pass


def run(arguments: list[str], *, debug: bool = False) -> int:
    """Run a command line and return its exit code: 0, or 2 after one line on stderr.

    Where there are ranks, they fail together, and rank 0 says why; what only one of them knows, it
    says itself.
    """
    rank, prefix = launched_rank(), ""
    warnings.showwarning = _show_note
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) != signal.SIG_IGN:  # as nohup makes it
            signal.signal(number, _interrupt)
    try:
        with only_rank_0_prints():
            code = app(arguments, prog_name=PROGRAM, standalone_mode=False) or 0
        if code != 130:
            return code
        raise KeyboardInterrupt  # which typer turned into this exit code
    except SplitQuantError as exc:
        message, cause = str(exc), exc
        prefix = f"rank {rank}: " if isinstance(exc, RankError) and rank else ""
    except (KeyboardInterrupt, typer.Abort) as exc:
        message, cause = "interrupted: nothing was left half-written", exc
    except UsageError as exc:
        context = getattr(exc, "ctx", None)
        command = context.command_path if context else PROGRAM
        text = exc.format_message()  # type: ignore[attr-defined]
        message, cause = f"{text} (see {command} --help)", exc
    except BrokenPipeError:
        sys.stderr.close()  # the reader of our output went away; there is nobody to tell
        return 2
    except Exception as exc:
        message, cause = f"unexpected {type(exc).__name__}: {exc} (--debug shows where)", exc
        prefix = f"rank {rank}: " if rank else ""
    if rank and not prefix:
        return 2
    if debug:
        shown = "".join(traceback.format_exception(cause))
        print(printable(hide_token(shown)), end="", file=sys.stderr)
    print(f"{PROGRAM}: error: {prefix}{plain(hide_token(message))}", file=sys.stderr)
    return 2


def _show_note(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, *_: Any
) -> None:
    """Print our own warnings on one line, and those of other packages as Python does."""
    if issubclass(category, SplitQuantWarning):
        print(f"{PROGRAM}: note: {plain(hide_token(str(message)))}", file=sys.stderr)
    else:
        print(warnings.formatwarning(message, category, filename, lineno), end="", file=sys.stderr)


def _interrupt(signum: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt
