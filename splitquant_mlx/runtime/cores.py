"""Run functions side by side on the cores of a CPU.

On Linux mlx computes all but products of matrices in one thread, and the threads of OpenBLAS wait
for each other at every product: beside another program that computes, a step of sampling took 4.0 s
for 0.4 s. With a part of the texts for each core, and products in the thread that asks for them,
all cores are busy, and a busy machine costs what it takes (0.7 s).
"""

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, wait
from functools import cache
from queue import SimpleQueue
from threading import Lock, Thread, current_thread
from typing import Any, TypeVar

import mlx.core as mx
import mlx.nn as nn

from splitquant_mlx.runtime.blas import one_thread

NAME = "core"  # of the threads
MOST = 4  # each has the arrays between two layers to itself
Result = TypeVar("Result")


def cores() -> int:
    """Return how many functions are faster side by side than one after the other: 1 on a GPU."""
    return min(os.cpu_count() or 1, MOST) if mx.default_device() == mx.cpu else 1


def side_by_side(functions: Sequence[Callable[[], Result]]) -> list[Result]:
    """Return what functions return, at most `cores()` of them at a time.

    Each evaluates the arrays that it makes. Arrays that all of them use are evaluated before.
    Called by one of them, it calls one after the other.
    """
    if min(cores(), len(functions)) == 1 or current_thread().name == NAME:
        return [function() for function in functions]
    with one_thread():
        futures: list[Future[Result]] = [Future() for _ in functions]
        for work in zip(futures, functions, strict=True):
            _queue().put(work)
        try:
            return [future.result() for future in futures]
        finally:  # none of them goes on after an error, or Ctrl-C
            wait([future for future in futures if not future.cancel()])


def in_rounds(functions: Sequence[Callable[[], Result]]) -> Iterator[list[Result]]:
    """Yield what functions return, in order, as many together as are called side by side."""
    for start in range(0, len(functions), cores()):
        yield side_by_side(functions[start : start + cores()])


def one_at_a_time(
    call: Callable[..., Result], module: nn.Module | None = None
) -> Callable[..., Result]:
    """Return a function for threads: no call of it meets another.

    Args:
        call: may change, while it runs, what it shares with others.
        module: whose arrays it uses: they are at hand in every thread.
    """
    if cores() == 1:
        return call
    lock = Lock()

    def locked(*args: Any, **kwargs: Any) -> Result:
        with lock:
            found = call(*args, **kwargs)
            if module is not None:
                evaluate_arrays(module)
        return found

    if module is not None:
        evaluate_arrays(module)
    return locked


def evaluated(
    build: Callable[..., Result], module: nn.Module | None = None
) -> Callable[..., Result]:
    """Return `one_at_a_time` of `build`, with the arrays that it returns evaluated after that."""
    locked = one_at_a_time(build, module)

    def compute(*args: Any) -> Result:
        built = locked(*args)
        mx.eval(built)
        return built

    return compute


def evaluate_arrays(module: nn.Module) -> None:
    """Evaluate all arrays that a module holds, which then are at hand in every thread.

    Some models change them when they are called, Gemma 3n for one.
    """
    values = [value for part in module.modules() for value in part.values()]
    mx.eval([value for value in values if isinstance(value, mx.array)])


@cache
def _queue() -> "SimpleQueue[tuple[Future[Any], Callable[[], Any]]]":
    """Return what the threads take their work from.

    They do not end, as a process that exits while a thread that used mlx ends is aborted: one of
    four in a trial.
    """
    queue: SimpleQueue[tuple[Future[Any], Callable[[], Any]]] = SimpleQueue()
    for _ in range(cores()):
        Thread(target=_work, args=(queue,), name=NAME, daemon=True).start()
    return queue


def _work(queue: "SimpleQueue[tuple[Future[Any], Callable[[], Any]]]") -> None:
    while True:
        future, function = queue.get()
        if future.set_running_or_notify_cancel():
            try:
                future.set_result(function())
            except BaseException as exc:
                future.set_exception(exc)
        del future, function  # and the arrays that they hold
