"""Talk to a loaded model: build prompts, keep a conversation, compute each token once.

Every turn renders the chat template over the whole conversation, so the model sees what a fresh
start with the same messages would show it. What makes that cheap is the KV cache: of each prompt
only the part after the longest prefix that is already in the cache is computed.
"""

import json
from collections.abc import Callable, Generator, Iterator, Sequence
from itertools import takewhile
from operator import eq
from pathlib import Path
from typing import Any

from splitquant_mlx.errors import CheckpointError, RecipeError, one_line
from splitquant_mlx.inference.decoding import Decoding, readable_errors
from splitquant_mlx.runtime.disk import as_target_error

Message = dict[str, str]
# Given a prompt's tokens and a question "stop now?", yields mlx-lm's GenerationResponses.
Stream = Callable[[list[int], Callable[[], bool]], Iterator[Any]]


def encode(
    tokenizer: Any,
    messages: Sequence[Message],
    *,
    template: bool = True,
    template_options: dict[str, Any] | None = None,
) -> list[int]:
    """Return the tokens of the prompt that asks for what comes after `messages`.

    Args:
        tokenizer: mlx-lm's TokenizerWrapper.
        messages: with `role` (system, user, assistant) and `content`. If the last one is the
            assistant's, the model continues it.
        template: render the chat template, if there is one; else prompt with the bare contents,
            a newline before each of the user's.
        template_options: further variables for the chat template.

    Raises:
        CheckpointError: the chat template refuses the messages.
        RecipeError: the prompt is empty.
    """
    template = template and tokenizer.has_chat_template
    if template:
        begun = messages[-1]["role"] == "assistant"
        try:
            text = tokenizer.apply_chat_template(
                messages,
                tokenize=False,
                continue_final_message=begun,
                add_generation_prompt=not begun,
                **(template_options or {}),
            )
        except Exception as exc:  # a template raises what it likes
            message = f"the chat template refuses these messages: {one_line(exc)}"
            raise CheckpointError(message) from exc
    else:
        text = "".join(
            "\n" * (turn > 0 and message["role"] == "user") + message["content"]
            for turn, message in enumerate(messages)
        )
    text = text.encode(errors="replace").decode()  # a shell passes on bytes that are no text
    try:
        tokens = list(tokenizer.encode(text, add_special_tokens=not template))
    except KeyboardInterrupt:
        raise
    except BaseException as exc:  # a panic in Rust is no Exception
        raise CheckpointError(f"the tokenizer fails on this text: {one_line(exc)}") from exc
    if not tokens:
        raise RecipeError("the prompt is empty: say something with --prompt")
    return tokens


class Decoder:
    """Stream a model's tokens after a prompt, reusing the KV cache of the prompt before.

    The cache is cut back to the longest common prefix where its kind allows that, and built anew
    where it does not: a full RotatingKVCache (`max_kv_size`), or the state of a recurrent layer.
    """

    def __init__(self, model: Any, tokenizer: Any, decoding: Decoding) -> None:
        self._model = model
        self._tokenizer = tokenizer
        self.decoding = decoding
        self._cache: list[Any] = []
        self._cached: list[int] = []

    def __call__(self, prompt: list[int], stop: Callable[[], bool]) -> Iterator[Any]:
        """Yield one mlx-lm GenerationResponse a token, until the answer ends or `stop` says so.

        Args:
            prompt: its tokens, at least one.
            stop: asked after each token, and before each chunk of a long prompt.
        """
        from mlx_lm.generate import stream_generate

        reused = self._reuse(prompt)

        def after_chunk(done: int, total: int) -> None:
            # At the end of the prompt mlx-lm has begun with the answer: too late to count.
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
                    # mlx-lm computes one token ahead: this one is in the cache already.
                    self._cached.append(response.token)
                    yield response
                    if stop():
                        return
        except (_Stopped, GeneratorExit):
            return
        except BaseException:
            # Broken off inside the model, where some layers' caches are ahead of others'.
            self._cache, self._cached = [], []
            raise

    def _reuse(self, prompt: list[int]) -> int:
        """Make the cache hold a prefix of `prompt`, as long as can be; return its length."""
        from mlx_lm.models.cache import trim_prompt_cache

        # The last token is computed in any case: the logits after it are in no cache.
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
    """The messages of a conversation, and the answers to those of the user.

    Attributes:
        messages: with `role` and `content`, the system prompt first where there is one.
        tokens: of the last prompt and what was said of its answer.
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
        said = self.messages[self.system_prompt is not None :]
        self.messages = [{"role": "system", "content": text}] * (text is not None) + said

    def replace(self, messages: Sequence[Message]) -> None:
        """Go on from other messages. Raises CheckpointError when the template refuses them."""
        tokens = len(encode(self._tokenizer, messages)) if messages else 0
        self.messages, self.tokens = list(messages), tokens

    def reset(self) -> None:
        """Forget all messages but the system prompt."""
        self.messages = self.messages[: self.system_prompt is not None]
        self.tokens = 0

    def answer(
        self, message: str, stop: Callable[[], bool] = lambda: False
    ) -> Generator[Any, None, None]:
        """Yield the answer to `message`; what was said of it becomes part of the conversation.

        An answer that ends before its first word is forgotten, along with the message.
        """
        self.messages.append({"role": "user", "content": message})
        said = ""
        try:
            for response in self._responses(stop):
                said += response.text
                yield response
        finally:
            if said:
                self.messages.append({"role": "assistant", "content": said})
            else:
                self.messages.pop()

    def retry(self, stop: Callable[[], bool] = lambda: False) -> Generator[Any, None, None]:
        """Yield another answer to the user's last message. Raises RecipeError without one."""
        before = list(self.messages)
        while self.messages and self.messages[-1]["role"] == "assistant":
            self.messages.pop()
        if not self.messages or self.messages[-1]["role"] != "user":
            self.messages = before
            raise RecipeError("there is no message to answer again")
        message = self.messages.pop()["content"]
        answered = len(self.messages)
        try:
            yield from self.answer(message, stop)
        finally:
            if len(self.messages) == answered:  # the old answer is better than none
                self.messages = before

    def resume(self, stop: Callable[[], bool] = lambda: False) -> Generator[Any, None, None]:
        """Yield what follows on the last answer. Raises RecipeError without one."""
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
    """Read what `save_messages` wrote. Raises RecipeError for anything else."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        messages = [{"role": m["role"], "content": m["content"]} for m in found]
    except OSError as exc:
        raise RecipeError(f"cannot read {file}: {exc.strerror or exc}") from exc
    except (ValueError, TypeError, KeyError, RecursionError) as exc:
        raise RecipeError(f"{file} holds no conversation: expected what /save writes") from exc
    for message in messages:
        text = all(isinstance(value, str) for value in message.values())
        if not text or message["role"] not in ("system", "user", "assistant"):
            raise RecipeError(f"{file} holds no conversation: got a message {message!r:.80}")
    return messages
