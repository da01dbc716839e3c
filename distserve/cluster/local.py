"""A whole cluster within one process: the same machines, drivers and engines as a real one, on threads.

For tests, notebooks and offline use. No Ray, no sockets: messages go through queues and KV through ordinary memory.
"""

import asyncio
import queue
import threading
from collections.abc import Callable
from pathlib import Path
from types import TracebackType

from distserve.cluster.clock import TimerThread, cluster_time
from distserve.cluster.driver import Driver
from distserve.cluster.owner_backend import OwnerBackend
from distserve.cluster.parts import OWNER, EnginePlan
from distserve.cluster.rank import Rank
from distserve.cluster.replay import EventLog
from distserve.core.config import InstanceSpec, KvConfig, Role, SchedulerConfig
from distserve.core.events import Event, InstanceLost, InstanceUp, Received, Timer
from distserve.core.messages import Message
from distserve.core.owner import Owner
from distserve.core.router import Router, RouterConfig
from distserve.core.scheduler import ROUTER
from distserve.engine.description import describe
from distserve.transfer.local import LocalNetwork, LocalTransport


class LocalCluster:
    """Serves one model within this process.

    Use as an asynchronous context manager; it gives an :class:`OwnerBackend` for the running loop::

        async with LocalCluster(model_dir, prefill=1, decode=2) as backend:
            async for item in backend.submit(request): ...

    Args:
        model_dir: A Hugging Face model directory.
        prefill: Number of prefill instances.
        decode: Number of decode instances.
        mixed: Number of instances that do both, alone or beside the others.
        dtype: ``float32`` or ``bfloat16``.
        kv: KV memory of each instance.
        scheduler: Limits of every instance.
        num_threads: Threads that compute, per instance.
        log_dir: Where each part writes its event log, if wanted.
        router: How requests are admitted and given to instances.
    """

    def __init__(
        self,
        model_dir: str | Path,
        prefill: int = 1,
        decode: int = 1,
        *,
        mixed: int = 0,
        dtype: str = "float32",
        kv: KvConfig | None = None,
        scheduler: SchedulerConfig | None = None,
        num_threads: int = 1,
        log_dir: Path | None = None,
        router: RouterConfig | None = None,
    ) -> None:
        self._routing = router
        self._plan = EnginePlan(Path(model_dir), dtype, num_threads)
        self._description = describe(model_dir)
        counts = {Role.PREFILL: prefill, Role.DECODE: decode, Role.MIXED: mixed}
        self.specs = tuple(
            InstanceSpec(f"{role}-{index}", role, kv or KvConfig(num_blocks=256), scheduler or SchedulerConfig())
            for role, count in counts.items()
            for index in range(count)
        )
        self._log_dir = log_dir
        self._logs: list[EventLog] = []
        self._post = _Post()
        self._ranks: dict[str, Rank] = {}
        self._router: Driver | None = None
        self._router_timers = TimerThread(lambda: self._feed_router(Timer()))
        self.backend: OwnerBackend | None = None

    async def __aenter__(self) -> OwnerBackend:
        loop = asyncio.get_running_loop()
        try:
            await asyncio.to_thread(self._start)
        except BaseException:
            self.close()
            raise
        backend = OwnerBackend(OWNER, Owner(OWNER), self._post.of(OWNER), loop, self._log(OWNER))
        self._post.open(OWNER, lambda received: loop.call_soon_threadsafe(backend.receive, received))
        backend.start()
        self.backend = backend
        await backend.ready(len(self.specs))
        return backend

    async def __aexit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self.backend is not None
        self.backend.close()
        await asyncio.to_thread(self.close)

    def lose(self, instance_id: str) -> None:
        """Take an instance away as if its process had died: it says and computes nothing more."""
        self._post.shut(instance_id)
        self._ranks.pop(instance_id).close()
        self._feed_router(InstanceLost(instance_id))

    def _start(self) -> None:
        pools = LocalNetwork()
        addresses = {}
        for spec in self.specs:
            transport = LocalTransport(
                self._description.layout(spec.kv, self._plan.dtype), network=pools, clock=cluster_time
            )
            addresses[spec.instance_id] = transport.address
            name = spec.instance_id
            self._ranks[name] = Rank(spec, self._plan, transport, self._post.of(name), self._log(name))
        # One after the other: transformers patches module-wide state while it loads.
        for rank in self._ranks.values():
            rank.load()
        router, post = Router(self._routing), self._post.of(ROUTER)
        self._router = Driver(router, cluster_time, post, self._router_timers, log=self._log(ROUTER))
        self._post.open(ROUTER, self._router.feed)
        self._router_timers.start()
        self._router.start()
        for name, rank in self._ranks.items():
            rank.connect(item for item in addresses.items() if item[0] != name)
            self._post.open(name, rank.receive)
        for rank in self._ranks.values():
            rank.start()
            self._router.feed(InstanceUp(rank.spec))

    def close(self) -> None:
        """End every part but the backend, which is to be closed first; blocks until their threads have ended."""
        self._post.close()
        self._router_timers.close()
        for rank in self._ranks.values():
            rank.close()
        for log in self._logs:
            log.close()

    def _feed_router(self, event: Event) -> None:
        assert self._router is not None
        self._router.feed(event)

    def _log(self, name: str) -> EventLog | None:
        if self._log_dir is None:
            return None
        self._logs.append(EventLog.of(name, self._log_dir))
        return self._logs[-1]


class _Post:
    """Messages between the parts of one process, each of which opens its own on a thread of its own."""

    def __init__(self) -> None:
        self._inboxes: dict[str, _Inbox] = {}

    def of(self, name: str) -> "_Outbox":
        return _Outbox(self, name)

    def open(self, name: str, receive: Callable[[Received], object]) -> None:
        self._inboxes[name] = _Inbox(name, receive)

    def shut(self, name: str) -> None:
        self._inboxes.pop(name).close()

    def deliver(self, to: str, received: Received) -> None:
        inbox = self._inboxes.get(to)
        if inbox is not None:
            inbox.put(received)

    def close(self) -> None:
        for name in list(self._inboxes):
            self.shut(name)


class _Outbox:
    """Implements :class:`distserve.cluster.driver.Network` in the name of one part."""

    def __init__(self, post: _Post, name: str) -> None:
        self._post = post
        self._name = name

    def send(self, to: str, message: Message) -> None:
        self._post.deliver(to, Received(self._name, message))


class _Inbox:
    """A part's queue and the thread that empties it: a driver may not be fed from within another's send."""

    def __init__(self, name: str, receive: Callable[[Received], object]) -> None:
        self._queue: queue.SimpleQueue[Received | None] = queue.SimpleQueue()
        self._receive = receive
        self._thread = threading.Thread(target=self._run, name=f"inbox-{name}", daemon=True)
        self._thread.start()

    def put(self, received: Received) -> None:
        self._queue.put(received)

    def close(self) -> None:
        self._queue.put(None)
        self._thread.join()

    def _run(self) -> None:
        while (received := self._queue.get()) is not None:
            self._receive(received)
