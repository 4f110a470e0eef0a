"""Exit within two seconds after a signal; a second signal exits immediately.

Python runs a signal handler, which raises KeyboardInterrupt, only between two bytecodes: not while
mlx computes or loads. The C handler of the interpreter also wakes up a thread, which ends the
process if the main thread has not ended in time. Files being written are left as after a kill.
"""

import os
import select
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from splitquant_mlx.cli.launched import RANKS
from splitquant_mlx.cli.signals import ENDING, handling

GRACE_S = 1.5
RANKS_GRACE_S = 3.0  # for the last messages between ranks
RESUME = "Run the same command to continue."

_state = {"hint": "", "last": int(signal.SIGINT), "server": False}


def set_hint(hint: str = RESUME) -> None:
    """Set the hint that an interrupted command prints."""
    _state["hint"] = hint


def message() -> str:
    """Return the message of an interrupted command."""
    return f"Interrupted. {_state['hint']}".rstrip()


def line_break() -> str:
    """Return a newline on a terminal, to end the line that shows ^C, else ""."""
    return "\n" if sys.stderr.isatty() else ""


def exit_code() -> int:
    """Return 128 plus the number of the last signal, 130 after Ctrl-C; 0 for a server."""
    return 0 if _state["server"] else 128 + _state["last"]


def set_server() -> None:
    """Mark the command as a server: a signal is its normal end."""
    _state["server"] = True


@contextmanager
def watch_signals() -> Iterator[None]:
    """Raise KeyboardInterrupt on signals, and end the process if that does not."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    _state.update(hint="", last=int(signal.SIGINT), server=False)
    with handling(_interrupt, *ENDING), handle_signals(0):
        yield


@contextmanager
def handle_signals(signals: int = 1_000_000) -> Iterator[None]:
    """Let the block handle that many signals; the next signal ends the process.

    Each block has its own pipe, so that a signal counts for the block in which it arrived, even if
    the thread reads it later.
    """
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    # an event loop, such as that of a prompt, replaces the descriptor while it runs
    before = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    thread = threading.Thread(target=_watch, args=(reader, signals), daemon=True)
    thread.start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(before)
        os.write(writer, b"\0")  # ends the thread
        thread.join()
        os.close(writer)
        os.close(reader)


def _interrupt(signum: int, frame: FrameType | None) -> None:
    _state["last"] = signum
    raise KeyboardInterrupt


def _watch(reader: int, handled: int) -> None:
    """End the process after a signal, except for the first `handled` ones."""
    while number := os.read(reader, 1)[0]:
        if signal.getsignal(number) == signal.SIG_IGN:
            continue
        _state["last"] = number
        if handled:
            handled -= 1
            continue
        grace_s = RANKS_GRACE_S if any(name in os.environ for name in RANKS) else GRACE_S
        if select.select([reader], [], [], grace_s)[0] and not os.read(reader, 1)[0]:
            return
        leave()


def leave() -> None:
    """End the process immediately; show the cursor, which a progress bar may have hidden."""
    if not _state["server"]:
        show_cursor = "\x1b[?25h\n" if sys.stderr.isatty() else ""
        os.write(2, f"{show_cursor}{message()}\n".encode())
    os._exit(exit_code())
