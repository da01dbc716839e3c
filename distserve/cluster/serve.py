"""``distserve serve`` from checked configuration to a clean exit.

Order matters here: what can be wrong without starting anything is checked first, the listening socket is bound before
Ray starts, and whatever was started is stopped in reverse, however this ends.
"""

import asyncio
import logging
import os
import signal
import socket
import time
from collections.abc import Callable, Coroutine, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from types import FrameType, TracebackType
from typing import Any, Self

import ray
import uvicorn
import uvloop
from ray.exceptions import RayError
from rich.console import Console

from distserve.api.app import create_app
from distserve.api.model import ServedModel, load_served_model
from distserve.api.settings import ApiSettings
from distserve.cluster.clock import cluster_time
from distserve.cluster.config import ServeConfig
from distserve.cluster.deployment import Blueprint, Deployment, cause_of
from distserve.cluster.describe import Description, ModelFacts
from distserve.cluster.network import Mailbox, create_key
from distserve.cluster.owner_backend import OwnerBackend
from distserve.cluster.parts import Card, ClusterKey, EnginePlan
from distserve.cluster.ray_cluster import ray_cluster
from distserve.cluster.replay import EventLog
from distserve.cluster.session import Session
from distserve.cluster.sizing import free_memory, size_kv, threads_per_instance
from distserve.cluster.supervise import Supervisor
from distserve.core.config import Role, SchedulerConfig
from distserve.core.errors import ConfigError
from distserve.core.owner import Owner

logger = logging.getLogger(__name__)

Client = Callable[[str], Coroutine[Any, Any, None]]
"""Talks to the endpoint at the URL it is given."""

OWNER = "api-0"
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
        client: Run with the URL once requests can come; serving ends with it.

    Raises:
        ConfigError: it cannot be served; nothing is left running.
        InstanceError: an instance did not start; likewise.
    """
    with ExitStack() as stack:
        listener = stack.enter_context(_listen(config.host, config.port))
        model = load_served_model(
            config.model_dir, names=config.served_model_names, max_model_len=config.engine.max_model_len
        )
        stack.enter_context(_terminable())
        progress = stack.enter_context(_Progress(console))
        launch = stack.enter_context(_launch(config, progress.show))

        def announce(url: str) -> None:
            progress.stop()
            console.print(_summary(url, model, launch.deployment.blueprint), highlight=False, soft_wrap=True)

        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(_serve(config, model, launch, listener, announce, client))


@dataclass(frozen=True, slots=True)
class _Launch:
    """What runs beneath the endpoint."""

    deployment: Deployment
    mailbox: Mailbox


@contextmanager
def _launch(config: ServeConfig, show: Callable[[str], None]) -> Iterator[_Launch]:
    """Start every part but the endpoint; stop them again at the end."""
    num_threads = threads_per_instance(config.engine.threads, config.num_instances)
    num_cores = num_threads * config.num_instances
    with ExitStack() as stack:
        description = stack.enter_context(Description(config.model_dir, config.engine.dtype))
        if config.ray_address is None:
            show("starting a local Ray cluster")
            directory = str(stack.enter_context(Session()).directory)
        else:
            show(f"joining the Ray cluster at {config.ray_address}")
            directory = ""
        cluster = stack.enter_context(ray_cluster(config.ray_address, directory, num_cores + 1))
        show("examining the model")
        facts = description.result()
        key = create_key()
        mailbox = Mailbox(OWNER, key, cluster.host)
        stack.callback(mailbox.close)
        blueprint = _blueprint(config, facts, num_threads, key)
        deployment = Deployment(
            cluster,
            blueprint,
            Card(OWNER, mailbox.endpoint),
            lambda cards: mailbox.meet({card.name: card.endpoint for card in cards}),
        )
        stack.callback(deployment.close)
        _start_parts(deployment, show)
        supervisor = Supervisor(deployment)
        supervisor.start()
        stack.callback(supervisor.close)
        yield _Launch(deployment, mailbox)


def _start_parts(deployment: Deployment, show: Callable[[str], None]) -> None:
    """Start router and instances in parallel and introduce them to each other."""
    show("waiting for CPUs")
    deployment.reserve()
    router = deployment.start_router()
    loading = dict(deployment.start_instance(slot)[::-1] for slot in range(len(deployment.blueprint.roles)))
    loaded = []
    while loading:
        names = ", ".join(member.spec.instance_id for member in loading.values())
        show(f"loading the model on {names}")
        done, _ = ray.wait(list(loading), timeout=1.0)
        for call in done:
            member = loading.pop(call)
            try:
                member.card = ray.get(call)
            except RayError as error:
                raise cause_of(error, member.spec.instance_id) from error
            loaded.append(member)
    show("introducing the instances to each other")
    deployment.adopt_router(ray.get(router))
    deployment.adopt_instances(loaded)


def _blueprint(config: ServeConfig, facts: ModelFacts, num_threads: int, key: ClusterKey) -> Blueprint:
    engine = config.engine
    max_model_len = min(engine.max_model_len or facts.max_model_len, facts.max_model_len)
    if engine.max_model_len is not None and engine.max_model_len > facts.max_model_len:
        raise ConfigError(
            f"--max-model-len {engine.max_model_len} is more than the model can take: at most {facts.max_model_len}"
        )
    kv = size_kv(
        engine.kv,
        weight_bytes=facts.weight_bytes,
        token_bytes=facts.token_bytes,
        max_model_len=max_model_len,
        num_instances=config.num_instances,
        free=free_memory(),
    )
    if kv.num_tokens < max_model_len:
        logger.warning("KV memory holds %d tokens, requests longer than that are refused", kv.num_tokens)
    return Blueprint(
        roles=tuple(role for role, count in config.pools for _ in range(count)),
        plan=EnginePlan(config.model_dir, engine.dtype, num_threads),
        kv=kv,
        scheduler=SchedulerConfig(
            max_batch_tokens=engine.max_batch_tokens,
            max_batch_size=engine.max_batch_size,
            max_model_len=max_model_len,
        ),
        key=key,
        log_dir=config.event_log,
    )


async def _serve(
    config: ServeConfig,
    model: ServedModel,
    launch: _Launch,
    listener: socket.socket,
    announce: Callable[[str], None],
    client: Client | None,
) -> None:
    """Run the endpoint until a signal has come and what was under way has ended."""
    loop = asyncio.get_running_loop()
    log = EventLog(config.event_log / f"{OWNER}.log") if config.event_log else None
    backend = OwnerBackend(OWNER, Owner(OWNER), launch.mailbox, loop, log)
    _receive(loop, launch.mailbox, backend)
    backend.start()
    settings = ApiSettings(api_key=config.api_key)
    server = _Server(
        uvicorn.Config(
            create_app(
                backend,
                replace(model, max_model_len=launch.deployment.blueprint.scheduler.max_model_len),
                settings,
                clock=cluster_time,
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
    ready = asyncio.create_task(backend.ready(config.num_instances))
    try:
        await asyncio.wait({*ends, ready}, return_when=asyncio.FIRST_COMPLETED)
        if ready.done():
            url = _url(listener)
            announce(url)
            if client is not None:
                ends.add(asyncio.create_task(client(url)))
            await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
        if not serving.done():
            await _drain(backend, told, config.drain_timeout)
    finally:
        ready.cancel()
        backend.close()
        server.should_exit = True
        await asyncio.wait({serving})
        loop.remove_reader(launch.mailbox.fileno)
        if log is not None:
            log.close()
    for task in ends:
        if task.done():
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
            raise ConfigError(f"cannot listen on {host} port {port}: {os.strerror(error.errno or 0)}") from error
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


def _summary(url: str, model: ServedModel, blueprint: Blueprint) -> str:
    """The line that ends the start: URL, model, pools, KV capacity."""
    pools = [
        f"{count} {role} x {blueprint.kv.num_tokens:,} tokens of KV"
        for role in Role
        if (count := blueprint.roles.count(role))
    ]
    return f"Serving {model.names[0]} at {url}/v1 on {', '.join(pools)}"
