"""Offer `serve`."""

from typing import Annotated

import typer

from splitquant_mlx.cli.options import (
    DEFAULT_MODEL,
    Device,
    Model,
    TrustRemoteCode,
    check_model,
    start,
)


def serve(
    context: typer.Context,
    model: Model = DEFAULT_MODEL,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen on; 0 takes any free one.")] = 8080,
    trust_remote_code: TrustRemoteCode = False,
    device: Device = None,
) -> None:
    """Serve a model with OpenAI's HTTP API; all other options are passed on to mlx_lm.server."""
    check_model(model)
    start(device)
    from splitquant_mlx.serve import serve as serve_model

    serve_model(
        model,
        host=host,
        port=port,
        trust_remote_code=trust_remote_code,
        options=context.args,
        on_ready=lambda url: print(f"Serving {model} at {url}/v1 (Ctrl-C stops)", flush=True),
    )
