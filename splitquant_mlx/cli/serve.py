"""Offer `serve`; its options are the fields of ServeSettings."""

import dataclasses
import inspect
import logging
import sys
from ipaddress import ip_address
from typing import Annotated, Any, get_args, get_type_hints
from urllib.parse import urlsplit

import typer

from splitquant_mlx.cli import interrupt
from splitquant_mlx.cli.launched import join
from splitquant_mlx.cli.options import (
    CACHE,
    LOADING,
    SAMPLING,
    Device,
    ModelArgument,
    ModelOption,
    TrustRemoteCode,
    choose_model,
    start,
)
from splitquant_mlx.inference.settings import ServeSettings

LIMITS = (
    "max_request_bytes max_prompt_tokens max_tokens_limit max_concurrent request_timeout"
).split()
PANELS = {
    "Limits": LIMITS,
    SAMPLING: ("max_tokens", "temp", "top_p", "top_k", "min_p"),
    LOADING: ("adapter_path", "draft_model", "num_draft_tokens", "pipeline"),
    "Chat template": ("chat_template", "chat_template_args"),
    "Batches": ("decode_concurrency", "prompt_concurrency", "prefill_step_size"),
    CACHE: (
        *("prompt_cache_size", "prompt_cache_bytes"),
        *("kv_bits", "kv_group_size", "quantized_kv_start"),
    ),
}


def _offer_settings(command: Any) -> Any:
    """Give a command an option for each field of ServeSettings, in place of **settings."""
    shared = [p for p in inspect.signature(command).parameters.values() if p.kind != p.VAR_KEYWORD]
    hints = get_type_hints(ServeSettings, include_extras=True)
    options = []
    for field in dataclasses.fields(ServeSettings):
        kind, text = get_args(hints[field.name])
        kind = list[str] if field.default == () else kind
        variable = "SPLITQUANT_API_KEY" if field.name == "api_key" else None
        panel = next((title for title, names in PANELS.items() if field.name in names), None)
        option = Annotated[kind, typer.Option(help=text, envvar=variable, rich_help_panel=panel)]
        kind_of = inspect.Parameter.KEYWORD_ONLY
        options.append(
            inspect.Parameter(field.name, kind_of, default=field.default, annotation=option)
        )
    command.__signature__ = inspect.Signature([*shared, *options])
    command.__annotations__ = {p.name: p.annotation for p in [*shared, *options]}
    return command


@_offer_settings
def serve(
    model: ModelArgument = None,
    model_option: ModelOption = None,
    trust_remote_code: TrustRemoteCode = False,
    device: Device = None,
    **settings: Any,
) -> None:
    """Serve a model with OpenAI's HTTP API."""
    chosen = ServeSettings(**settings)
    start(device)
    from splitquant_mlx.cli.loading import check_room
    from splitquant_mlx.inference.server import serve as serve_model
    from splitquant_mlx.models.source import resolve
    from splitquant_mlx.runtime.ranks import alone, together

    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    group = join()
    with together(group):
        name = choose_model(model, model_option)
        if alone(group):
            check_room(resolve(name).path, f"serving {name}")

    def announce(url: str) -> None:
        interrupt.serves()
        if warning := _warning(url, chosen.api_key):
            print(f"warning: {warning}", file=sys.stderr)
        print(f"Serving {name} at {url}/v1 (Ctrl-C stops)", flush=True)

    serve_model(name, chosen, trust_remote_code=trust_remote_code, on_ready=announce)
    if alone(group):  # the interpreter would take seconds to put away what it loaded
        sys.stdout.flush()
        interrupt.leave()


def _warning(url: str, api_key: str | None) -> str | None:
    address = urlsplit(url).hostname or ""
    if ip_address(address).is_loopback:
        return None
    if api_key is None:
        return (
            f"ANYONE who can reach {address} over the network can use this model, without a key: "
            "set SPLITQUANT_API_KEY, or leave out --host"
        )
    return f"{address} can be reached over the network, where key and text travel unencrypted"
