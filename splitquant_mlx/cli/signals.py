"""Handle signals during a block."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@contextmanager
def handling(handler: Any, *numbers: signal.Signals) -> Iterator[None]:
    """Set a signal handler for the block; ignored signals, as under nohup, stay ignored."""
    before = {number: signal.getsignal(number) for number in numbers}
    for number, previous in before.items():
        if previous != signal.SIG_IGN:
            signal.signal(number, handler)
    try:
        yield
    finally:
        for number, previous in before.items():
            signal.signal(number, previous)
