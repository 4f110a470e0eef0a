"""Read messages: at a prompt with history and editing, or line by line from a pipe."""

import os
import signal
import sys
import termios
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

from splitquant_mlx.cli.console import note
from splitquant_mlx.cli.signals import handling
from splitquant_mlx.runtime.cache import cache_directory

LEAVE = "Ctrl-C again, Ctrl-D or /exit leaves"
QUOTES = '"""'


class Reader:
    """Iterate over messages; at the prompt it takes two Ctrl-C in a row to leave.

    Args:
        interactive: whether there is a terminal on both ends.
        commands: to complete with Tab.
    """

    def __init__(self, interactive: bool, commands: Sequence[str] = ()) -> None:
        self._ask = _prompt(commands) if interactive else lambda mark: input()
        self._interactive = interactive

    def __iter__(self) -> Iterator[str]:
        warned = False
        while True:
            try:
                if warned:  # in here, for the second may come before the warning is out
                    note(LEAVE)
                message = self._message()
            except EOFError:
                return
            except KeyboardInterrupt:
                if warned or not self._interactive:
                    return
                warned = True
                continue
            warned = False
            yield message

    def _message(self) -> str:
        """Return a line, or what stands between triple quotes."""
        line = self._ask("you> ")
        if not line.startswith(QUOTES):
            return line
        lines = [line.removeprefix(QUOTES)]
        while not lines[-1].rstrip().endswith(QUOTES):
            lines.append(self._ask("...> "))
        lines[-1] = lines[-1].rstrip().removesuffix(QUOTES)
        return "\n".join(lines).strip("\n")


@contextmanager
def no_echo() -> Iterator[None]:
    """Keep what is typed meanwhile, ^C among it, out of what is printed."""
    try:
        before = termios.tcgetattr(sys.stdin)
    except (OSError, ValueError, termios.error):  # no terminal
        yield
        return
    silent = [*before]
    silent[3] &= ~termios.ECHO
    termios.tcsetattr(sys.stdin, termios.TCSANOW, silent)
    try:
        yield
    finally:
        termios.tcsetattr(sys.stdin, termios.TCSANOW, before)


def _prompt(commands: Sequence[str]) -> Any:
    """Return a function that asks for a line, with the history of earlier sessions."""
    os.environ.setdefault("PROMPT_TOOLKIT_NO_CPR", "1")  # ask the terminal for nothing
    from prompt_toolkit import PromptSession
    from prompt_toolkit.completion import WordCompleter
    from prompt_toolkit.formatted_text import ANSI
    from prompt_toolkit.history import FileHistory, InMemoryHistory

    history = InMemoryHistory()
    with suppress(OSError):
        file = cache_directory() / "chat_history"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch(mode=0o600)
        history = FileHistory(str(file))
    session: PromptSession[str] = PromptSession(
        history=history,
        completer=WordCompleter(list(commands), sentence=True),
        complete_while_typing=False,
    )
    bold = ("", "") if os.environ.get("NO_COLOR") else ("\x1b[1;34m", "\x1b[0m")

    def ask(mark: str) -> str:
        with _terminal_restored():
            return session.prompt(ANSI(f"{bold[0]}{mark.rstrip()}{bold[1]} "))

    return ask


@contextmanager
def _terminal_restored() -> Iterator[None]:
    """Leave the terminal as it was when a signal ends the process at the prompt."""
    before = termios.tcgetattr(sys.stdin)

    def end(signum: int, frame: object) -> None:
        termios.tcsetattr(sys.stdin, termios.TCSANOW, before)
        signal.signal(signum, signal.SIG_DFL)
        os.kill(os.getpid(), signum)

    with handling(end, signal.SIGTERM, signal.SIGHUP):
        yield
