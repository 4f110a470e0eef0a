"""The command `serve`; its options are the fields of ServeSettings."""

import logging
import sys
from ipaddress import ip_address
from urllib.parse import urlsplit

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
from splitquant_mlx.cli.settings import Given, settings_options
from splitquant_mlx.inference.settings import ServeSettings

LIMITS = (
    "max_request_bytes max_prompt_tokens max_tokens_limit max_concurrent request_timeout"
).split()
PANELS = {
    **dict.fromkeys(LIMITS, "Limits"),
    **dict.fromkeys(("max_tokens", "temp", "top_p", "top_k", "min_p"), SAMPLING),
    **dict.fromkeys(("adapter_path", "draft_model", "num_draft_tokens", "pipeline"), LOADING),
    **dict.fromkeys(("chat_template", "chat_template_args"), "Chat template"),
    **dict.fromkeys(("decode_concurrency", "prompt_concurrency", "prefill_step_size"), "Batches"),
    **dict.fromkeys(("prompt_cache_size", "prompt_cache_bytes"), CACHE),
    **dict.fromkeys(("kv_bits", "kv_group_size", "quantized_kv_start"), CACHE),
}


@settings_options(
    ServeSettings,
    "settings",
    panels=PANELS,
    variables={"api_key": "SPLITQUANT_API_KEY"},
    with_defaults=True,
)
def serve(
    model: ModelArgument = None,
    model_option: ModelOption = None,
    trust_remote_code: TrustRemoteCode = False,
    device: Device = None,
    *,
    settings: Given,
) -> None:
    """Serve a model with OpenAI's HTTP API."""
    chosen = ServeSettings(**settings)
    start(device)
    from splitquant_mlx.cli.loading import check_memory
    from splitquant_mlx.inference.server import serve as serve_model
    from splitquant_mlx.models.source import resolve
    from splitquant_mlx.runtime.ranks import fail_together, is_single_rank

    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    group = join()
    with fail_together(group):
        name = choose_model(model, model_option)
        if is_single_rank(group):
            check_memory(resolve(name).path, f"serving {name}")

    def announce(url: str) -> None:
        interrupt.set_server()
        if warning := _warning(url, chosen.api_key):
            print(f"warning: {warning}", file=sys.stderr)
        print(f"Serving {name} at {url}/v1 (Ctrl-C stops)", flush=True)

    serve_model(name, chosen, trust_remote_code=trust_remote_code, on_ready=announce)
    if is_single_rank(group):  # the interpreter would take seconds to free the model
        sys.stdout.flush()
        interrupt.leave()


def _warning(url: str, api_key: str | None) -> str | None:
    address = urlsplit(url).hostname or ""
    if ip_address(address).is_loopback:
        return None
    if api_key is None:
        return (
            f"ANYONE who can reach {address} over the network can use this model without a key: "
            "set SPLITQUANT_API_KEY, or leave out --host"
        )
    return f"{address} can be reached over the network; key and text are sent unencrypted"
