"""Support for ranks started by `mlx.launch` or `mpirun`: only rank 0 prints."""

import os
import signal
import socket
import stat
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout, suppress
from typing import Any

from splitquant_mlx.cli.signals import ENDING, handling
from splitquant_mlx.errors import RankError

RANKS = ("MLX_RANK", "OMPI_COMM_WORLD_RANK")
IDLE_S = 5.0  # exit after this time without work, once another rank is gone


def launched_rank() -> int:
    """Return the rank that the launcher set in the environment; 0 without one."""
    rank = next((os.environ[name] for name in RANKS if name in os.environ), "")
    return int(rank) if rank.isdecimal() else 0


@contextmanager
def only_rank_0_prints() -> Iterator[None]:
    """Discard the standard output of all ranks except rank 0."""
    if not launched_rank():
        yield
        return
    with open(os.devnull, "w", encoding="utf-8") as devnull, redirect_stdout(devnull):
        yield


def join() -> Any:
    """Return the group of ranks; see `ranks.join`.

    Afterwards, this process ends when another rank ends. While it joins, Python cannot run signal
    handlers, so signals have their default action.
    """
    from splitquant_mlx.runtime import ranks as distributed

    before = _sockets()
    with handling(signal.SIG_DFL, *ENDING):
        group = distributed.join()
    if not distributed.is_single_rank(group):
        _exit_with_other_ranks(_sockets() - before)
    elif launched_rank():
        raise RankError("mlx finds no other rank: start all of them with mlx.launch")
    return group


def _exit_with_other_ranks(descriptors: set[int]) -> None:
    """End the process when a peer has closed a connection and this process is idle.

    mlx's ring backend usually raises an error then, but it may also wait forever.
    """
    connections = [socket.socket(fileno=os.dup(descriptor)) for descriptor in descriptors]

    def watch() -> None:
        while not any(map(_closed, connections)):
            time.sleep(1)
        while True:
            cpu_time = time.process_time()
            time.sleep(IDLE_S)
            if time.process_time() - cpu_time < IDLE_S / 100:
                sys.stdout.flush()
                lost = "splitquant-mlx: error: the connection to another rank was lost"
                print(f"{lost}: it has ended, restart all ranks", file=sys.stderr, flush=True)
                os._exit(2)

    threading.Thread(target=watch, daemon=True).start()


def _sockets() -> set[int]:
    """Return the file descriptors that are sockets."""
    sockets = set()
    for name in os.listdir("/dev/fd"):
        with suppress(OSError):  # the descriptor of the listing itself is closed
            if stat.S_ISSOCK(os.fstat(int(name)).st_mode):
                sockets.add(int(name))
    return sockets


def _closed(connection: socket.socket) -> bool:
    try:
        return not connection.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT)
    except ConnectionError:
        return True
    except OSError:  # no data, or not connected
        return False
