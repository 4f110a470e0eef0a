"""Chat with a loaded model: prompts, conversation state and KV cache reuse.

Every turn renders the chat template over the whole conversation, so the result does not depend on
earlier turns. The KV cache makes this cheap: only the tokens after the longest cached prefix of the
prompt are computed.
"""

import json
from collections.abc import Callable, Generator, Iterator, Sequence
from itertools import takewhile
from operator import eq
from pathlib import Path
from typing import Any

from splitquant_mlx.errors import CheckpointError, RecipeError, one_line
from splitquant_mlx.inference.decoding import Decoding, readable_errors
from splitquant_mlx.models.chat_template import render
from splitquant_mlx.runtime.disk import as_target_error

Message = dict[str, str]
# (prompt tokens, callback that returns whether to stop) -> mlx-lm GenerationResponses
Stream = Callable[[list[int], Callable[[], bool]], Iterator[Any]]


def encode(
    tokenizer: Any,
    messages: Sequence[Message],
    *,
    template: bool = True,
    template_options: dict[str, Any] | None = None,
) -> list[int]:
    """Return the tokens of the prompt for the assistant's next message.

    Args:
        tokenizer: mlx-lm's TokenizerWrapper.
        messages: `role` (system, user, assistant) and `content` of each. If the last is the
            assistant's, the model continues it.
        template: render the chat template, if there is one; else join the contents, with a newline
            before each of the user's messages.
        template_options: further variables for the chat template.

    Raises:
        CheckpointError: when the chat template or the tokenizer fails.
        RecipeError: when the prompt is empty.
    """
    template = template and tokenizer.has_chat_template
    if template:
        continues = messages[-1]["role"] == "assistant"
        text = render(tokenizer, messages, template_options or {}, continues=continues)
    else:
        text = "".join(
            "\n" * (turn > 0 and message["role"] == "user") + message["content"]
            for turn, message in enumerate(messages)
        )
    text = text.encode(errors="replace").decode()  # arguments of a shell may be invalid UTF-8
    try:
        tokens = list(tokenizer.encode(text, add_special_tokens=not template))
    except KeyboardInterrupt:
        raise
    except BaseException as exc:  # a panic in Rust is not an Exception
        raise CheckpointError(f"the tokenizer fails on this text: {one_line(exc)}") from exc
    if not tokens:
        raise RecipeError("the prompt is empty: give a text with --prompt")
    return tokens


class Decoder:
    """Token stream of a model that reuses the KV cache of the previous prompt.

    The cache is trimmed to the longest common prefix, or rebuilt if it cannot be trimmed: a full
    RotatingKVCache (`max_kv_size`), or the state of a recurrent layer.
    """

    def __init__(self, model: Any, tokenizer: Any, decoding: Decoding) -> None:
        self._model = model
        self._tokenizer = tokenizer
        self.decoding = decoding
        self._cache: list[Any] = []
        self._cached: list[int] = []

    def __call__(self, prompt: list[int], stop: Callable[[], bool]) -> Iterator[Any]:
        """Yield one mlx-lm GenerationResponse per token.

        Args:
            prompt: token ids, at least one.
            stop: returns whether to stop; called after each token and each chunk of a long prompt.
        """
        from mlx_lm.generate import stream_generate

        reused = self._reuse(prompt)

        def after_chunk(done: int, total: int) -> None:
            # at the end of the prompt, mlx-lm has already started the answer
            if done < total:
                self._cached = prompt[: reused + done]
                if stop():
                    raise _Stopped
            else:
                self._cached = list(prompt)

        try:
            with readable_errors():
                for response in stream_generate(
                    self._model,
                    self._tokenizer,
                    prompt[reused:],
                    prompt_cache=self._cache,
                    prompt_progress_callback=after_chunk,
                    **self.decoding.options(),
                ):
                    # mlx-lm computes one token ahead: this one is already in the cache
                    self._cached.append(response.token)
                    yield response
                    if stop():
                        return
        except (_Stopped, GeneratorExit):
            return
        except BaseException:
            # interrupted inside the model: some layers' caches may be ahead of others'
            self._cache, self._cached = [], []
            raise

    def _reuse(self, prompt: list[int]) -> int:
        """Trim the cache to the longest cached prefix of `prompt`; return its length."""
        from mlx_lm.models.cache import trim_prompt_cache

        # the last token is always computed: a cache does not contain the logits after it
        common = sum(takewhile(bool, map(eq, self._cached, prompt[:-1])))
        surplus = len(self._cached) - common
        if not self._cache or (surplus and trim_prompt_cache(self._cache, surplus) != surplus):
            self._cache = self.decoding.empty_cache(self._model)
            common = 0
        self._cached = prompt[:common]
        return common


class _Stopped(Exception):
    pass


class Conversation:
    """A conversation with a model.

    Attributes:
        messages: `role` and `content` of each; first the system prompt, if any.
        tokens: number of tokens of the last prompt and its answer so far.
    """

    def __init__(self, tokenizer: Any, stream: Stream, *, system_prompt: str | None = None) -> None:
        self._tokenizer = tokenizer
        self._stream = stream
        self.messages: list[Message] = []
        self.tokens = 0
        self.set_system_prompt(system_prompt)

    @property
    def system_prompt(self) -> str | None:
        """Return the system prompt."""
        first = self.messages[:1]
        return first[0]["content"] if first and first[0]["role"] == "system" else None

    def set_system_prompt(self, text: str | None) -> None:
        """Replace the system prompt, or remove it, and keep the other messages."""
        rest = self.messages[self.system_prompt is not None :]
        self.messages = [{"role": "system", "content": text}] * (text is not None) + rest

    def replace(self, messages: Sequence[Message]) -> None:
        """Replace all messages. Raises CheckpointError when the chat template fails on them."""
        tokens = len(encode(self._tokenizer, messages)) if messages else 0
        self.messages, self.tokens = list(messages), tokens

    def reset(self) -> None:
        """Remove all messages except the system prompt."""
        self.messages = self.messages[: self.system_prompt is not None]
        self.tokens = 0

    def answer(
        self, message: str, stop: Callable[[], bool] = lambda: False
    ) -> Generator[Any, None, None]:
        """Yield the answer to `message` and add both to the conversation, also when stopped.

        If the answer has no text, the message is removed.
        """
        self.messages.append({"role": "user", "content": message})
        text = ""
        try:
            for response in self._responses(stop):
                text += response.text
                yield response
        finally:
            if text:
                self.messages.append({"role": "assistant", "content": text})
            else:
                self.messages.pop()

    def retry(self, stop: Callable[[], bool] = lambda: False) -> Generator[Any, None, None]:
        """Yield another answer to the last user message. Raises RecipeError if there is none."""
        before = list(self.messages)
        while self.messages and self.messages[-1]["role"] == "assistant":
            self.messages.pop()
        if not self.messages or self.messages[-1]["role"] != "user":
            self.messages = before
            raise RecipeError("there is no message to answer again")
        message = self.messages.pop()["content"]
        length = len(self.messages)
        try:
            yield from self.answer(message, stop)
        finally:
            if len(self.messages) == length:  # no new answer: restore the old one
                self.messages = before

    def resume(self, stop: Callable[[], bool] = lambda: False) -> Generator[Any, None, None]:
        """Yield the continuation of the last answer. Raises RecipeError if there is none."""
        if not self.messages or self.messages[-1]["role"] != "assistant":
            raise RecipeError("there is no answer to continue")
        for response in self._responses(stop):
            self.messages[-1] = {
                "role": "assistant",
                "content": self.messages[-1]["content"] + response.text,
            }
            yield response

    def _responses(self, stop: Callable[[], bool]) -> Iterator[Any]:
        prompt = encode(self._tokenizer, self.messages)
        self.tokens = len(prompt)
        for response in self._stream(prompt, stop):
            self.tokens += 1
            yield response


def save_messages(messages: Sequence[Message], file: Path) -> None:
    """Write messages as JSON. Raises TargetError."""
    with as_target_error(file):
        file.write_text(json.dumps(list(messages), indent=2) + "\n", encoding="utf-8")


def load_messages(file: Path) -> list[Message]:
    """Read a file of `save_messages`. Raises RecipeError when it is unreadable or invalid."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        messages = [{"role": m["role"], "content": m["content"]} for m in content]
    except OSError as exc:
        raise RecipeError(f"cannot read {file}: {exc.strerror or exc}") from exc
    except (ValueError, TypeError, KeyError, RecursionError) as exc:
        raise RecipeError(f"{file}: expected a conversation saved by /save") from exc
    for message in messages:
        is_text = all(isinstance(value, str) for value in message.values())
        if not is_text or message["role"] not in ("system", "user", "assistant"):
            raise RecipeError(
                f"{file}: expected a conversation saved by /save, got a message {message!r:.80}"
            )
    return messages
