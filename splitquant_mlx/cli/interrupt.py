"""Leave on a signal within two seconds, wherever it comes; a second one leaves at once.

Python runs a signal's handler, which raises KeyboardInterrupt, only between two bytecodes: not
while mlx computes or loads. A thread is told of the signal by the interpreter's C handler, and ends
the process where the main thread has not ended in time. What was being written is as after a kill.
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
RANKS_GRACE_S = 3.0  # for what they still have to tell one another
RESUMED = "Run the same command to go on."

_state = {"hint": "", "last": int(signal.SIGINT), "server": False}


def set_hint(hint: str = RESUMED) -> None:
    """Say what an interrupted command tells its user, from here on."""
    _state["hint"] = hint


def message() -> str:
    """Return the line for an interrupted command."""
    return f"Interrupted. {_state['hint']}".rstrip()


def line_break() -> str:
    """Return what ends the line that a terminal shows ^C on."""
    return "\n" if sys.stderr.isatty() else ""


def exit_code() -> int:
    """Return 128 and the number of the last signal, 130 after Ctrl-C; 0 of a server."""
    return 0 if _state["server"] else 128 + _state["last"]


def set_server() -> None:
    """Take a signal from here on as the ordinary end of the command, a server."""
    _state["server"] = True


@contextmanager
def watch_signals() -> Iterator[None]:
    """Turn signals into KeyboardInterrupt, and into an end of the process where that hangs."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    _state.update(hint="", last=int(signal.SIGINT), server=False)
    with handling(_interrupt, *ENDING), handle_signals(0):
        yield


@contextmanager
def handle_signals(signals: int = 1_000_000) -> Iterator[None]:
    """Let a block handle that many signals itself; the next one ends the process.

    Each block has a pipe of its own, so that a signal counts for the block that it came in,
    however late the thread hears of it.
    """
    heard, told = os.pipe()
    os.set_blocking(told, False)
    # an event loop, such as that of a prompt, takes the descriptor away while it runs
    before = signal.set_wakeup_fd(told, warn_on_full_buffer=False)
    thread = threading.Thread(target=_watch, args=(heard, signals), daemon=True)
    thread.start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(before)
        os.write(told, b"\0")  # ends the thread
        thread.join()
        os.close(told)
        os.close(heard)


def _interrupt(signum: int, frame: FrameType | None) -> None:
    _state["last"] = signum
    raise KeyboardInterrupt


def _watch(heard: int, handles: int) -> None:
    while number := os.read(heard, 1)[0]:
        if signal.getsignal(number) == signal.SIG_IGN:
            continue
        _state["last"] = number
        if handles:
            handles -= 1
            continue
        grace_s = RANKS_GRACE_S if any(name in os.environ for name in RANKS) else GRACE_S
        if select.select([heard], [], [], grace_s)[0] and not os.read(heard, 1)[0]:
            return
        leave()


def leave() -> None:
    """End the process now, with the cursor back that a progress bar may have hidden."""
    if not _state["server"]:
        shown = "\x1b[?25h\n" if sys.stderr.isatty() else ""
        os.write(2, f"{shown}{message()}\n".encode())
    os._exit(exit_code())
