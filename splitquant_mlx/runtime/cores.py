"""Run functions side by side on the cores of a CPU.

On Linux mlx computes all but products of matrices in one thread, and the threads of OpenBLAS wait
for each other at every product: beside another program that computes, a step of sampling took 4.0 s
for 0.4 s. With a part of the texts for each core, and products in the thread that asks for them,
all cores are busy, and a busy machine costs what it takes (0.7 s).
"""

import os
from collections.abc import Callable, Sequence
from concurrent.futures import Future, wait
from functools import cache, partial
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


def evaluated_side_by_side(
    builds: Sequence[Callable[[], Result]], module: nn.Module | None = None
) -> list[Result]:
    """Return the arrays that functions make, evaluated at most `cores()` at a time.

    The functions are called one at a time, as they may change what they share, such as a module.
    """
    lock = Lock()

    def compute(build: Callable[[], Result]) -> Result:
        with lock:
            built = build()
            if module is not None:
                settle(module)
        mx.eval(built)
        return built

    if module is not None:
        settle(module)
    return side_by_side([partial(compute, build) for build in builds])


def one_call_at_a_time(model: nn.Module) -> Callable[..., mx.array]:
    """Return a model's call, for threads: its arrays are at hand, and no call meets another."""
    settle(model)
    lock = Lock()

    def call(*args: Any, **kwargs: Any) -> mx.array:
        with lock:
            y = model(*args, **kwargs)
            settle(model)
        return y

    return call


def settle(module: nn.Module) -> None:
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
