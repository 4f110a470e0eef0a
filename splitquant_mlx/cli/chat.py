"""The command `chat`."""

from typing import Annotated, Any

import typer

from splitquant_mlx.cli import console, interrupt
from splitquant_mlx.cli.options import Seed, SystemPrompt, TrustedModel, decoding_options, start
from splitquant_mlx.cli.settings import Given, dataclass_options
from splitquant_mlx.inference.decoding import Decoding

# for models without recommended sampling; with greedy decoding, small models repeat themselves
SAMPLING = {"temp": 0.7, "top_p": 0.95}


@decoding_options
@dataclass_options(TrustedModel, "model")
def chat(
    model: TrustedModel,
    prompt: Annotated[str | None, typer.Option("--prompt", "-p", help="The first message.")] = None,
    system_prompt: SystemPrompt = None,
    seed: Seed = None,
    *,
    decoding: Given,
) -> None:
    """Chat with a model; Ctrl-C stops an answer, /help lists the commands.

    Sampling defaults to the recommendation in the model's generation_config.json, with a new seed.
    """
    settings = {"max_tokens": -1, **decoding}
    Decoding(**settings)  # validate before loading the model
    name = model.choose()
    start(model.device)
    import mlx.core as mx

    from splitquant_mlx.cli.loading import load_model
    from splitquant_mlx.cli.talk import Talk
    from splitquant_mlx.inference.chat import Conversation, Decoder
    from splitquant_mlx.inference.decoding import recommended_sampling

    loaded = load_model(name, revision=model.revision, trust_remote_code=model.trust_remote_code)
    if seed is not None:
        mx.random.seed(seed)
    recommended = recommended_sampling(loaded.path)
    chosen = Decoding(**{**(recommended or SAMPLING), **settings})
    decoder = Decoder(loaded.model, loaded.tokenizer, chosen)
    conversation = Conversation(loaded.tokenizer, decoder, system_prompt=system_prompt)
    console.note(_header(loaded, chosen, bool(recommended)))
    if not loaded.tokenizer.has_chat_template:
        console.note("note: this model has no chat template: it continues your text")
    fills_context = "max_tokens" not in decoding
    with interrupt.handle_signals():
        Talk(conversation, decoder, context=loaded.context, fills_context=fills_context).run(prompt)


def _header(loaded: Any, decoding: Decoding, recommended: bool) -> str:
    """Return a line with the model, its size and context, and a line with the sampling settings."""
    from splitquant_mlx.formats.manifest import load_manifest

    facts = [console.size(loaded.nbytes)]
    manifest = load_manifest(loaded.path) if loaded.path.is_dir() else None
    if manifest is not None:
        method = manifest.recipe.get("method", "splitquant")
        facts.insert(0, f"{method}, {manifest.bits_per_weight:.2f} bits/weight")
    if loaded.context:
        facts.append(f"context {loaded.context:,} tokens")
    names = {"temp": "temperature", "top_p": "top_p", "min_p": "min_p", "top_k": "top_k"}
    values = (f"{label} {getattr(decoding, name):g}" for name, label in names.items())
    source = "as generation_config.json recommends" if recommended else "/set changes it"
    return (
        f"{console.plain(loaded.name)}: {', '.join(facts)}\n"
        f"Sampling: {', '.join(value for value in values if not value.endswith(' 0'))} ({source})"
    )
