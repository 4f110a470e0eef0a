"""Be one of several processes that `mlx.launch` or `mpirun` started: only rank 0 speaks for all."""

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from typing import Any

from splitquant_mlx.errors import RankError

RANKS = ("MLX_RANK", "OMPI_COMM_WORLD_RANK")
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
GRACE_S = 3.0


def launched_rank() -> int:
    """Return the rank that the launcher gave this process, before mlx is asked; 0 without one."""
    found = next((os.environ[name] for name in RANKS if name in os.environ), "")
    return int(found) if found.isdecimal() else 0


@contextmanager
def only_rank_0_prints() -> Iterator[None]:
    """Let nothing through to standard output but what rank 0 prints."""
    if not launched_rank():
        yield
        return
    with open(os.devnull, "w", encoding="utf-8") as nowhere, redirect_stdout(nowhere):
        yield


def join() -> Any:
    """Return the group of ranks, of one if this process was not launched; see `distributed.join`.

    From here on a signal ends the process even where mlx waits for another rank. While it joins,
    Python cannot react to one at all.
    """
    from splitquant_mlx import distributed

    handlers = {number: signal.getsignal(number) for number in SIGNALS}
    for number, handler in handlers.items():
        if handler != signal.SIG_IGN:  # as nohup makes it
            signal.signal(number, signal.SIG_DFL)
    try:
        group = distributed.join()
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    if not distributed.alone(group):
        _end_on_signal()
    elif launched_rank():
        raise RankError("mlx finds no other rank: start all of them with mlx.launch")
    return group


def _end_on_signal() -> None:
    """Give the main thread some time to end after a signal, then end the process."""
    heard, told = os.pipe()
    os.set_blocking(told, False)
    signal.set_wakeup_fd(told, warn_on_full_buffer=False)

    def watch() -> None:
        os.read(heard, 1)
        time.sleep(GRACE_S)
        os._exit(2)

    threading.Thread(target=watch, daemon=True).start()
