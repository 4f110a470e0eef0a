"""Handle signals for the time of a block."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@contextmanager
def handling(handler: Any, *numbers: signal.Signals) -> Iterator[None]:
    """Have `handler` take signals in the block; those that are ignored, as under nohup, stay so."""
    before = {number: signal.getsignal(number) for number in numbers}
    for number, own in before.items():
        if own != signal.SIG_IGN:
            signal.signal(number, handler)
    try:
        yield
    finally:
        for number, own in before.items():
            signal.signal(number, own)
