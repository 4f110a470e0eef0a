"""Serve models over HTTP with OpenAI's API: mlx_lm.server with this package's loader.

mlx_lm.server's `main` parses its options and calls its module's `run`, which computes in a thread
of its own with models that its module's `load` returns. These names are replaced here: `load` reads
split checkpoints without running their code, and `run` computes in the main thread, so that errors
and Ctrl-C arrive there, and opens the port only once the model is loaded. `openai_handler` stands
between the clients and mlx_lm.server, `answers` between it and its generator.

Under mlx.launch each rank holds a share of the model; rank 0 serves, and mlx_lm.server's generators
have the others compute along.
"""

import argparse
import inspect
import logging
import socket
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from types import ModuleType, SimpleNamespace
from typing import Any

from splitquant_mlx.errors import CheckpointError, RankError, RecipeError, SplitQuantError
from splitquant_mlx.inference.fields import Refusal
from splitquant_mlx.inference.request import Limits, Served, check_request
from splitquant_mlx.models.loader import load
from splitquant_mlx.models.source import Source, resolve
from splitquant_mlx.runtime.compatibility import check_names
from splitquant_mlx.runtime.ranks import Group, connected, join, together

# Seconds between two looks at who has come and who has left; mlx_lm.server's own is 0.5.
TURN_S = 0.05
CONNECTIONS = 256


def serve(
    model: str,
    *,
    host: str = "127.0.0.1",
    port: int = 8080,
    api_key: str | None = None,
    limits: Limits | None = None,
    trust_remote_code: bool = False,
    options: Sequence[str] = (),
    on_ready: Callable[[str], None] = lambda url: None,
) -> None:
    """Serve `model`, and no other, until a KeyboardInterrupt.

    Args:
        model: hub repo id, directory or .gguf file; also its name for clients.
        host: address or name to listen on.
        port: 0 lets the system choose one.
        api_key: that clients must send as "Authorization: Bearer KEY"; None asks for none.
        limits: to what clients can ask for; None takes the defaults.
        trust_remote_code: run Python files that `model` brings along.
        options: further command-line options of mlx_lm.server, passed on as they are.
        on_ready: called with the URL once requests are answered.

    Raises:
        SplitQuantError: the model is not usable, an option is unknown or out of range, the port
            is taken, or another rank is gone.
    """
    check_names("mlx_lm.server")
    check_names("mlx_lm.models.cache")
    from mlx_lm import server

    class Provider(server.ModelProvider):
        """Give the served model, whichever is asked for."""

        def load(self, *asked: Any, **ignored: Any) -> Any:
            options = self.cli_args
            if self.is_distributed and (options.adapter_path or options.draft_model):
                raise RecipeError("--adapter-path, --draft-model: not for more than one rank")
            return super().load(options.model, options.adapter_path, options.draft_model)

    group = join()
    with ExitStack() as stack:
        with together(group):
            _check_key(api_key)
            source = resolve(model)
            listener = None if group.rank() else stack.enter_context(_listener(host, port))
        quiet = ("--log-level", "ERROR") if group.rank() else ()
        arguments = ["mlx_lm.server", "--model", model, *options, *quiet]
        load_ours = partial(_load, {model: source}, trust_remote_code)
        stack.enter_context(_replaced(sys, argv=arguments))
        stack.enter_context(
            _replaced(
                server,
                argparse=SimpleNamespace(ArgumentParser=_Parser),
                load=load_ours,
                sharded_load=load_ours,
                ModelProvider=Provider,
                Thread=_ThisThread,
                TimeBudget=partial(server.TimeBudget, budget=TURN_S),
                run=lambda host, port, provider: _run(
                    group, listener, provider, api_key, limits or Limits(), on_ready
                ),
            )
        )
        server.main()


def _check_key(api_key: str | None) -> None:
    if api_key is not None and not (api_key.isprintable() and api_key == api_key.strip() != ""):
        raise RecipeError("--api-key: wanted printable characters, without spaces around them")


def _load(
    own: dict[str, Source],
    trust_own: bool,
    path_or_hf_repo: str,
    tokenizer_config: dict[str, Any] | None = None,
    adapter_path: str | None = None,
    return_config: bool = False,
    tensor_group: Group | None = None,
    pipeline_group: Group | None = None,
    **ignored: Any,
) -> tuple[Any, ...]:
    """Load the model or its draft model as mlx_lm's load and sharded_load would."""
    trusted = trust_own and path_or_hf_repo in own
    model, tokenizer = load(
        own.get(path_or_hf_repo, path_or_hf_repo),
        trust_remote_code=trusted,
        tokenizer_config={**(tokenizer_config or {}), "trust_remote_code": trusted},
        group=tensor_group or pipeline_group,
        pipeline=pipeline_group is not None,
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


def _run(
    group: Group,
    listener: ThreadingHTTPServer | None,
    provider: Any,
    api_key: str | None,
    limits: Limits,
    on_ready: Callable[[str], None],
) -> None:
    """Load the model and compute in this thread, answer requests in others, until Ctrl-C.

    Without a listener, compute along until rank 0 leaves.
    """
    from mlx_lm import server

    from splitquant_mlx.inference.generator import Generator, PromptCache
    from splitquant_mlx.inference.handler import Handler, Service

    with together(group):
        provider.load_default()
        served = _served(provider, limits)
    generator = Generator(
        provider,
        PromptCache(provider.cli_args.prompt_cache_size),
        max_prompt_tokens=limits.max_prompt_tokens,
    )
    if listener is None:
        with suppress(RankError), connected():
            generator.run()
        return
    service = Service(generator=generator, served=served, api_key=api_key)
    listener.RequestHandlerClass = partial(  # type: ignore[assignment]
        Handler, service, system_fingerprint=server.get_system_fingerprint()
    )
    listener.server_activate()
    listening = Thread(target=listener.serve_forever, daemon=True)
    listening.start()
    try:
        on_ready(_url(listener))
        with connected():
            generator.run()
    except KeyboardInterrupt:
        pass
    finally:
        listener.shutdown()


def _served(provider: Any, limits: Limits) -> Served:
    """Say what a loaded model and mlx_lm.server's options allow."""
    import mlx.core as mx
    from transformers import PreTrainedTokenizerBase

    options = provider.cli_args
    served = Served(
        name=options.model,
        vocab_size=provider.model(mx.array([[0]])).shape[-1],
        limits=limits,
        defaults={
            "max_tokens": min(options.max_tokens, limits.max_tokens_limit),
            "num_draft_tokens": options.num_draft_tokens,
            "temperature": options.temp,
            "top_p": options.top_p,
            "top_k": options.top_k,
            "min_p": options.min_p,
        },
        template_parameters=set(
            inspect.signature(PreTrainedTokenizerBase.apply_chat_template).parameters
        ),
    )
    try:
        check_request(b'{"prompt": ""}', chat=False, served=served)
    except Refusal as exc:
        raise RecipeError(f"no request could be answered with these options: {exc}") from exc
    return served


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
        server_class = type("Server", (_Server,), {"address_family": family})
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


class _Server(ThreadingHTTPServer):
    """Listen to many at once, within reason, and say in a line what went wrong with whom."""

    request_queue_size = 128

    def verify_request(self, request: Any, client_address: Any) -> bool:
        return threading.active_count() <= CONNECTIONS

    def handle_error(self, request: Any, client_address: Any) -> None:
        logging.info("connection from %s lost: %s", client_address[0], sys.exc_info()[1])


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
