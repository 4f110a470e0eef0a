"""Be one of several processes that `mlx.launch` or `mpirun` started: only rank 0 speaks for all."""

import os
import signal
import socket
import stat
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from typing import Any

from splitquant_mlx.cli.signals import ENDING, handling
from splitquant_mlx.errors import RankError

RANKS = ("MLX_RANK", "OMPI_COMM_WORLD_RANK")
IDLE_S = 5.0  # without any work, once another rank is gone


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

    From here on the end of another rank ends this process, too. While it joins, Python cannot react
    to a signal at all.
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
    """End the process when a connection is closed at the other end and nothing is done any more.

    mlx's ring mostly raises an error then, but waits for ever for what is sent after it has given
    a connection up.
    """
    connections = [socket.socket(fileno=os.dup(descriptor)) for descriptor in descriptors]

    def watch() -> None:
        while not any(map(_closed, connections)):
            time.sleep(1)
        while True:
            worked = time.process_time()
            time.sleep(IDLE_S)
            if time.process_time() - worked < IDLE_S / 100:
                sys.stdout.flush()
                lost = "splitquant-mlx: error: the connection to another rank was lost"
                print(f"{lost}: it has ended, start all of them again", file=sys.stderr, flush=True)
                os._exit(2)

    threading.Thread(target=watch, daemon=True).start()


def _sockets() -> set[int]:
    """Return the file descriptors that are sockets."""
    found = set()
    for name in os.listdir("/dev/fd"):
        try:
            if stat.S_ISSOCK(os.fstat(int(name)).st_mode):
                found.add(int(name))
        except OSError:  # that of the listing itself
            continue
    return found


def _closed(connection: socket.socket) -> bool:
    try:
        return not connection.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT)
    except ConnectionError:
        return True
    except OSError:  # nothing to read, or no connection
        return False
