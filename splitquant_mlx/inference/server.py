"""Serve a model over HTTP with OpenAI's API.

mlx computes in the main thread, where errors and Ctrl-C arrive; uvicorn answers in another. The
port is taken first and opened once the model is loaded. Under mlx.launch each rank holds a share of
the model; rank 0 serves, and the others compute along.
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
from splitquant_mlx.inference.protocol import ENDS, Refusal
from splitquant_mlx.inference.settings import ServeSettings
from splitquant_mlx.models.footprint import context_length
from splitquant_mlx.models.loader import load
from splitquant_mlx.models.source import Source, resolve
from splitquant_mlx.runtime.compatibility import NAMES, check_names
from splitquant_mlx.runtime.ranks import Group, alone, connected, join, together

CONNECTIONS = 200
CONTEXT = 32768  # of a model that does not say
END_S = 1.0  # for answers under way to be told that the server ends


def serve(
    model: str,
    settings: ServeSettings | None = None,
    *,
    trust_remote_code: bool = False,
    on_ready: Callable[[str], None] = lambda url: None,
) -> None:
    """Serve `model`, and no other, until a KeyboardInterrupt.

    Args:
        model: hub repo id, directory or .gguf file.
        settings: of the server; None takes the defaults.
        trust_remote_code: run Python files that `model` brings along.
        on_ready: called with the URL once requests are answered.

    Raises:
        SplitQuantError: the model is not usable, a setting does not fit it, the port is taken, or
            another rank is gone.
    """
    for module in NAMES:
        check_names(module)
    settings = settings or ServeSettings()
    group = join()
    with ExitStack() as stack:
        with together(group):
            if not alone(group) and (settings.adapter_path or settings.draft_model):
                raise RecipeError("--adapter-path, --draft-model: not for more than one rank")
            source = resolve(model)
            bound = bind(settings.host, settings.port) if group.rank() == 0 else nullcontext()
            listener = stack.enter_context(bound)
        with together(group):
            service = load_service(source, settings, trust_remote_code, group)
        engine = service.engine
        if listener is None:
            with suppress(RankError), connected():
                engine.run()
            return
        url = stack.enter_context(listening(service, listener))
        with suppress(KeyboardInterrupt), connected():
            on_ready(url)
            if not alone(group):  # the others have to hear of the end
                for number in (signal.SIGINT, signal.SIGTERM):
                    signal.signal(number, lambda *_: setattr(engine, "stopping", True))
            engine.run()


def load_service(source: Source, settings: ServeSettings, trusted: bool, group: Group) -> Service:
    """Return what answers with a model, adapter and draft model, in the thread to compute."""
    own = {"chat_template": settings.chat_template} if settings.chat_template else {}
    model, tokenizer = load(
        source,
        trust_remote_code=trusted,
        tokenizer_config={**own, "trust_remote_code": trusted},
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
        draft, words = load(settings.draft_model)
        if words.get_vocab() != tokenizer.get_vocab():
            raise RecipeError(f"--draft-model {settings.draft_model}: expected the model's tokens")
    engine = Engine(model, tokenizer, settings, group=group, draft_model=draft)
    return Service(engine, model_names(source, settings), context_length(model) or CONTEXT)


def model_names(source: Source, settings: ServeSettings) -> list[str]:
    """Return the names by which clients may ask for a model, first the one that they are told."""
    own = source.name.rstrip("/").removeprefix("./")
    base = Path(own).name
    paths = (source.path.absolute(), source.path.resolve())
    names = [*settings.served_model_name, own, base, base.removesuffix(".gguf"), *map(str, paths)]
    return list(dict.fromkeys([*names, "default_model"]))  # mlx_lm.server's name for it


def bind(host: str, port: int) -> socket.socket:
    """Return a socket that has its port, but takes no connections yet."""
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
    """Answer requests in a thread; yield the URL once they are."""
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
        timeout_graceful_shutdown=END_S,  # type: ignore[arg-type]
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
        service.engine.close(Refusal(503, ENDS))
        server.should_exit = True
        thread.join(5 * END_S)


class Connection(H11Protocol):
    """A connection that is cut when its client takes longer than the time limit.

    uvicorn waits as long as it takes for a request's head, and for a client that does not read.
    """

    def connection_made(self, transport: Any) -> None:
        """Begin to watch; turn away who is one too many."""
        super().connection_made(transport)
        if len(self.connections) > CONNECTIONS:
            transport.abort()
        self._watch(None)

    def _watch(self, before: Any) -> None:
        """Cut the connection if the client is to do something, and nothing has changed."""
        cycle = self.cycle
        computing = cycle is not None and not (
            cycle.more_body or cycle.response_complete or self.flow.write_paused
        )
        now = (cycle, self.transport.get_write_buffer_size())
        if now == before and not computing:
            self.transport.abort()
        self._timer = self.loop.call_later(self.timeout_keep_alive, self._watch, now)

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop watching."""
        self._timer.cancel()
        super().connection_lost(exc)
