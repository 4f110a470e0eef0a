"""Offer `generate`."""

import json
import sys
from contextlib import redirect_stdout
from typing import Annotated, Any

import typer

from splitquant_mlx.cli.console import Printable, printable
from splitquant_mlx.cli.launched import join
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
    SystemPrompt,
    Temp,
    TopK,
    TopP,
    TrustRemoteCode,
    check_model,
    start,
)
from splitquant_mlx.errors import RecipeError
from splitquant_mlx.inference.chat import Decoding, encode, readable_errors


def generate(
    model: Model = DEFAULT_MODEL,
    prompt: Annotated[
        str, typer.Option("--prompt", "-p", help="What to say; - reads standard input.")
    ] = "hello",
    system_prompt: SystemPrompt = None,
    prefill_response: Annotated[
        str | None, typer.Option(help="Beginning of the answer, for the model to continue.")
    ] = None,
    max_tokens: MaxTokens = 100,
    temp: Temp = Decoding.temp,
    top_p: TopP = Decoding.top_p,
    min_p: MinP = Decoding.min_p,
    top_k: TopK = Decoding.top_k,
    seed: Annotated[int | None, typer.Option(help="Seed of the random number generator.")] = None,
    ignore_chat_template: Annotated[
        bool, typer.Option("--ignore-chat-template", help="Continue the bare prompt.")
    ] = False,
    chat_template_config: Annotated[
        str | None, typer.Option(help="JSON object of variables for the chat template.")
    ] = None,
    extra_eos_token: Annotated[
        list[str] | None, typer.Option(help="Token that ends the answer, too; repeatable.")
    ] = None,
    max_kv_size: MaxKvSize = None,
    kv_bits: KvBits = None,
    kv_group_size: KvGroupSize = Decoding.kv_group_size,
    quantized_kv_start: QuantizedKvStart = Decoding.quantized_kv_start,
    verbose: Annotated[str, typer.Option(help="False prints nothing but the answer.")] = "True",
    revision: Revision = None,
    trust_remote_code: TrustRemoteCode = False,
    device: Device = None,
    pipeline: Annotated[
        bool,
        typer.Option("--pipeline", help="Under mlx.launch: divide the layers, not each of them."),
    ] = False,
) -> None:
    """Answer one prompt, with mlx_lm.generate's options and output."""
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
    template_options = _json_object("--chat-template-config", chat_template_config)
    start(device)
    import mlx.core as mx
    from mlx_lm.generate import generate as mlx_lm_generate
    from mlx_lm.generate import generation_stream

    from splitquant_mlx.models.loader import load
    from splitquant_mlx.runtime.ranks import connected, gather, settle, together

    group = join()
    with together(group):
        check_model(model)
        text = _read_prompt(prompt, ranks=group.size())
        loaded, tokenizer = load(
            model,
            revision=revision,
            trust_remote_code=trust_remote_code,
            group=group,
            pipeline=pipeline,
        )
        _add_eos_tokens(tokenizer, extra_eos_token or [])
        chat = tokenizer.has_chat_template and not ignore_chat_template
        tokens = encode(
            tokenizer,
            _messages(text, *((system_prompt, prefill_response) if chat else ())),
            template=chat,
            template_options=template_options,
        )
    tokens = gather(group, tokens)[0]  # a template may write the time of day into them
    if seed is not None:
        mx.random.seed(seed)
    wordy = verbose.lower() not in ("false", "f")
    with readable_errors(), connected(), redirect_stdout(Printable(sys.stdout)):  # type: ignore[arg-type]
        answer = mlx_lm_generate(
            loaded,
            tokenizer,
            tokens,
            verbose=wordy,
            prompt_cache=decoding.empty_cache(loaded),
            **decoding.options(group),
        )
    settle(group, generation_stream)
    if not wordy:
        print(printable(answer))


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


def _json_object(option: str, text: str | None) -> dict[str, Any]:
    try:
        value = json.loads(text or "{}")
    except ValueError as exc:
        raise RecipeError(f"{option}: {text!r} is not JSON: {exc}") from exc
    if not isinstance(value, dict):
        raise RecipeError(f"{option}: wanted a JSON object such as {{}}, got {text}")
    return value


def _add_eos_tokens(tokenizer: Any, tokens: list[str]) -> None:
    for token in tokens:
        try:
            tokenizer.add_eos_token(token)
        except ValueError as exc:
            raise RecipeError(f"--extra-eos-token: {exc}") from exc
