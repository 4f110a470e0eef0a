"""Chat session in the terminal: read messages and commands, stream the answers."""

import shutil
import signal
import sys
from collections.abc import Callable, Generator, Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from splitquant_mlx.cli import interrupt
from splitquant_mlx.cli.console import note, printable
from splitquant_mlx.cli.loading import long_prompt_warning
from splitquant_mlx.cli.reading import Reader, no_echo
from splitquant_mlx.cli.signals import handling
from splitquant_mlx.cli.wrap import Wrapper
from splitquant_mlx.errors import RecipeError, SplitQuantError, closest_word
from splitquant_mlx.inference.chat import Conversation, Decoder, load_messages, save_messages
from splitquant_mlx.models.footprint import CONTEXT_TOKENS

HELP = """\
/system TEXT   set the system prompt (alone: show it)
/retry         another answer to the last message
/continue      continue the last answer
/reset         clear the conversation
/save FILE     save the conversation; /load FILE loads it
/set           show sampling; /set NAME VALUE changes it (also seed)
/stats         tokens and speed;  /context  used context
/exit          leave, like Ctrl-D; Ctrl-C stops an answer
\"\"\"            begins and ends a message of several lines
A message that begins with / needs a space before it."""
LABEL = "model>"
HINT = "/help lists the commands, Ctrl-C stops an answer, Ctrl-D leaves"
OVERFLOW_TOKENS = 256  # maximum length of an answer if the context is already full
NUMBERS = {"temp": float, "top_p": float, "min_p": float, "top_k": int, "max_tokens": int}


class Talk:
    """A chat session.

    Args:
        conversation: conversation to continue.
        decoder: decoder of the answers.
        context: maximum context length of the model in tokens; None if unknown.
        fills_context: whether only the context limits the length of an answer, not max_tokens.
    """

    def __init__(
        self,
        conversation: Conversation,
        decoder: Decoder,
        *,
        context: int | None,
        fills_context: bool,
    ) -> None:
        self._conversation = conversation
        self._decoder = decoder
        self._context = context
        self._fills_context = fills_context
        self._answered = [0, 0.0]  # tokens and seconds
        self._interactive = sys.stdin.isatty() and sys.stdout.isatty()
        self._commands: dict[str, Callable[[str], object]] = {
            "/help": lambda rest: note(HELP),
            "/system": self._system,
            "/retry": lambda rest: self._answer(self._conversation.retry),
            "/continue": lambda rest: self._answer(self._conversation.resume),
            "/reset": self._reset,
            "/save": self._save,
            "/load": self._load,
            "/set": self._set,
            "/stats": self._stats,
            "/context": lambda rest: note(self._used()),
        }

    def run(self, first: str | None = None) -> None:
        """Answer messages until there are no more or the user leaves."""
        if self._interactive:
            note(HINT)
        if first is not None:
            self._answer_message(first)
        for message in Reader(self._interactive, [*self._commands, "/exit"]):
            word, _, rest = message.strip().partition(" ")
            if not message.strip():
                continue
            if word == "/exit" and message.startswith("/"):
                return
            try:
                if not message.startswith("/"):
                    self._answer_message(message.strip())
                elif command := self._commands.get(word):
                    command(rest.strip())
                else:
                    near = closest_word(word, self._commands)
                    hint = f"did you mean {near}? " if near else ""
                    note(f"unknown command {printable(word)}: {hint}/help lists them")
            except SplitQuantError as exc:
                if not self._interactive:
                    raise
                note(printable(str(exc)))

    def _answer_message(self, message: str) -> None:
        self._answer(lambda stop: self._conversation.answer(message, stop))

    def _answer(self, begin: Callable[[Callable[[], bool]], Generator[Any, None, None]]) -> None:
        """Print the answer while it is generated, then its length and speed."""
        last, count, render = None, 0, printable
        if self._interactive:
            _print_label()
            wrap = Wrapper(shutil.get_terminal_size().columns, len(LABEL) + 1)
            render = lambda text: wrap(printable(text))  # noqa: E731
        with _ctrl_c() as pressed, no_echo(), suppress(KeyboardInterrupt):
            stop = lambda: pressed() or self._is_full(count)  # noqa: E731
            with closing(begin(stop)) as answer:
                for last in answer:
                    count += 1
                    self._warn_long_prompt(count)
                    print(render(last.text), end="", flush=True)
        print()
        if last is None:
            note("no answer")
            return
        self._answered[0] += last.generation_tokens
        self._answered[1] += last.generation_tokens / (last.generation_tps or 1e9)
        if last.finish_reason == "length":
            note(f"cut off at {count} tokens (--max-tokens): /continue resumes")
        elif not last.finish_reason and self._is_full(count):
            note(f"cut off at {count} tokens (the context is full): /reset clears it")
        if self._interactive and count > 1:
            note(f"{count} tokens, {last.generation_tps:.1f} tokens-per-sec, {self._used()}")
        elif self._interactive:
            note("nothing to add" if last.finish_reason == "stop" else self._used())

    def _is_full(self, count: int) -> bool:
        """Return whether an answer of `count` tokens must end because the context is full.

        If the context was full before the answer, it may have `OVERFLOW_TOKENS`.
        """
        if not self._fills_context:
            return False
        tokens, context = self._conversation.tokens, self._context
        if context is None:
            return count >= CONTEXT_TOKENS
        return tokens >= context and (tokens - count < context or count >= OVERFLOW_TOKENS)

    def _warn_long_prompt(self, count: int) -> None:
        warning = long_prompt_warning(self._conversation.tokens, self._context)
        if count == 1 and warning:
            note(f"{warning}, or /reset")

    def _used(self) -> str:
        limit = f" / {self._context:,}" if self._context else ""
        return f"context {self._conversation.tokens:,}{limit}"

    def _system(self, text: str) -> None:
        if text:
            self._conversation.set_system_prompt(text)
        note(f"system prompt: {printable(self._conversation.system_prompt or '(none)')}")

    def _reset(self, rest: str) -> None:
        self._conversation.reset()
        note("Conversation cleared.")

    def _save(self, file: str) -> None:
        if not file:
            raise RecipeError("/save FILE: expected a file")
        save_messages(self._conversation.messages, Path(file).expanduser())
        note(f"Saved {len(self._conversation.messages)} messages in {file}")

    def _load(self, file: str) -> None:
        if not file:
            raise RecipeError("/load FILE: expected a file")
        self._conversation.replace(load_messages(Path(file).expanduser()))
        note(f"Loaded {len(self._conversation.messages)} messages from {file}, {self._used()}")

    def _set(self, rest: str) -> None:
        name, _, value = rest.partition(" ")
        if name == "seed" and value.isdecimal():
            import mlx.core as mx

            mx.random.seed(int(value))
        elif name in NUMBERS:
            try:
                number = NUMBERS[name](value)
            except ValueError as exc:
                raise RecipeError(f"/set {name}: expected a number, got {value!r}") from exc
            self._decoder.decoding = replace(self._decoder.decoding, **{name: number})
            if name == "max_tokens":
                self._fills_context = number < 0
        elif name:
            raise RecipeError(f"/set: expected one of {', '.join([*NUMBERS, 'seed'])}, got {name}")
        values = (f"{name} {getattr(self._decoder.decoding, name):g}" for name in NUMBERS)
        note(", ".join(values))

    def _stats(self, rest: str) -> None:
        import mlx.core as mx

        tokens, seconds = self._answered
        speed = f", {tokens / seconds:.1f} tokens-per-sec" if seconds else ""
        peak = mx.get_peak_memory() / 1e9
        note(f"{tokens:.0f} tokens answered{speed}, {self._used()}, peak memory {peak:.2f} GB")


def _print_label() -> None:
    """Print the label before the model's answer."""
    from rich.console import Console

    from splitquant_mlx.cli.console import styles

    Console(highlight=False, **styles()).print(LABEL, style="bold green", end=" ")


@contextmanager
def _ctrl_c() -> Iterator[Callable[[], bool]]:
    """Set a flag on the first Ctrl-C, to check between two tokens; raise on the second.

    A third one ends the process, in case a long computation of mlx delays both.
    """
    pressed = False

    def press(signum: int, frame: object) -> None:
        nonlocal pressed
        if pressed:
            raise KeyboardInterrupt
        pressed = True

    with handling(press, signal.SIGINT), interrupt.handle_signals(2):
        yield lambda: pressed
