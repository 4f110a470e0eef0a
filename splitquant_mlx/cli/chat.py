"""Offer `chat`: read from the terminal, stream the answers to it."""

import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress

from splitquant_mlx.cli.console import printable
from splitquant_mlx.cli.options import (
    DEFAULT_MODEL,
    Device,
    KvBits,
    KvGroupSize,
    MaxKvSize,
    MaxTokens,
    MinP,
    Model,
    QuantizedKvStart,
    Revision,
    Seed,
    SystemPrompt,
    Temp,
    TopK,
    TopP,
    TrustRemoteCode,
    check_model,
    start,
)
from splitquant_mlx.inference.chat import Conversation, Decoder, Decoding

HELP = "/help or h: this list   /reset or r: forget the conversation   /exit, q or Ctrl-D: leave"
LEAVE = "Ctrl-C again, Ctrl-D or /exit leaves"
# The single letters are mlx_lm.chat's.
COMMANDS = {
    "/help": "help",
    "h": "help",
    "/reset": "reset",
    "r": "reset",
    "/exit": "exit",
    "q": "exit",
}


def chat(
    model: Model = DEFAULT_MODEL,
    system_prompt: SystemPrompt = None,
    max_tokens: MaxTokens = Decoding.max_tokens,
    temp: Temp = Decoding.temp,
    top_p: TopP = Decoding.top_p,
    min_p: MinP = Decoding.min_p,
    top_k: TopK = Decoding.top_k,
    seed: Seed = 0,
    max_kv_size: MaxKvSize = None,
    kv_bits: KvBits = None,
    kv_group_size: KvGroupSize = Decoding.kv_group_size,
    quantized_kv_start: QuantizedKvStart = Decoding.quantized_kv_start,
    revision: Revision = None,
    trust_remote_code: TrustRemoteCode = False,
    device: Device = None,
) -> None:
    """Chat with a model; Ctrl-C stops an answer, /help lists the commands."""
    decoding = Decoding(
        max_tokens=max_tokens,
        temp=temp,
        top_p=top_p,
        min_p=min_p,
        top_k=top_k,
        max_kv_size=max_kv_size,
        kv_bits=kv_bits,
        kv_group_size=kv_group_size,
        quantized_kv_start=quantized_kv_start,
    )
    check_model(model)
    start(device)
    import mlx.core as mx

    from splitquant_mlx.models.loader import load

    loaded, tokenizer = load(model, revision=revision, trust_remote_code=trust_remote_code)
    mx.random.seed(seed)
    decoder = Decoder(loaded, tokenizer, decoding)
    conversation = Conversation(tokenizer, decoder, system_prompt=system_prompt)
    # Nothing is left to tidy up, and at the prompt a Ctrl-C only says how to leave.
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if not tokenizer.has_chat_template:
        _note("note: this model has no chat template: it continues your text")
    _talk(conversation)


def _talk(conversation: Conversation) -> None:
    """Answer lines until there are no more, or the user leaves."""
    interactive = sys.stdin.isatty() and sys.stdout.isatty()
    if interactive:
        with suppress(ImportError):
            import readline  # noqa: F401  # importing it gives input() line editing and a history
        _note(HELP)
    for line in _lines("> " if interactive else ""):
        match COMMANDS.get(line.rstrip()):
            case "help":
                _note(HELP)
            case "reset":
                conversation.reset()
                _note("the conversation is forgotten")
            case "exit":
                return
            case _ if line.startswith("/"):
                word = printable(line.split()[0])
                _note(f"unknown command {word}: see /help (a space before it says it to the model)")
            case _ if line.strip():
                speed = _answer(conversation, line.strip())
                if interactive:
                    _note(speed)


def _lines(prompt: str) -> Iterator[str]:
    """Yield lines as they are typed; at the prompt it takes two Ctrl-C in a row to leave."""
    warned = False
    while True:
        try:
            if warned:  # in here, for the second may come before the warning is out
                _note(f"\n{LEAVE}")
            line = input(prompt)
        except EOFError:
            if prompt:
                print()
            return
        except KeyboardInterrupt:
            if warned:
                print()
                return
            warned = True
            continue
        warned = False
        yield line


def _answer(conversation: Conversation, message: str) -> str:
    """Print the answer as it comes; return a line on its length and speed."""
    response = None
    with _ctrl_c() as pressed, suppress(KeyboardInterrupt):
        with closing(conversation.answer(message, pressed)) as answer:
            for response in answer:
                print(printable(response.text), end="", flush=True)
    print()
    if response is None:
        return "no answer"
    return (
        f"{response.generation_tokens} tokens, {response.generation_tps:.1f} tokens-per-sec, "
        f"{response.prompt_tokens} new prompt tokens"
    )


@contextmanager
def _ctrl_c() -> Iterator[Callable[[], bool]]:
    """Make the first Ctrl-C a flag, seen between two tokens; a second one interrupts at once."""
    pressed = False

    def press(signum: int, frame: object) -> None:
        nonlocal pressed
        if pressed:
            raise KeyboardInterrupt
        pressed = True

    before = signal.signal(signal.SIGINT, press)
    try:
        yield lambda: pressed
    finally:
        signal.signal(signal.SIGINT, before)


def _note(text: str) -> None:
    """Print a line that is not the model's, dim, on stderr."""
    from rich.console import Console

    Console(stderr=True, highlight=False).print(text, style="dim", markup=False, soft_wrap=True)
