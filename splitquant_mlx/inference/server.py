"""Serve a model over HTTP with OpenAI's API.

mlx runs in the main thread, which receives Ctrl-C; uvicorn runs in another. The port is bound first
and accepts connections once the model is loaded. Under mlx.launch each rank has a shard of the
model, and rank 0 runs the HTTP server.
"""

import logging
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from splitquant_mlx.errors import CheckpointError, RankError, RecipeError, SplitQuantError
from splitquant_mlx.inference.answers import Service
from splitquant_mlx.inference.app import application
from splitquant_mlx.inference.engine import Engine
from splitquant_mlx.inference.protocol import SHUTTING_DOWN, APIError
from splitquant_mlx.inference.settings import ServeSettings
from splitquant_mlx.models.footprint import context_length
from splitquant_mlx.models.loader import load
from splitquant_mlx.models.source import Source, resolve
from splitquant_mlx.runtime.compatibility import NAMES, check_names
from splitquant_mlx.runtime.ranks import Group, connected, fail_together, is_single_rank, join

MAX_CONNECTIONS = 200
DEFAULT_CONTEXT = 32768  # context length of models whose config has none
SHUTDOWN_S = 1.0  # time to send the shutdown error to clients


def serve(
    model: str,
    settings: ServeSettings | None = None,
    *,
    trust_remote_code: bool = False,
    on_ready: Callable[[str], None] = lambda url: None,
) -> None:
    """Serve `model` until a KeyboardInterrupt.

    Args:
        model: hub repo id, directory or .gguf file.
        settings: settings of the server; None for the defaults.
        trust_remote_code: run Python files that come with the checkpoint.
        on_ready: called with the URL once the server accepts requests.

    Raises:
        SplitQuantError: when the model cannot be loaded, does not support a setting, the port is in
            use, or the connection to another rank is lost.
    """
    for module in NAMES:
        check_names(module)
    settings = settings or ServeSettings()
    group = join()
    with ExitStack() as stack:
        with fail_together(group):
            if not is_single_rank(group) and (settings.adapter_path or settings.draft_model):
                raise RecipeError("--adapter-path, --draft-model: expected one rank, got several")
            source = resolve(model)
            listener = stack.enter_context(
                bind(settings.host, settings.port) if group.rank() == 0 else nullcontext()
            )
        with fail_together(group):
            service = load_service(source, settings, trust_remote_code, group)
        engine = service.engine
        if listener is None:
            with suppress(RankError), connected():
                engine.run()
            return
        url = stack.enter_context(listening(service, listener))
        with suppress(KeyboardInterrupt), connected():
            on_ready(url)
            if not is_single_rank(group):  # to stop the other ranks, too
                for number in (signal.SIGINT, signal.SIGTERM):
                    signal.signal(number, lambda *_: setattr(engine, "stopping", True))
            engine.run()


def load_service(source: Source, settings: ServeSettings, trusted: bool, group: Group) -> Service:
    """Load model, adapter and draft model; call this in the thread that runs the engine."""
    template = {"chat_template": settings.chat_template} if settings.chat_template else {}
    model, tokenizer = load(
        source,
        trust_remote_code=trusted,
        tokenizer_config={**template, "trust_remote_code": trusted},
        group=group,
        pipeline=settings.pipeline,
    )
    if settings.adapter_path is not None:
        from mlx_lm.utils import load_adapters

        try:
            model = load_adapters(model, settings.adapter_path)
        except Exception as exc:  # mlx-lm raises FileNotFoundError, ValueError, KeyError, ...
            message = f"adapter {settings.adapter_path} cannot be loaded: {exc}"
            raise CheckpointError(message) from exc
        model.eval()
    draft = None
    if settings.draft_model is not None:
        draft, draft_tokenizer = load(settings.draft_model)
        if draft_tokenizer.get_vocab() != tokenizer.get_vocab():
            raise RecipeError(
                f"--draft-model {settings.draft_model}: expected the vocabulary of the model, got "
                "another: give a model of the same family"
            )
    engine = Engine(model, tokenizer, settings, group=group, draft_model=draft)
    return Service(engine, model_names(source, settings), context_length(model) or DEFAULT_CONTEXT)


def model_names(source: Source, settings: ServeSettings) -> list[str]:
    """Return the names that requests may use for the model; responses contain the first."""
    name = source.name.rstrip("/").removeprefix("./")
    base = Path(name).name
    paths = (source.path.absolute(), source.path.resolve())
    names = [*settings.served_model_name, name, base, base.removesuffix(".gguf"), *map(str, paths)]
    return list(dict.fromkeys([*names, "default_model"]))  # mlx_lm.server's name


def bind(host: str, port: int) -> socket.socket:
    """Return a socket that is bound, but does not accept connections yet."""
    listener = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
    except OSError as exc:
        listener.close()
        raise SplitQuantError(
            f"cannot listen on {host}, port {port}: {exc.strerror or exc}: choose another with "
            "--host or --port"
        ) from exc
    return listener


@contextmanager
def listening(service: Service, listener: socket.socket) -> Iterator[str]:
    """Run the HTTP server in a thread; yield its URL once it accepts requests."""
    logging.getLogger("splitquant_mlx.serve").setLevel(service.settings.log_level)
    config = uvicorn.Config(
        application(service),
        http=Connection,
        loop="asyncio",
        ws="none",
        lifespan="off",
        log_config=None,
        log_level="error",
        access_log=False,
        server_header=False,
        timeout_keep_alive=service.settings.request_timeout,  # type: ignore[arg-type]
        timeout_graceful_shutdown=SHUTDOWN_S,  # type: ignore[arg-type]
    )
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    while thread.is_alive() and not server.started:
        time.sleep(0.01)
    host, port = listener.getsockname()[:2]
    try:
        yield f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
    finally:
        service.engine.close(APIError(503, SHUTTING_DOWN))
        server.should_exit = True
        thread.join(5 * SHUTDOWN_S)


class Connection(H11Protocol):
    """A connection with a timeout for slow clients.

    uvicorn has no timeout for a request's headers, nor for a client that does not read.
    """

    def connection_made(self, transport: Any) -> None:
        """Start the timeout; reject connections above the limit."""
        super().connection_made(transport)
        if len(self.connections) > MAX_CONNECTIONS:
            transport.abort()
        self._watch(None)

    def _watch(self, before: Any) -> None:
        """Close the connection if it waits for the client and has not changed since `before`."""
        cycle = self.cycle
        waits_for_server = cycle is not None and not (
            cycle.more_body or cycle.response_complete or self.flow.write_paused
        )
        now = (cycle, self.transport.get_write_buffer_size())
        if now == before and not waits_for_server:
            self.transport.abort()
        self._timer = self.loop.call_later(self.timeout_keep_alive, self._watch, now)

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop the timeout."""
        self._timer.cancel()
        super().connection_lost(exc)
