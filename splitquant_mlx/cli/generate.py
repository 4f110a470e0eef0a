"""Offer `generate`."""

import sys
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from splitquant_mlx.cli import console
from splitquant_mlx.cli.console import Printable, printable
from splitquant_mlx.cli.launched import join
from splitquant_mlx.cli.options import (
    Device,
    JsonFile,
    ModelOption,
    Revision,
    Seed,
    SystemPrompt,
    TrustRemoteCode,
    choose_model,
    decoding_options,
    start,
)
from splitquant_mlx.cli.settings import Given, dataclass_options
from splitquant_mlx.errors import RecipeError
from splitquant_mlx.inference.chat import encode
from splitquant_mlx.inference.decoding import Decoding, readable_errors
from splitquant_mlx.inference.settings import json_object

TEMPLATE, MAX_TOKENS = "Chat template", 100


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What is said to a model."""

    words: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[MODEL] [PROMPT]",
            help="Directory, .gguf file or repo id (without one, the newest converted model "
            "here), and what to say.",
        ),
    ] = None
    model: ModelOption = None
    prompt: Annotated[
        str | None, typer.Option("--prompt", "-p", help="What to say; - reads standard input.")
    ] = None
    system_prompt: SystemPrompt = None
    prefill_response: Annotated[
        str | None,
        typer.Option(
            help="Beginning of the answer, for the model to continue.", rich_help_panel=TEMPLATE
        ),
    ] = None
    ignore_chat_template: Annotated[
        bool,
        typer.Option(
            "--ignore-chat-template", help="Continue the bare prompt.", rich_help_panel=TEMPLATE
        ),
    ] = False
    chat_template_config: Annotated[
        str,
        typer.Option(
            help="JSON object of variables for the chat template.", rich_help_panel=TEMPLATE
        ),
    ] = "{}"


@dataclass(frozen=True, kw_only=True)
class Loading:
    """How a model is loaded."""

    revision: Revision = None
    trust_remote_code: TrustRemoteCode = False
    device: Device = None
    pipeline: Annotated[
        bool,
        typer.Option("--pipeline", help="Under mlx.launch: divide the layers, not each of them."),
    ] = False


EosTokens = Annotated[
    list[str] | None, typer.Option(help="Token that ends the answer, too; repeatable.")
]
Verbose = Annotated[str, typer.Option(help="False, or --quiet: print nothing but the answer.")]


@decoding_options
@dataclass_options(Asked, "asked")
@dataclass_options(Loading, "loading")
def generate(
    asked: Asked,
    *,
    seed: Seed = None,
    extra_eos_token: EosTokens = None,
    verbose: Verbose = "True",
    json_file: JsonFile = None,
    loading: Loading,
    decoding: Given,
) -> None:
    """Answer one prompt, with mlx_lm.generate's options and output.

    Without --temp it takes the likeliest tokens, without --max-tokens 100 of them.
    """
    chosen = Decoding(**{"max_tokens": MAX_TOKENS, **decoding})
    template_options = json_object("--chat-template-config", asked.chat_template_config)
    named, prompt = _model_and_prompt(asked.words or [], asked.model, asked.prompt)
    start(loading.device)
    import mlx.core as mx

    from splitquant_mlx.cli.loading import load_model, warn_long_prompt
    from splitquant_mlx.runtime.ranks import fail_together, gather

    group = join()
    with fail_together(group):
        name = choose_model(named)
        text = _read_prompt("hello" if prompt is None else prompt, ranks=group.size())
        options = {name: value for name, value in vars(loading).items() if name != "device"}
        found = load_model(name, **options, group=group)
        if prompt is None and not group.rank():
            console.note(f"no --prompt: {text!r}, as in mlx_lm.generate")
        _add_eos_tokens(found.tokenizer, extra_eos_token or [])
        template = found.tokenizer.has_chat_template and not asked.ignore_chat_template
        turns = _messages(
            text, *((asked.system_prompt, asked.prefill_response) if template else ())
        )
        tokens = encode(
            found.tokenizer, turns, template=template, template_options=template_options
        )
    tokens = gather(group, tokens)[0]  # a template may write the time of day into them
    warn_long_prompt(found, len(tokens))
    if seed is not None:
        mx.random.seed(seed)
    wordy = verbose.lower() not in ("false", "f") and not console.is_quiet() and json_file != "-"
    answer, last = _answer(found, tokens, chosen, group, wordy)
    if not console.write_json(json_file, _values(name, answer, last)) and not wordy:
        print(printable(answer))
    if last.finish_reason == "length" and not group.rank():
        console.note(f"cut off at {last.generation_tokens} tokens (--max-tokens)")


def _answer(
    found: Any, tokens: list[int], decoding: Decoding, group: Any, wordy: bool
) -> tuple[str, Any]:
    """Return the answer and mlx-lm's last response, once all ranks have it."""
    from mlx_lm.generate import generation_stream

    from splitquant_mlx.runtime.ranks import connected, drain

    with readable_errors(), connected(), redirect_stdout(Printable(sys.stdout)):  # type: ignore[arg-type]
        answer, last = _generate(found, tokens, decoding, group, wordy)
    drain(group, generation_stream)
    return answer, last


def _values(model: str, answer: str, last: Any) -> dict[str, Any]:
    counts = ("prompt_tokens", "prompt_tps", "generation_tokens", "generation_tps")
    figures = {name: getattr(last, name) for name in ("finish_reason", *counts)}
    return {"model": model, "text": answer, **figures, "peak_memory_gb": last.peak_memory}


def _generate(
    found: Any, tokens: list[int], decoding: Decoding, group: Any, wordy: bool
) -> tuple[str, Any]:
    """Return the answer and mlx-lm's last response; print both as mlx_lm.generate does."""
    from mlx_lm.generate import stream_generate

    if wordy:
        print("=" * 10)
    text, last = "", None
    try:
        for last in stream_generate(
            found.model,
            found.tokenizer,
            tokens,
            prompt_cache=decoding.empty_cache(found.model),
            **decoding.options(group),
        ):
            text += last.text
            if wordy:
                print(last.text, end="", flush=True)
    except KeyboardInterrupt:
        if wordy:
            print()
        raise
    assert last is not None  # mlx-lm yields at least the end
    if wordy:
        print(f"\n{'=' * 10}")
        if not text:
            print("No text generated for this prompt")
        else:
            print(
                f"Prompt: {last.prompt_tokens} tokens, {last.prompt_tps:.3f} tokens-per-sec\n"
                f"Generation: {last.generation_tokens} tokens, "
                f"{last.generation_tps:.3f} tokens-per-sec\n"
                f"Peak memory: {last.peak_memory:.3f} GB"
            )
    return text, last


def _model_and_prompt(
    words: list[str], model: str | None, prompt: str | None
) -> tuple[str | None, str | None]:
    """Tell a model from a prompt: a single word is a model if it exists, or looks like a repo."""
    from splitquant_mlx.models.library import closest

    if len(words) == 1 and model is None and prompt is None:
        first = words[0]
        is_model = Path(first).exists() or ("/" in first and not any(map(str.isspace, first)))
        is_model = is_model or closest(first, Path.cwd()) is not None  # a misspelt one
        return (first, None) if is_model else (None, first)
    if words and model is None:
        model, *words = words
    if words and prompt is None:
        prompt, *words = words
    if words:
        raise RecipeError(f"what is {words[0]!r}? Expected a model, then a prompt in quotes")
    return model, prompt


def _read_prompt(prompt: str, *, ranks: int) -> str:
    if prompt == "-":
        if ranks > 1:  # mlx.launch never closes it
            raise RecipeError("--prompt -: there is no standard input under mlx.launch")
        return sys.stdin.read()
    # A shell passes on \n and \t as two characters each; mlx_lm.generate reads them so, too.
    return prompt.replace("\\n", "\n").replace("\\t", "\t")


def _messages(
    text: str, system_prompt: str | None = None, begun: str | None = None
) -> list[dict[str, str]]:
    turns = (("system", system_prompt), ("user", text), ("assistant", begun))
    return [{"role": role, "content": said} for role, said in turns if said is not None]


def _add_eos_tokens(tokenizer: Any, tokens: list[str]) -> None:
    for token in tokens:
        try:
            tokenizer.add_eos_token(token)
        except ValueError as exc:
            raise RecipeError(f"--extra-eos-token: {exc}") from exc
