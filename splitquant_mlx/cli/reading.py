"""Read messages from a prompt with history and editing, or line by line from a pipe."""

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
    """Iterator over messages; at the prompt, two Ctrl-C in a row end it.

    Args:
        interactive: whether input and output are a terminal.
        commands: commands to complete with Tab.
    """

    def __init__(self, interactive: bool, commands: Sequence[str] = ()) -> None:
        self._read_line = _prompt(commands) if interactive else lambda prompt: input()
        self._interactive = interactive

    def __iter__(self) -> Iterator[str]:
        warned = False
        while True:
            try:
                if warned:  # inside `try`, as a second Ctrl-C may arrive before it is printed
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
        """Return a line, or the lines between triple quotes."""
        line = self._read_line("you> ")
        if not line.startswith(QUOTES):
            return line
        lines = [line.removeprefix(QUOTES)]
        while not lines[-1].rstrip().endswith(QUOTES):
            lines.append(self._read_line("...> "))
        lines[-1] = lines[-1].rstrip().removesuffix(QUOTES)
        return "\n".join(lines).strip("\n")


@contextmanager
def no_echo() -> Iterator[None]:
    """Turn off the echo of typed keys, such as ^C."""
    try:
        before = termios.tcgetattr(sys.stdin)
    except (OSError, ValueError, termios.error):  # no terminal
        yield
        return
    attributes = [*before]
    attributes[3] &= ~termios.ECHO
    termios.tcsetattr(sys.stdin, termios.TCSANOW, attributes)
    try:
        yield
    finally:
        termios.tcsetattr(sys.stdin, termios.TCSANOW, before)


def _prompt(commands: Sequence[str]) -> Any:
    """Return a function that reads a line, with the history of earlier sessions."""
    os.environ.setdefault("PROMPT_TOOLKIT_NO_CPR", "1")  # send no queries to the terminal
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

    def read_line(prompt: str) -> str:
        with _terminal_restored():
            return session.prompt(ANSI(f"{bold[0]}{prompt.rstrip()}{bold[1]} "))

    return read_line


@contextmanager
def _terminal_restored() -> Iterator[None]:
    """Restore the terminal if a signal ends the process at the prompt."""
    before = termios.tcgetattr(sys.stdin)

    def end(signum: int, frame: object) -> None:
        termios.tcsetattr(sys.stdin, termios.TCSANOW, before)
        signal.signal(signum, signal.SIG_DFL)
        os.kill(os.getpid(), signum)

    with handling(end, signal.SIGTERM, signal.SIGHUP):
        yield
