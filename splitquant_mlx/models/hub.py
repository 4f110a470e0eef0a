"""Requests to the Hugging Face hub with a time limit, and one-line explanations of errors."""

import errno
import re
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, wait
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

from splitquant_mlx.errors import SourceError, one_line

T = TypeVar("T")
LOG_IN = "log in with `hf auth login` or set HF_TOKEN"


def answer_within(limit_s: float, request: Callable[[], T]) -> T:
    """Call `request` in a thread. Raises TimeoutError after `limit_s`, or what `request` raises.

    The client's time limit is per read, and covers neither a hanging name server nor the telemetry
    request that it sends first. The thread is a daemon, so it does not delay exit.
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
    exc: BaseException, repo: str, *, revision: str | None = None, otherwise: str | None = None
) -> str:
    """Return one line on what failed and what to do, without the hub's long messages.

    Args:
        exc: exception of huggingface_hub, its HTTP library or its storage client.
        repo: USER/NAME.
        revision: requested branch, tag or commit.
        otherwise: explanation if the cause is unknown; None is that the repo cannot be fetched.
    """
    from huggingface_hub import errors

    hub, causes = endpoint(), list(_causes(exc))
    statuses = [getattr(getattr(e, "response", None), "status_code", None) for e in causes]
    status = next((status for status in statuses if status is not None), None)
    answer = next((str(m) for e in causes if (m := getattr(e, "server_message", None))), "")
    answer = f" ({hide_token(one_line(answer))[:300]})" if answer else ""
    quota = any(word in answer.lower() for word in ("quota", "storage limit", "storage patterns"))
    otherwise = otherwise or f"no such path, not in the cache, and {hub} cannot be reached"

    def is_a(kind: type[BaseException]) -> bool:
        return any(isinstance(e, kind) for e in causes)

    if is_a(errors.HFValidationError):
        return f"{repo!r} is neither an existing path nor a repo id such as org/name"
    if is_a(errors.LocalTokenNotFoundError):
        reason = f"you are not logged in: {LOG_IN}"
    elif is_a(errors.OfflineModeIsEnabled):
        reason = f"{otherwise} (HF_HUB_OFFLINE is set: unset it)"
    elif is_a(errors.RevisionNotFoundError):
        reason = f"there is no revision {revision!r}: see the branches and tags at {hub}/{repo}"
    elif is_a(errors.GatedRepoError):
        reason = f"the repo is gated: ask for access at {hub}/{repo} and {LOG_IN}"
    elif status in (402, 413, 507) or quota:
        reason = f"storage quota exceeded at {hub} ({status}){answer}"
    elif is_a(errors.RepositoryNotFoundError) or status == 404:
        reason = f"no such path, and no such repo at {hub} (if it is private, {LOG_IN})"
    elif status == 429:
        reason = f"too many requests to {hub} (429): wait some minutes, or {LOG_IN}"
    elif status in (401, 403):
        rights = f"the token may be wrong or lack rights; {LOG_IN}"
        reason = f"{hub} refused access ({status}){answer}: {rights}"
    elif status is not None:
        reason = f"{hub} answered with HTTP status {status}{answer}: try again later"
    else:
        reason = _explain_disk(exc) or f"{otherwise} ({detail(exc)})"
    return f"{repo}: {reason}"


def _explain_disk(exc: BaseException) -> str:
    """Explain an error of this machine's disk; empty for any other."""
    from huggingface_hub import constants

    number = getattr(exc, "errno", None)
    if number in (errno.ENOSPC, errno.EDQUOT) or "No space left" in str(exc):
        return f"the disk is full: free some space in {constants.HF_HUB_CACHE} or set HF_HOME"
    if isinstance(exc, OSError) and exc.strerror:
        return f"cannot use {exc.filename or constants.HF_HUB_CACHE}: {exc.strerror}"
    return ""


def _causes(exc: BaseException | None) -> Iterator[BaseException]:
    """Yield an exception and its chain of causes."""
    while exc is not None:
        yield exc
        exc = exc.__cause__


def fetch_dataset_file(repo: str, name: str) -> Path:
    """Return a data set's file from the hub's cache, else download it.

    Raises:
        SourceError: when it cannot be fetched.
    """
    from huggingface_hub import constants, get_hf_file_metadata, hf_hub_download, hf_hub_url

    with suppress(OSError):
        return Path(hf_hub_download(repo, name, repo_type="dataset", local_files_only=True))
    limit_s = constants.HF_HUB_ETAG_TIMEOUT
    try:
        # a single request; the download retries for half a minute
        url = hf_hub_url(repo, name, repo_type="dataset")
        answer_within(limit_s, lambda: get_hf_file_metadata(url, timeout=limit_s))
        return Path(hf_hub_download(repo, name, repo_type="dataset"))
    except Exception as exc:  # the hub's exceptions share no root
        otherwise = f"not in the cache, and {endpoint()} cannot be reached"
        reason = explain(exc, repo, otherwise=otherwise)
        raise SourceError(f"{reason}; or pass a file: --data") from exc


def endpoint() -> str:
    """Return the hub's address without a user name and password."""
    from huggingface_hub import constants

    return re.sub(r"//[^/@]*@", "//", constants.ENDPOINT)


def detail(exc: BaseException) -> str:
    """Return the exception's class and first line, without the token."""
    line = next(iter(str(exc).strip().splitlines()), "")
    return f"{type(exc).__name__}: {hide_token(line)}" if line else type(exc).__name__


def hide_token(text: str) -> str:
    """Return `text` with the user's hub token replaced, even if it is escaped."""
    # an error about a malformed header quotes it, with the token escaped
    hidden = re.sub(r"Bearer [^'\"\n]*", "Bearer ***", text)
    hidden = re.sub(r"\bhf_\w{8,}", "***", hidden)
    if "huggingface_hub" in sys.modules:  # else no token was read
        from huggingface_hub import get_token

        if token := get_token():
            hidden = hidden.replace(token, "***")
    return hidden
