"""Talk to a loaded model: build prompts, keep a conversation, compute each token once.

Every turn renders the chat template over the whole conversation, so the model sees what a fresh
start with the same messages would show it. What makes that cheap is the KV cache: of each prompt
only the part after the longest prefix that is already in the cache is computed.
"""

import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import takewhile
from operator import eq
from typing import Any

from splitquant_mlx.errors import CheckpointError, RecipeError, one_line

Message = dict[str, str]
# Given a prompt's tokens and a question "stop now?", yields mlx-lm's GenerationResponses.
Stream = Callable[[list[int], Callable[[], bool]], Iterator[Any]]

# A KV cache of limited size never drops the first tokens, on which models lean; as in mlx-lm.
KEPT_TOKENS = 4


@dataclass(frozen=True, kw_only=True)
class Decoding:
    """Say how tokens are chosen and how the KV cache is kept; names and meanings are mlx-lm's.

    Raises:
        RecipeError: when a setting is out of range or does not fit the others.
    """

    max_tokens: int = 256
    temp: float = 0.0
    top_p: float = 1.0
    min_p: float = 0.0
    top_k: int = 0
    max_kv_size: int | None = None
    kv_bits: int | None = None
    kv_group_size: int = 64
    quantized_kv_start: int = 5000

    def __post_init__(self) -> None:
        """Refuse what mlx-lm would ignore, or stumble over in the middle of an answer."""
        kv_size = self.max_kv_size
        for name, right, wanted in (
            ("max_tokens", self.max_tokens > 0 or self.max_tokens == -1, "1 or more, or -1"),
            ("temp", self.temp >= 0, "0 or more"),
            ("top_p", 0 <= self.top_p <= 1, "0 to 1"),
            ("min_p", 0 <= self.min_p <= 1, "0 to 1"),
            ("top_k", self.top_k >= 0, "0 or more"),
            ("max_kv_size", kv_size is None or kv_size > KEPT_TOKENS, "5 or more"),
            ("kv_bits", self.kv_bits in (None, 2, 3, 4, 5, 6, 8), "2, 3, 4, 5, 6 or 8"),
            ("kv_group_size", self.kv_group_size in (32, 64, 128), "32, 64 or 128"),
            ("quantized_kv_start", self.quantized_kv_start >= 0, "0 or more"),
        ):
            if not right:
                option = "--" + name.replace("_", "-")
                raise RecipeError(f"{option}: wanted {wanted}, got {getattr(self, name)}")
        if self.kv_bits is not None and kv_size is not None:
            raise RecipeError(
                "--kv-bits and --max-kv-size: mlx-lm cannot quantize a limited KV cache: give one"
            )

    def options(self, group: Any = None) -> dict[str, Any]:
        """Return the keyword arguments for mlx-lm's `generate`, all but `prompt_cache`.

        With a group of ranks, all take the token that rank 0 samples.
        """
        from mlx_lm.sample_utils import make_sampler

        from splitquant_mlx.runtime.ranks import led

        sampler = make_sampler(self.temp, top_p=self.top_p, min_p=self.min_p, top_k=self.top_k)
        return {
            "max_tokens": self.max_tokens,
            "sampler": led(group, sampler),
            "kv_bits": self.kv_bits,
            "kv_group_size": self.kv_group_size,
            "quantized_kv_start": self.quantized_kv_start,
        }

    def empty_cache(self, model: Any) -> list[Any]:
        """Return a new KV cache for `model`."""
        from mlx_lm.models.cache import KVCache, RotatingKVCache, make_prompt_cache

        cache = make_prompt_cache(model, self.max_kv_size)
        if (size := self.max_kv_size) is None:
            return cache
        # Models that make their cache themselves, Llama for one, know nothing of the limit.
        return [RotatingKVCache(size, keep=KEPT_TOKENS) if type(c) is KVCache else c for c in cache]


@contextmanager
def readable_errors() -> Iterator[None]:
    """Turn mlx-lm's errors on settings that do not suit the model into RecipeError."""
    try:
        yield
    except (ValueError, NotImplementedError) as exc:
        import mlx.core as mx

        # one that comes out of mlx-lm's compiled sampling leaves a random state that is of no use
        mx.random.seed(time.time_ns())
        raise RecipeError(f"mlx-lm cannot run this model with these settings: {exc}") from exc


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
        self._decoding = decoding
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
                    **self._decoding.options(),
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
            self._cache = self._decoding.empty_cache(self._model)
            common = 0
        self._cached = prompt[:common]
        return common


class _Stopped(Exception):
    pass


class Conversation:
    """Keep the messages of a conversation, and have each of the user's answered."""

    def __init__(self, tokenizer: Any, stream: Stream, *, system_prompt: str | None = None) -> None:
        self._tokenizer = tokenizer
        self._stream = stream
        self._opening: list[Message] = []
        if system_prompt is not None:
            self._opening.append({"role": "system", "content": system_prompt})
        self.reset()

    def reset(self) -> None:
        """Forget all messages but the system prompt."""
        self.messages = list(self._opening)

    def answer(
        self, message: str, stop: Callable[[], bool] = lambda: False
    ) -> Generator[Any, None, None]:
        """Yield the answer to `message`; what was said of it becomes part of the conversation.

        An answer that ends before its first word is forgotten, along with the message.
        """
        self.messages.append({"role": "user", "content": message})
        said = ""
        try:
            for response in self._stream(encode(self._tokenizer, self.messages), stop):
                said += response.text
                yield response
        finally:
            if said:
                self.messages.append({"role": "assistant", "content": said})
            else:
                self.messages.pop()
