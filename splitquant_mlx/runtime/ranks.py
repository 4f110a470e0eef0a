"""Work as one of several processes, the ranks of a group, which `mlx.launch` starts alike.

Whatever ranks tell each other goes through `gather`, as JSON, and a rank that fails says so in
place of its next message: the others fail with it, rather than wait for it. A group of None, or of
one, asks nobody.
"""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, TypeVar

import mlx.core as mx
import numpy as np

from splitquant_mlx.errors import FailedElsewhere, RankError, one_line

Group = mx.distributed.Group
BACKENDS = ("[ring]", "[jaccl]", "[mpi]", "[nccl]")  # how their messages begin
T = TypeVar("T")


def join() -> Group:
    """Join the other ranks, if this process was launched as one of many.

    Raises:
        RankError: when they cannot be reached.
    """
    try:
        return mx.distributed.init()
    except RuntimeError as exc:
        raise RankError(
            f"cannot join the other ranks: {one_line(exc)}: start all of them with mlx.launch"
        ) from exc


def gather(group: Group | None, value: T) -> list[T]:
    """Return the value of every rank, which JSON must be able to hold; all ranks call this.

    Raises:
        FailedElsewhere: when another rank has failed.
        RankError: when one is gone.
    """
    if group is None or is_single_rank(group):
        return [value]
    return [message["value"] for message in _exchange(group, {"value": value})]


@contextmanager
def fail_together(group: Group | None) -> Iterator[None]:
    """Do on all ranks what may fail on one: then it fails on all.

    Raises:
        FailedElsewhere: where the error is another rank's.
        RankError: when one is gone.
    """
    try:
        yield
    except (FailedElsewhere, RankError):  # of which all have heard
        raise
    except Exception as exc:
        if group is not None and not is_single_rank(group):
            with suppress(FailedElsewhere, RankError):
                _exchange(group, {"failed": one_line(exc)})
        raise
    gather(group, None)


@contextmanager
def connected() -> Iterator[None]:
    """Turn mlx's error on a rank that is gone into RankError."""
    try:
        yield
    except RuntimeError as exc:
        if not str(exc).startswith(BACKENDS):
            raise
        raise RankError(f"the connection to another rank was lost: {one_line(exc)}") from exc


def check_alike(group: Group | None, what: str, value: Any) -> None:
    """Raise FailedElsewhere on every rank when `value`, of `what`, is not the same on all."""
    for rank, other in enumerate(values := gather(group, value)):
        if other != values[0]:
            raise FailedElsewhere(f"rank {rank} has another {what} than rank 0: give both the same")


def shard(group: Group | None, items: Any) -> Any:
    """Return what of `items`, a list or array, is this rank's to do; see `unshard`."""
    return items if group is None else items[group.rank() :: group.size()]


def unshard(group: Group | None, found: list[T]) -> list[T]:
    """Return what all ranks found for the items dealt to them, in the order of the items."""
    shares = gather(group, found)
    merged: list[Any] = [None] * sum(map(len, shares))
    for rank, share in enumerate(shares):
        merged[rank :: len(shares)] = share
    return merged


def follow_rank_0(
    group: Group | None, sampler: Callable[[mx.array], mx.array]
) -> Callable[[mx.array], mx.array]:
    """Make all ranks take the token that rank 0 samples.

    Their random numbers differ, and where their chips do, so may their logits in the last digit.
    """
    if group is None or is_single_rank(group):
        return sampler

    def sample(logprobs: mx.array) -> mx.array:
        token = sampler(logprobs)
        own = token if group.rank() == 0 else mx.zeros_like(token)
        return mx.distributed.all_sum(own, group=group)

    return sample


def drain(group: Group | None, stream: Any) -> None:
    """Wait until all ranks have done what mlx computes ahead on `stream`, as mlx-lm has it do.

    A rank that left earlier would break off what the others are still doing.
    """
    if not is_single_rank(group):
        with connected():
            mx.synchronize(stream)
        gather(group, None)


def is_single_rank(group: Group | None) -> bool:
    """Say whether there are no other ranks."""
    return group is None or group.size() == 1


def _exchange(group: Group, message: dict[str, Any]) -> list[dict[str, Any]]:
    content = np.frombuffer(json.dumps(message).encode(), np.uint8)
    with connected():
        sizes = _all_gather(group, np.array([content.size], np.int32))
        rows = _all_gather(group, np.pad(content, (0, sizes.max() - content.size))[None])
    try:
        messages = [json.loads(row[:size].tobytes()) for row, size in zip(rows, sizes, strict=True)]
    except ValueError as exc:  # a backend may hand out noise when a peer is gone
        raise RankError("the connection to another rank was lost: its message is broken") from exc
    for rank, other in enumerate(messages):
        if "failed" in other:
            raise FailedElsewhere(f"rank {rank}: {other['failed']}")
    return messages


def _all_gather(group: Group, array: np.ndarray) -> np.ndarray:
    return np.array(mx.distributed.all_gather(mx.array(array), group=group, stream=mx.cpu))
