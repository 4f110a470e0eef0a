"""The command `generate`."""

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
class Input:
    """Options of the model and its input."""

    words: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[MODEL] [PROMPT]",
            help="Directory, .gguf file or repo id (without one, the newest converted model "
            "here), and the prompt.",
        ),
    ] = None
    model: ModelOption = None
    prompt: Annotated[
        str | None, typer.Option("--prompt", "-p", help="The prompt; - reads standard input.")
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
            "--ignore-chat-template",
            help="Continue the prompt without a template.",
            rich_help_panel=TEMPLATE,
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
    """Options of loading a model."""

    revision: Revision = None
    trust_remote_code: TrustRemoteCode = False
    device: Device = None
    pipeline: Annotated[
        bool,
        typer.Option("--pipeline", help="Under mlx.launch: distribute whole layers over ranks."),
    ] = False


EosTokens = Annotated[
    list[str] | None, typer.Option(help="Additional token that ends the answer; repeatable.")
]
Verbose = Annotated[str, typer.Option(help="False, or --quiet: print nothing but the answer.")]


@decoding_options
@dataclass_options(Input, "source")
@dataclass_options(Loading, "loading")
def generate(
    source: Input,
    *,
    seed: Seed = None,
    extra_eos_token: EosTokens = None,
    verbose: Verbose = "True",
    json_file: JsonFile = None,
    loading: Loading,
    decoding: Given,
) -> None:
    """Answer one prompt, with mlx_lm.generate's options and output.

    By default decoding is greedy and stops after 100 tokens.
    """
    chosen = Decoding(**{"max_tokens": MAX_TOKENS, **decoding})
    template_options = json_object("--chat-template-config", source.chat_template_config)
    model, prompt = _model_and_prompt(source.words or [], source.model, source.prompt)
    start(loading.device)
    import mlx.core as mx

    from splitquant_mlx.cli.loading import load_model, warn_long_prompt
    from splitquant_mlx.runtime.ranks import fail_together, gather

    group = join()
    with fail_together(group):
        name = choose_model(model)
        text = _read_prompt("hello" if prompt is None else prompt, ranks=group.size())
        options = {name: value for name, value in vars(loading).items() if name != "device"}
        loaded = load_model(name, **options, group=group)
        if prompt is None and not group.rank():
            console.note(f"no --prompt: {text!r}, as in mlx_lm.generate")
        _add_eos_tokens(loaded.tokenizer, extra_eos_token or [])
        template = loaded.tokenizer.has_chat_template and not source.ignore_chat_template
        messages = _messages(
            text, *((source.system_prompt, source.prefill_response) if template else ())
        )
        tokens = encode(
            loaded.tokenizer, messages, template=template, template_options=template_options
        )
    tokens = gather(group, tokens)[0]  # a template may insert the time of day
    warn_long_prompt(loaded, len(tokens))
    if seed is not None:
        mx.random.seed(seed)
    is_verbose = verbose.lower() not in ("false", "f") and not console.is_quiet()
    is_verbose = is_verbose and json_file != "-"
    answer, last = _answer(loaded, tokens, chosen, group, is_verbose)
    if not console.write_json(json_file, _values(name, answer, last)) and not is_verbose:
        print(printable(answer))
    if last.finish_reason == "length" and not group.rank():
        console.note(f"cut off at {last.generation_tokens} tokens (--max-tokens)")


def _answer(
    loaded: Any, tokens: list[int], decoding: Decoding, group: Any, is_verbose: bool
) -> tuple[str, Any]:
    """Return the answer and mlx-lm's last response, once all ranks have finished."""
    from mlx_lm.generate import generation_stream

    from splitquant_mlx.runtime.ranks import connected, drain

    with readable_errors(), connected(), redirect_stdout(Printable(sys.stdout)):  # type: ignore[arg-type]
        answer, last = _generate(loaded, tokens, decoding, group, is_verbose)
    drain(group, generation_stream)
    return answer, last


def _values(model: str, answer: str, last: Any) -> dict[str, Any]:
    counts = ("prompt_tokens", "prompt_tps", "generation_tokens", "generation_tps")
    values = {name: getattr(last, name) for name in ("finish_reason", *counts)}
    return {"model": model, "text": answer, **values, "peak_memory_gb": last.peak_memory}


def _generate(
    loaded: Any, tokens: list[int], decoding: Decoding, group: Any, is_verbose: bool
) -> tuple[str, Any]:
    """Return the answer and mlx-lm's last response; print both as mlx_lm.generate does."""
    from mlx_lm.generate import stream_generate

    if is_verbose:
        print("=" * 10)
    text, last = "", None
    try:
        for last in stream_generate(
            loaded.model,
            loaded.tokenizer,
            tokens,
            prompt_cache=decoding.empty_cache(loaded.model),
            **decoding.options(group),
        ):
            text += last.text
            if is_verbose:
                print(last.text, end="", flush=True)
    except KeyboardInterrupt:
        if is_verbose:
            print()
        raise
    assert last is not None  # mlx-lm yields at least one response
    if is_verbose:
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
    """Return model and prompt; one word is a model if it exists or looks like a repo id."""
    from splitquant_mlx.models.library import closest

    if len(words) == 1 and model is None and prompt is None:
        word = words[0]
        is_model = Path(word).exists() or ("/" in word and not any(map(str.isspace, word)))
        is_model = is_model or closest(word, Path.cwd()) is not None  # misspelled
        return (word, None) if is_model else (None, word)
    if words and model is None:
        model, *words = words
    if words and prompt is None:
        prompt, *words = words
    if words:
        raise RecipeError(f"expected a model, then a prompt in quotes, got {words[0]!r} as well")
    return model, prompt


def _read_prompt(prompt: str, *, ranks: int) -> str:
    if prompt == "-":
        if ranks > 1:  # mlx.launch never closes standard input
            raise RecipeError("--prompt -: there is no standard input under mlx.launch")
        return sys.stdin.read()
    # a shell passes \n and \t as two characters each; mlx_lm.generate replaces them, too
    return prompt.replace("\\n", "\n").replace("\\t", "\t")


def _messages(
    text: str, system_prompt: str | None = None, prefill: str | None = None
) -> list[dict[str, str]]:
    turns = (("system", system_prompt), ("user", text), ("assistant", prefill))
    return [{"role": role, "content": content} for role, content in turns if content is not None]


def _add_eos_tokens(tokenizer: Any, tokens: list[str]) -> None:
    for token in tokens:
        try:
            tokenizer.add_eos_token(token)
        except ValueError as exc:
            raise RecipeError(f"--extra-eos-token: {exc}") from exc
