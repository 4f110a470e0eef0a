"""Offer `chat`."""

from typing import Annotated, Any

import typer

from splitquant_mlx.cli import console, interrupt
from splitquant_mlx.cli.options import (
    Device,
    KvBits,
    KvGroupSize,
    MaxKvSize,
    MinP,
    ModelArgument,
    ModelOption,
    QuantizedKvStart,
    Revision,
    Seed,
    SystemPrompt,
    Temp,
    TopK,
    TopP,
    TrustRemoteCode,
    choose_model,
    given,
    start,
)
from splitquant_mlx.inference.decoding import Decoding

# what a model without wishes of its own is sampled with; greedy decoding makes small ones loop
SAMPLING = {"temp": 0.7, "top_p": 0.95}


def chat(
    model: ModelArgument = None,
    model_option: ModelOption = None,
    prompt: Annotated[str | None, typer.Option("--prompt", "-p", help="The first message.")] = None,
    system_prompt: SystemPrompt = None,
    max_tokens: Annotated[
        int | None,
        typer.Option(
            "--max-tokens",
            "-m",
            help="Longest answer, in tokens; -1 sets no limit. Without it, what the context holds.",
        ),
    ] = None,
    temp: Temp = None,
    top_p: TopP = None,
    min_p: MinP = None,
    top_k: TopK = None,
    seed: Seed = None,
    max_kv_size: MaxKvSize = None,
    kv_bits: KvBits = None,
    kv_group_size: KvGroupSize = Decoding.kv_group_size,
    quantized_kv_start: QuantizedKvStart = Decoding.quantized_kv_start,
    revision: Revision = None,
    trust_remote_code: TrustRemoteCode = False,
    device: Device = None,
) -> None:
    """Chat with a model; Ctrl-C stops an answer, /help lists the commands.

    Sampling is what the model's generation_config.json recommends, with a fresh seed.
    """
    sampling = given({"temp": temp, "top_p": top_p, "min_p": min_p, "top_k": top_k})
    settings = {
        "max_tokens": -1 if max_tokens is None else max_tokens,
        "max_kv_size": max_kv_size,
        "kv_bits": kv_bits,
        "kv_group_size": kv_group_size,
        "quantized_kv_start": quantized_kv_start,
    }
    Decoding(**settings, **sampling)  # refused before the model is loaded
    name = choose_model(model, model_option)
    start(device)
    import mlx.core as mx

    from splitquant_mlx.cli.loading import load_model
    from splitquant_mlx.cli.talk import Talk
    from splitquant_mlx.inference.chat import Conversation, Decoder
    from splitquant_mlx.inference.decoding import recommended_sampling

    found = load_model(name, revision=revision, trust_remote_code=trust_remote_code)
    if seed is not None:
        mx.random.seed(seed)
    recommended = recommended_sampling(found.path)
    decoding = Decoding(**settings, **{**(recommended or SAMPLING), **sampling})
    decoder = Decoder(found.model, found.tokenizer, decoding)
    conversation = Conversation(found.tokenizer, decoder, system_prompt=system_prompt)
    console.note(_header(found, decoding, bool(recommended)))
    if not found.tokenizer.has_chat_template:
        console.note("note: this model has no chat template: it continues your text")
    fills_context = max_tokens is None
    with interrupt.handled():
        Talk(conversation, decoder, context=found.context, fills_context=fills_context).run(prompt)


def _header(found: Any, decoding: Decoding, recommended: bool) -> str:
    """Return a line on the model, its size and context, and one on sampling."""
    from splitquant_mlx.formats.manifest import load_manifest

    facts = [console.size(found.nbytes)]
    manifest = load_manifest(found.path) if found.path.is_dir() else None
    if manifest is not None:
        method = manifest.recipe.get("method", "splitquant")
        facts.insert(0, f"{method}, {manifest.bits_per_weight:.2f} bits/weight")
    if found.context:
        facts.append(f"context {found.context:,} tokens")
    names = {"temp": "temperature", "top_p": "top_p", "min_p": "min_p", "top_k": "top_k"}
    values = (f"{label} {getattr(decoding, name):g}" for name, label in names.items())
    source = "as generation_config.json recommends" if recommended else "/set changes it"
    return (
        f"{console.plain(found.name)}: {', '.join(facts)}\n"
        f"Sampling: {', '.join(value for value in values if not value.endswith(' 0'))} ({source})"
    )
