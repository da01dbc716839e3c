"""``distserve serve`` from checked configuration to a clean exit.

Order matters here: what can be wrong without starting anything is checked first, the listening socket is bound before
Ray starts, and whatever was started is stopped in reverse, however this ends.
"""

import asyncio
import logging
import signal
import socket
import time
from collections import Counter
from collections.abc import Callable, Coroutine, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from types import FrameType, TracebackType
from typing import TYPE_CHECKING, Any, Self

import uvicorn
import uvloop
from rich.console import Console

from distserve.api.app import create_app
from distserve.api.model import ServedModel, load_served_model
from distserve.api.settings import ApiSettings
from distserve.cluster.clock import cluster_time
from distserve.cluster.config import ServeConfig
from distserve.cluster.network import Mailbox
from distserve.cluster.observations import Observer
from distserve.cluster.operator import ClusterOperator
from distserve.cluster.owner_backend import OwnerBackend
from distserve.cluster.parts import OWNER
from distserve.cluster.ray_environment import prepare_ray_environment
from distserve.cluster.replay import EventLog, check_log_directory
from distserve.core.config import InstanceSpec
from distserve.core.errors import ConfigError
from distserve.core.messages import InstanceGone
from distserve.core.owner import Owner
from distserve.core.scheduler import ROUTER

if TYPE_CHECKING:
    from distserve.cluster.deployment import Blueprint
    from distserve.cluster.launch import Launched

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Endpoint:
    """A deployment that takes requests: its address, model name, instances, and a way to watch what comes in.

    ``instances`` are in the order of the configuration.
    """

    url: str
    model: str
    instances: tuple[InstanceSpec, ...]
    observe: Callable[[Observer], None]


Client = Callable[[Endpoint], Coroutine[Any, Any, None]]
"""Uses the endpoint; cancelled when the server is told to stop."""

_DRAIN_LIMIT = 256
"""Messages handled at a stretch before the loop looks after its connections again."""
_FAREWELL = 2
"""Seconds that connections get to take their last bytes once all requests have ended."""
_BACKLOG = 2048


def serve(config: ServeConfig, console: Console, client: Client | None = None) -> None:
    """Serve until told to stop by SIGTERM or SIGINT; returns once nothing is left running.

    Args:
        config: What to serve, and how.
        console: Shows the start's progress and the line that ends it.
        client: Run once requests can come; serving ends with it.

    Raises:
        ConfigError: it cannot be served; nothing is left running.
        InstanceError: an instance did not start; likewise.
    """
    if config.event_log is not None and config.ray_address is None:
        check_log_directory(config.event_log)
    with ExitStack() as stack:
        listener = stack.enter_context(_listen(config.host, config.port))
        model = load_served_model(
            config.model_dir, names=config.served_model_names, max_model_len=config.engine.max_model_len
        )
        stack.enter_context(_terminable())
        progress = stack.enter_context(_Progress(console))
        prepare_ray_environment(config.ray_address)
        from distserve.cluster.launch import launch  # imports Ray

        launched = stack.enter_context(launch(config, progress.show))

        def announce(url: str) -> None:
            progress.stop()
            console.print(_summary(url, model, launched.deployment.blueprint), highlight=False, soft_wrap=True)

        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(_serve(config, model, launched, listener, announce, client))


async def _serve(
    config: ServeConfig,
    model: ServedModel,
    launched: "Launched",
    listener: socket.socket,
    announce: Callable[[str], None],
    client: Client | None,
) -> None:
    """Run the endpoint until a signal has come and what was under way has ended."""
    loop = asyncio.get_running_loop()
    log = EventLog.of(OWNER, config.event_log) if config.event_log else None
    backend = OwnerBackend(OWNER, Owner(OWNER), launched.mailbox, loop, log)
    _receive(loop, launched.mailbox, backend)
    backend.start()
    settings = ApiSettings(api_key=config.api_key)
    server = _Server(
        uvicorn.Config(
            create_app(
                backend,
                replace(model, max_model_len=launched.deployment.blueprint.max_model_len),
                settings,
                clock=cluster_time,
                operator=ClusterOperator(backend, launched.deployment),
            ),
            http="httptools",
            lifespan="off",
            access_log=False,
            log_level="warning",
            timeout_graceful_shutdown=_FAREWELL,
        )
    )
    told = asyncio.Queue[None]()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, told.put_nowait, None)
    serving = asyncio.create_task(server.serve(sockets=[listener]))
    stopping = asyncio.create_task(told.get())
    ends: set[asyncio.Task[Any]] = {serving, stopping}
    using: asyncio.Task[None] | None = None
    ready = asyncio.create_task(backend.ready(config.num_instances))
    try:
        await asyncio.wait({*ends, ready}, return_when=asyncio.FIRST_COMPLETED)
        if ready.done():
            url = _url(listener)
            announce(url)
            if client is not None:
                specs = launched.deployment.blueprint.specs
                using = asyncio.create_task(client(Endpoint(url, model.names[0], specs, backend.observe)))
                ends.add(using)
            await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
        if using is not None and not using.done():
            using.cancel()
            await asyncio.wait({using})
        if not serving.done():
            await _drain(backend, told, config.drain_timeout)
    finally:
        ready.cancel()
        backend.close()
        server.should_exit = True
        await asyncio.wait({serving})
        loop.remove_reader(launched.mailbox.fileno)
        if log is not None:
            log.close()
    for task in ends:
        if task.done() and not task.cancelled():
            task.result()


async def _drain(backend: OwnerBackend, told: asyncio.Queue[None], patience: float) -> None:
    """Refuse what is new, let what is under way end; no longer than ``patience`` seconds or a second signal."""
    if backend.num_active:
        logger.warning(
            "finishing %d requests for at most %g s; interrupt again to stop now", backend.num_active, patience
        )
    draining = asyncio.create_task(backend.drain(patience))
    again = asyncio.create_task(told.get())
    await asyncio.wait({draining, again}, return_when=asyncio.FIRST_COMPLETED)
    again.cancel()
    draining.cancel()
    if backend.num_active:
        logger.warning("gave up on %d requests", backend.num_active)


def _receive(loop: asyncio.AbstractEventLoop, mailbox: Mailbox, backend: OwnerBackend) -> None:
    """Have the loop hand whatever arrives in the mailbox to the backend."""

    def on_readable() -> None:
        arrived = mailbox.drain(_DRAIN_LIMIT)
        for received in arrived:
            backend.receive(received)
            match received.message:
                case InstanceGone(name) if name != ROUTER:  # the router's name passes to its successor
                    mailbox.forget(name)
        # The descriptor is edge-triggered: what is left would not be announced again.
        if len(arrived) == _DRAIN_LIMIT:
            loop.call_soon(on_readable)

    loop.add_reader(mailbox.fileno, on_readable)
    loop.call_soon(on_readable)


class _Progress:
    """What the start waits for: one changing line on a terminal, else a line per change."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._status = console.status("starting")
        self._shown = ""
        self._start = time.monotonic()

    def __enter__(self) -> Self:
        self._status.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def show(self, text: str) -> None:
        self._status.update(text)
        if not self._console.is_terminal and text != self._shown:
            self._console.print(f"{time.monotonic() - self._start:5.1f} s  {text}", highlight=False, soft_wrap=True)
        self._shown = text

    def stop(self) -> None:
        self._status.stop()


class _Server(uvicorn.Server):
    """uvicorn, without its own idea of signals: draining comes first here."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


@contextmanager
def _listen(host: str, port: int) -> Iterator[socket.socket]:
    """Bind the endpoint's socket; it listens once the server takes it over."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((host, port))
            # Bound but not listening, another process could still take the port.
            listener.listen(_BACKLOG)
        except OSError as error:
            raise ConfigError(f"cannot listen on {host} port {port}: {error.strerror or error}") from error
        yield listener
    finally:
        listener.close()


@contextmanager
def _terminable() -> Iterator[None]:
    """While starting, SIGTERM unwinds like Ctrl-C, so that whatever has started is stopped."""

    def on_signal(number: int, _frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    previous = signal.signal(signal.SIGTERM, on_signal)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


def _url(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def _summary(url: str, model: ServedModel, blueprint: "Blueprint") -> str:
    """The line that ends the start: URL, model, pools, KV capacity."""
    counts = Counter((spec.role, spec.kv.num_tokens) for spec in blueprint.specs)
    pools = [f"{count} {role} x {num_tokens:,} tokens of KV" for (role, num_tokens), count in counts.items()]
    return f"Serving {model.names[0]} at {url}/v1 on {', '.join(pools)}"
