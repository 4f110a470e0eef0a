"""Offer `serve`."""

import sys
from ipaddress import ip_address
from typing import Annotated
from urllib.parse import urlsplit

import typer

from splitquant_mlx.cli.launched import join
from splitquant_mlx.cli.options import (
    DEFAULT_MODEL,
    Device,
    Model,
    TrustRemoteCode,
    check_model,
    start,
)
from splitquant_mlx.inference.request import Limits


def serve(
    context: typer.Context,
    model: Model = DEFAULT_MODEL,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen on; 0 takes any free one.")] = 8080,
    api_key: Annotated[
        str | None,
        typer.Option(
            envvar="SPLITQUANT_API_KEY",
            help="Key that clients must send; other users can read it from the process list, "
            "unless it comes from the environment.",
        ),
    ] = None,
    max_request_bytes: Annotated[
        int, typer.Option(help="Largest body of a request; a larger one gets status 413.")
    ] = Limits.max_request_bytes,
    max_tokens_limit: Annotated[
        int, typer.Option(help="Most tokens of an answer; asking for more gets status 400.")
    ] = Limits.max_tokens_limit,
    max_prompt_tokens: Annotated[
        int, typer.Option(help="Most tokens of a prompt; a longer one gets status 400.")
    ] = Limits.max_prompt_tokens,
    max_concurrent: Annotated[
        int, typer.Option(help="Requests answered at a time; one more gets status 429.")
    ] = Limits.max_concurrent,
    request_timeout: Annotated[
        float, typer.Option(help="Seconds within which a request must have arrived.")
    ] = Limits.request_timeout_s,
    trust_remote_code: TrustRemoteCode = False,
    device: Device = None,
) -> None:
    """Serve a model with OpenAI's HTTP API; all other options are passed on to mlx_lm.server."""
    limits = Limits(
        max_request_bytes=max_request_bytes,
        max_tokens_limit=max_tokens_limit,
        max_prompt_tokens=max_prompt_tokens,
        max_concurrent=max_concurrent,
        request_timeout_s=request_timeout,
    )
    start(device)
    from splitquant_mlx.inference.server import serve as serve_model
    from splitquant_mlx.runtime.ranks import together

    with together(join()):
        check_model(model)

    def announce(url: str) -> None:
        if warning := _warning(url, api_key):
            print(f"warning: {warning}", file=sys.stderr)
        print(f"Serving {model} at {url}/v1 (Ctrl-C stops)", flush=True)

    serve_model(
        model,
        host=host,
        port=port,
        api_key=api_key,
        limits=limits,
        trust_remote_code=trust_remote_code,
        options=context.args,
        on_ready=announce,
    )


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
