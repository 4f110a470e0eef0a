"""Run functions in parallel threads on the cores of a CPU.

On Linux mlx runs everything except matrix products in one thread, and OpenBLAS synchronizes its
threads at every product. Beside another busy program a sampling step slowed from 0.4 s to 4.0 s.
With one batch per core and single-threaded products it takes 0.7 s.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from functools import cache
from queue import SimpleQueue
from threading import Lock, Thread, current_thread
from typing import Any, TypeVar

import mlx.core as mx
import mlx.nn as nn

from splitquant_mlx.runtime.blas import one_thread

THREAD_NAME = "core"
MAX_THREADS = 4  # each allocates its own activations
Result = TypeVar("Result")


def cores() -> int:
    """Return the number of functions to run in parallel: 1 on a GPU."""
    return min(os.cpu_count() or 1, MAX_THREADS) if mx.default_device() == mx.cpu else 1


def run_parallel(functions: Sequence[Callable[[], Result]]) -> list[Result]:
    """Call functions in parallel, at most `cores()` at a time, and return their results in order.

    Each function must evaluate the arrays it creates; arrays shared between functions must be
    evaluated before the call. A nested call runs its functions sequentially.
    """
    if min(cores(), len(functions)) == 1 or in_thread_of(THREAD_NAME):
        return [function() for function in functions]
    with one_thread():
        futures: list[Future[Result]] = [Future() for _ in functions]
        for task in zip(futures, functions, strict=True):
            _queue().put(task)
        try:
            return [future.result() for future in futures]
        finally:  # after an error or Ctrl-C no function keeps running
            wait([future for future in futures if not future.cancel()])


def run_rounds(functions: Sequence[Callable[[], Result]]) -> Iterator[list[Result]]:
    """Call functions in parallel, `cores()` at a time, and yield the results of each round."""
    for start in range(0, len(functions), cores()):
        yield run_parallel(functions[start : start + cores()])


def serialized(
    call: Callable[..., Result], module: nn.Module | None = None
) -> Callable[..., Result]:
    """Return a thread-safe version of a function: a lock serializes its calls.

    Args:
        call: function that may modify shared state while it runs.
        module: module whose arrays it uses. They are evaluated, so that every thread can read them.
    """
    if cores() == 1:
        return call
    lock = Lock()

    def locked(*args: Any, **kwargs: Any) -> Result:
        with lock:
            result = call(*args, **kwargs)
            if module is not None:
                evaluate_arrays(module)
        return result

    if module is not None:
        evaluate_arrays(module)
    return locked


def serialized_eval(
    build: Callable[..., Result], module: nn.Module | None = None
) -> Callable[..., Result]:
    """Return `serialized` of `build` that evaluates the returned arrays outside the lock."""
    locked = serialized(build, module)

    def compute(*args: Any) -> Result:
        result = locked(*args)
        mx.eval(result)
        return result

    return compute


def evaluate_arrays(module: nn.Module) -> None:
    """Evaluate all arrays of a module, so that every thread can read them.

    Some models replace arrays when called, such as Gemma 3n.
    """
    values = [value for part in module.modules() for value in part.values()]
    mx.eval([value for value in values if isinstance(value, mx.array)])


@cache
def executor(name: str, threads: int) -> ThreadPoolExecutor:
    """Return a cached thread pool: mlx leaks memory for each thread that uses it."""
    return ThreadPoolExecutor(threads, thread_name_prefix=name)


def in_thread_of(name: str) -> bool:
    """Return whether this is a thread of the pool `name`, whose tasks must not wait for others."""
    return current_thread().name.startswith(name)


@cache
def _queue() -> "SimpleQueue[tuple[Future[Any], Callable[[], Any]]]":
    """Start the threads and return their task queue.

    The threads never end: a process that exits while a thread that used mlx ends is aborted (one
    run in four).
    """
    queue: SimpleQueue[tuple[Future[Any], Callable[[], Any]]] = SimpleQueue()
    for _ in range(cores()):
        Thread(target=_run_tasks, args=(queue,), name=THREAD_NAME, daemon=True).start()
    return queue


def _run_tasks(queue: "SimpleQueue[tuple[Future[Any], Callable[[], Any]]]") -> None:
    while True:
        future, function = queue.get()
        if future.set_running_or_notify_cancel():
            try:
                future.set_result(function())
            except BaseException as exc:
                future.set_exception(exc)
        del future, function  # frees the arrays they reference
