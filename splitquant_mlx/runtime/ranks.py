"""Communication between the ranks of a distributed run started by `mlx.launch`.

Ranks exchange JSON messages through `gather`. A rank that fails sends its error in place of its
next message, so that the others fail with it instead of waiting. A group of None or of one rank
exchanges nothing.
"""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, TypeVar

import mlx.core as mx
import numpy as np

from splitquant_mlx.errors import FailedElsewhere, RankError, one_line

Group = mx.distributed.Group
BACKENDS = ("[ring]", "[jaccl]", "[mpi]", "[nccl]")  # prefixes of their error messages
T = TypeVar("T")


def join() -> Group:
    """Return the group of all ranks, of one rank if this process was started on its own.

    Raises:
        RankError: when the other ranks cannot be reached.
    """
    try:
        return mx.distributed.init()
    except RuntimeError as exc:
        raise RankError(
            f"cannot join the other ranks: {one_line(exc)}: start all of them with mlx.launch"
        ) from exc


def gather(group: Group | None, value: T) -> list[T]:
    """Return the JSON-serializable value of every rank; all ranks must call this.

    Raises:
        FailedElsewhere: when another rank has failed.
        RankError: when the connection to a rank is lost.
    """
    if group is None or is_single_rank(group):
        return [value]
    return [message["value"] for message in _exchange(group, {"value": value})]


@contextmanager
def fail_together(group: Group | None) -> Iterator[None]:
    """Make the block fail on all ranks when it fails on one.

    Raises:
        FailedElsewhere: when the block failed on another rank.
        RankError: when the connection to a rank is lost.
    """
    try:
        yield
    except (FailedElsewhere, RankError):  # known to all ranks
        raise
    except Exception as exc:
        if group is not None and not is_single_rank(group):
            with suppress(FailedElsewhere, RankError):
                _exchange(group, {"failed": one_line(exc)})
        raise
    gather(group, None)


@contextmanager
def connected() -> Iterator[None]:
    """Convert mlx's error about a lost connection into RankError."""
    try:
        yield
    except RuntimeError as exc:
        if not str(exc).startswith(BACKENDS):
            raise
        raise RankError(f"the connection to another rank was lost: {one_line(exc)}") from exc


def check_alike(group: Group | None, what: str, value: Any) -> None:
    """Raise FailedElsewhere on every rank when `value`, named `what`, differs between ranks."""
    for rank, other in enumerate(values := gather(group, value)):
        if other != values[0]:
            raise FailedElsewhere(f"rank {rank} has another {what} than rank 0: use one on all")


def shard(group: Group | None, items: Any) -> Any:
    """Return this rank's share of `items`, a list or array; `unshard` is the inverse."""
    return items if group is None else items[group.rank() :: group.size()]


def unshard(group: Group | None, results: list[T]) -> list[T]:
    """Return the results of all ranks for their shares, in the order of the items."""
    shares = gather(group, results)
    merged: list[Any] = [None] * sum(map(len, shares))
    for rank, share in enumerate(shares):
        merged[rank :: len(shares)] = share
    return merged


def follow_rank_0(
    group: Group | None, sampler: Callable[[mx.array], mx.array]
) -> Callable[[mx.array], mx.array]:
    """Return a sampler that yields the token of rank 0 on all ranks.

    Random states differ between ranks; on different chips so may the logits, by rounding.
    """
    if group is None or is_single_rank(group):
        return sampler

    def sample(logprobs: mx.array) -> mx.array:
        token = sampler(logprobs)
        term = token if group.rank() == 0 else mx.zeros_like(token)
        return mx.distributed.all_sum(term, group=group)

    return sample


def drain(group: Group | None, stream: Any) -> None:
    """Wait until all ranks have finished what mlx-lm enqueued on `stream`.

    A rank that exited earlier would interrupt the computation of the others.
    """
    if not is_single_rank(group):
        with connected():
            mx.synchronize(stream)
        gather(group, None)


def is_single_rank(group: Group | None) -> bool:
    """Return whether there are no other ranks."""
    return group is None or group.size() == 1


def _exchange(group: Group, message: dict[str, Any]) -> list[dict[str, Any]]:
    content = np.frombuffer(json.dumps(message).encode(), np.uint8)
    with connected():
        sizes = _all_gather(group, np.array([content.size], np.int32))
        rows = _all_gather(group, np.pad(content, (0, sizes.max() - content.size))[None])
    try:
        messages = [json.loads(row[:size].tobytes()) for row, size in zip(rows, sizes, strict=True)]
    except ValueError as exc:  # a backend may return garbage when a peer is gone
        raise RankError("the connection to another rank was lost: invalid message") from exc
    for rank, other in enumerate(messages):
        if "failed" in other:
            raise FailedElsewhere(f"rank {rank}: {other['failed']}")
    return messages


def _all_gather(group: Group, array: np.ndarray) -> np.ndarray:
    return np.array(mx.distributed.all_gather(mx.array(array), group=group, stream=mx.cpu))
