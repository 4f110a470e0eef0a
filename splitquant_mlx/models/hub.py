"""Ask the Hugging Face hub within a time limit, and say on one line what went wrong there."""

import errno
import re
import sys
import threading
from collections.abc import Callable
from concurrent.futures import Future, wait
from typing import TypeVar

from splitquant_mlx.errors import SourceError

T = TypeVar("T")
LOG_IN = "log in with `hf auth login` or set HF_TOKEN"


def answer_within(limit_s: float, request: Callable[[], T]) -> T:
    """Call `request` and give up after `limit_s`. Raises TimeoutError, or what `request` raised.

    The client's own time limit is for each read, and covers neither a name server that hangs nor
    the telemetry request that it sends first. The thread left behind holds up no exit.
    """
    answer: Future[T] = Future()

    def run() -> None:
        try:
            answer.set_result(request())
        except BaseException as exc:
            answer.set_exception(exc)

    threading.Thread(target=run, daemon=True).start()
    if not wait([answer], timeout=limit_s).done:
        raise TimeoutError(f"no answer within {limit_s:g} s")
    return answer.result()


def explain(
    exc: BaseException, repo: str, revision: str | None, otherwise: str = "cannot be fetched"
) -> SourceError:
    """Say on one line what failed and what to do, without the hub's own (long) messages."""
    from huggingface_hub import constants, errors

    if isinstance(exc, errors.LocalEntryNotFoundError) and exc.__cause__:
        exc = exc.__cause__
    hub, status = endpoint(), getattr(getattr(exc, "response", None), "status_code", None)
    if isinstance(exc, errors.HFValidationError):
        return SourceError(f"{repo!r} is neither an existing path nor a repo id such as org/name")
    if isinstance(exc, errors.RevisionNotFoundError):
        reason = f"there is no revision {revision!r}: see its branches and tags at {hub}/{repo}"
    elif isinstance(exc, errors.GatedRepoError):
        reason = f"the repo is gated: ask for access at {hub}/{repo} and {LOG_IN}"
    elif isinstance(exc, errors.RepositoryNotFoundError) or status == 404:
        reason = f"no such path, and no such repo at {hub} (if it is private, {LOG_IN})"
    elif isinstance(exc, errors.OfflineModeIsEnabled):
        reason = "is not in the cache, and HF_HUB_OFFLINE forbids to fetch it: unset that"
    elif status == 429:
        reason = f"too many requests to {hub} (429): wait some minutes, or {LOG_IN}"
    elif status in (401, 403):
        reason = f"{hub} refused access ({status}): the token may be wrong or lack rights; {LOG_IN}"
    elif status is not None:
        reason = f"{hub} answered with HTTP status {status}: try again later"
    elif getattr(exc, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or "No space left" in str(exc):
        reason = f"the disk is full: free some space in {constants.HF_HUB_CACHE} or set HF_HOME"
    elif isinstance(exc, OSError) and exc.strerror:
        reason = f"cannot be stored in {constants.HF_HUB_CACHE}: {exc.strerror}"
    else:
        reason = f"{otherwise} ({detail(exc)})"
    return SourceError(f"{repo}: {reason}")


def endpoint() -> str:
    """Return the hub's address without a user name and password."""
    from huggingface_hub import constants

    return re.sub(r"//[^/@]*@", "//", constants.ENDPOINT)


def detail(exc: BaseException) -> str:
    """Return the exception's class and first line, without the token."""
    line = next(iter(str(exc).strip().splitlines()), "")
    return f"{type(exc).__name__}: {hide_token(line)}" if line else type(exc).__name__


def hide_token(text: str) -> str:
    """Return `text` without the user's token for the hub, however it is quoted."""
    # a malformed header is quoted whole, so the token would show escaped rather than as it is
    hidden = re.sub(r"Bearer [^'\"\n]*", "Bearer ***", text)
    hidden = re.sub(r"\bhf_\w{8,}", "***", hidden)
    if "huggingface_hub" in sys.modules:  # else nothing can have read it
        from huggingface_hub import get_token

        if token := get_token():
            hidden = hidden.replace(token, "***")
    return hidden
