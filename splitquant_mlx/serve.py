"""Serve models over HTTP with OpenAI's API: mlx_lm.server with this package's loader.

mlx_lm.server's `main` parses its options and calls its module's `run`, which computes in a thread
of its own with models that its module's `load` returns. These names are replaced here: `load` reads
split checkpoints without running their code, and `run` computes in the main thread, so that errors
and Ctrl-C arrive there, and opens the port only once the model is loaded.
"""

import argparse
import socket
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from types import ModuleType, SimpleNamespace
from typing import Any

from splitquant_mlx.errors import CheckpointError, RecipeError, SplitQuantError
from splitquant_mlx.loader import load
from splitquant_mlx.source import Source, resolve


def serve(
    model: str,
    *,
    host: str = "127.0.0.1",
    port: int = 8080,
    trust_remote_code: bool = False,
    options: Sequence[str] = (),
    on_ready: Callable[[str], None] = lambda url: None,
) -> None:
    """Serve `model` until a KeyboardInterrupt.

    Args:
        model: hub repo id, directory or .gguf file.
        host: address or name to listen on.
        port: 0 lets the system choose one.
        trust_remote_code: run Python files that `model` brings along; never those of other models
            that clients ask for.
        options: further command-line options of mlx_lm.server, passed on as they are.
        on_ready: called with the URL once requests are answered.

    Raises:
        SplitQuantError: the model is not usable, an option is unknown, or the port is taken.
    """
    from huggingface_hub import constants
    from mlx_lm import server

    source = resolve(model)
    # The name under which /v1/models lists the model, so that asking for it loads nothing anew.
    name = str(source.path.resolve()) if source.revision is None else model
    with _listener(host, port) as listener:
        # /v1/models lists the hub's cache too, and fails where there is none.
        with suppress(OSError):
            Path(constants.HF_HUB_CACHE).mkdir(parents=True, exist_ok=True)
        with (
            _replaced(sys, argv=["mlx_lm.server", "--model", name, *options]),
            _replaced(
                server,
                argparse=SimpleNamespace(ArgumentParser=_Parser),
                load=partial(_load, {name: source}, trust_remote_code),
                Thread=_ThisThread,
                run=lambda host, port, provider: _run(listener, provider, on_ready),
            ),
        ):
            server.main()


def _load(
    own: dict[str, Source],
    trust_own: bool,
    path_or_hf_repo: str,
    tokenizer_config: dict[str, Any] | None = None,
    adapter_path: str | None = None,
    return_config: bool = False,
    **ignored: Any,
) -> tuple[Any, ...]:
    """Load a model as mlx_lm.load would, called as mlx_lm.server calls it."""
    trusted = trust_own and path_or_hf_repo in own
    model, tokenizer = load(
        own.get(path_or_hf_repo, path_or_hf_repo),
        trust_remote_code=trusted,
        tokenizer_config={**(tokenizer_config or {}), "trust_remote_code": trusted},
    )
    if adapter_path is not None:
        from mlx_lm.utils import load_adapters

        try:
            model = load_adapters(model, adapter_path)
        except Exception as exc:  # mlx-lm raises FileNotFoundError, ValueError, KeyError, ...
            raise CheckpointError(f"adapter {adapter_path} cannot be loaded: {exc}") from exc
        model.eval()
    # Of the config, mlx_lm.server wants to know what it says on images; text is all we load.
    return (model, tokenizer, {}) if return_config else (model, tokenizer)


def _run(listener: ThreadingHTTPServer, provider: Any, on_ready: Callable[[str], None]) -> None:
    """Load the model and compute in this thread, answer requests in others, until Ctrl-C."""
    from mlx_lm import server
    from mlx_lm.models.cache import LRUPromptCache

    generator = server.ResponseGenerator(
        provider, LRUPromptCache(provider.cli_args.prompt_cache_size)
    )
    listener.RequestHandlerClass = partial(  # type: ignore[assignment]
        server.APIHandler, generator, system_fingerprint=server.get_system_fingerprint()
    )
    listening = Thread(target=listener.serve_forever, daemon=True)
    load_default = provider.load_default

    def load_and_open() -> None:
        load_default()
        listener.server_activate()
        listening.start()
        on_ready(_url(listener))

    provider.load_default = load_and_open
    if (adapter := provider.cli_args.adapter_path) is not None:
        # mlx-lm keeps it for "default_model" only, and 0.31 does not find it there.
        provider._adapter_map[provider.cli_args.model] = adapter
    try:
        generator._generate()
    except KeyboardInterrupt:
        pass
    finally:
        if listening.is_alive():
            listener.shutdown()


class _ThisThread:
    """Stand in for the thread in which mlx_lm.server would compute; `_run` does it instead.

    There, Ctrl-C would wait for the answers under way, and Python before 3.13 may abort at the end:
    it does not wait until mlx has tidied up after the thread.
    """

    def __init__(self, target: Callable[[], None]) -> None:
        pass

    def start(self) -> None:
        pass

    def is_alive(self) -> bool:
        return True


@contextmanager
def _listener(host: str, port: int) -> Iterator[ThreadingHTTPServer]:
    """Yield a server that has its port, but takes no connections yet."""
    if not 0 <= port <= 65535:
        raise RecipeError(f"--port: wanted 0 to 65535, got {port}")
    server = None
    try:
        family, _, _, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        server_class = type("Server", (ThreadingHTTPServer,), {"address_family": family})
        server = server_class(
            (str(address[0]), port), BaseHTTPRequestHandler, bind_and_activate=False
        )
        server.server_bind()
    except OSError as exc:
        if server is not None:
            server.server_close()
        raise SplitQuantError(
            f"cannot listen on {host}, port {port}: {exc.strerror or exc}: choose another with "
            "--host or --port"
        ) from exc
    with server:
        yield server


def _url(server: ThreadingHTTPServer) -> str:
    host, port = server.server_address[:2]
    return f"http://[{host}]:{port}" if ":" in str(host) else f"http://{host}:{port}"


class _Parser(argparse.ArgumentParser):
    """Raise where argparse would print its usage and exit."""

    def error(self, message: str) -> Any:
        raise RecipeError(f"mlx_lm.server: {message}")


@contextmanager
def _replaced(module: ModuleType, **values: Any) -> Iterator[None]:
    """Give names of a module other values for a while."""
    before = {name: getattr(module, name) for name in values}
    vars(module).update(values)
    try:
        yield
    finally:
        vars(module).update(before)
