"""Get answers out of mlx_lm.server's generator, which computes for all clients in one thread.

It knows neither clients nor limits. Here a prompt has a greatest length, an answer whose client has
left is stopped, queued or not, and an error ends the answers under way, but not the server.
"""

import logging
import socket
from collections.abc import Callable, Iterator
from contextlib import suppress
from queue import Empty, Queue
from typing import Any

from mlx_lm import server
from mlx_lm.models.cache import LRUPromptCache, can_trim_prompt_cache, trim_prompt_cache

from splitquant_mlx.errors import one_line
from splitquant_mlx.inference.fields import Refusal

POLL_S = 0.25
FAILED = "the server could not answer; its log says why"


class Unwind(BaseException):
    """Carry an error out of mlx_lm.server, which would answer 404 to any Exception."""

    def __init__(self, cause: Exception) -> None:
        super().__init__(cause)
        self.cause = cause


class Answer(Queue[Any]):
    """The queue through which the generator answers: a context, responses, None.

    It may have been abandoned by the time that the context comes, which is what stops the answer.
    """

    context: Any = None
    abandoned = False
    unstoppable = False

    def put(self, item: Any, block: bool = True, timeout: float | None = None) -> None:
        """Take an item from the generator."""
        if isinstance(item, server.GenerationContext):
            self.context = item
            if self.unstoppable:
                item.stop = lambda: None
            if self.abandoned:
                item.stop()
        super().put(item, block, timeout)

    def abandon(self) -> None:
        """Have the generator stop at the next token."""
        self.abandoned = True
        if self.context is not None:
            self.context.stop()


class PromptCache(LRUPromptCache):
    """mlx-lm's cache of prompts, which always leaves a token to compute.

    mlx-lm's own leaves none where a prompt is an earlier one with the whole of its answer, and the
    generator fails.
    """

    def fetch_nearest_cache(self, model: Any, tokens: list[int]) -> tuple[Any, list[int]]:
        """Return the cache of the longest known beginning of `tokens`, and the others."""
        cache, rest = super().fetch_nearest_cache(model, tokens)
        if rest or cache is None:
            return cache, rest
        if not can_trim_prompt_cache(cache):
            return None, tokens
        trim_prompt_cache(cache, 1)
        return cache, tokens[-1:]


class Generator(server.ResponseGenerator):
    """mlx_lm.server's generator, with a limit to prompts, that outlives errors."""

    def __init__(self, provider: Any, prompt_cache: Any, *, max_prompt_tokens: int) -> None:
        self.max_prompt_tokens = max_prompt_tokens
        self.under_way: set[Answer] = set()
        super().__init__(provider, prompt_cache)

    def run(self) -> None:
        """Compute in the calling thread, until a KeyboardInterrupt."""
        while True:
            try:
                self._generate()
            except Exception:
                # it was not a request that did this, or other ranks are in the middle of it
                if not self.under_way or self._is_distributed:
                    raise
                logging.exception("the answers under way failed")
                for answer in list(self.under_way):
                    answer.put(Refusal(500, FAILED))

    def _serve_single(self, request: Any, *args: Any) -> None:
        """Answer alone what cannot be batched; to the end if other ranks compute it, too."""
        request[0].unstoppable = self._is_distributed
        super()._serve_single(request, *args)

    def _tokenize(self, tokenizer: Any, request: Any, args: Any) -> Any:
        """Tokenize as mlx_lm.server does, and refuse prompts that are too long, or nothing."""
        try:
            tokenized = super()._tokenize(tokenizer, request, args)
        except Exception as exc:  # of the chat template, mostly, and of any class
            raise Refusal(400, f"the prompt cannot be put together: {one_line(exc)}") from exc
        count, limit = len(tokenized[0]), self.max_prompt_tokens
        if not 0 < count <= limit:
            raise Refusal(
                400,
                f"the prompt has {count} tokens, wanted 1 to {limit}",
                code="context_length_exceeded" if count else None,
            )
        return tokenized


class Exchange:
    """Stand in for the generator where mlx_lm.server wants one answer for one client.

    Args:
        generator: to ask.
        connection: of the client.
        timeout_s: of the connection, when written to.
        stream: whether to answer token by token, or only once there is a whole answer.
    """

    def __init__(
        self, generator: Generator, connection: socket.socket, *, timeout_s: float, stream: bool
    ) -> None:
        self.generator = generator
        self.connection = connection
        self.timeout_s = timeout_s
        self.stream = stream

    @property
    def cli_args(self) -> Any:
        """Return the options of mlx_lm.server."""
        return self.generator.cli_args

    def generate(
        self,
        request: Any,
        generation_args: Any,
        progress_callback: Callable[[int, int], None] = lambda done, total: None,
    ) -> tuple[Any, Any]:
        """Return the context and the responses, as mlx_lm.server's generator does.

        Raises:
            Unwind: with a Refusal, a ConnectionAbortedError when the client has left, or whatever
                went wrong.
        """
        try:
            items = self._items(request, generation_args)
            context = next(items)
            responses = _without_progress(items, progress_callback)
            # 0.31 takes stop words out of the text here; later, whoever reads the responses does.
            if strip := getattr(server, "_process_control_tokens", None):
                responses = strip(context, responses)
            return context, responses if self.stream else list(responses)
        except Exception as exc:
            raise Unwind(exc) from exc

    def _items(self, request: Any, args: Any) -> Iterator[Any]:
        answer = Answer()
        self.generator.under_way.add(answer)
        self.generator.requests.put((answer, request, args))
        try:
            while not self._client_left():
                with suppress(Empty):
                    if (item := answer.get(timeout=POLL_S)) is None:
                        return
                    if isinstance(item, Exception):
                        raise item
                    yield item
            raise ConnectionAbortedError("the client left")
        finally:
            self.generator.under_way.discard(answer)
            answer.abandon()

    def _client_left(self) -> bool:
        self.connection.settimeout(0)
        try:
            # Nothing is expected from the client any more but the end.
            return not self.connection.recv(4096)
        except BlockingIOError:
            return False
        except OSError:
            return True
        finally:
            self.connection.settimeout(self.timeout_s)


def _without_progress(items: Iterator[Any], report: Callable[[int, int], None]) -> Iterator[Any]:
    for item in items:
        if isinstance(item, tuple):
            report(*item)
        else:
            yield item
