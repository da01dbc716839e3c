"""The API's backend: drives the owner's state machine in the API's own event loop.

Implements :class:`distserve.api.backend.Backend`. Everything happens on one thread, the loop's, so a request costs no
thread switch on its way; what arrives from other threads comes in through :meth:`OwnerBackend.receive`, called on the
loop as well.
"""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable

from distserve.cluster.clock import cluster_time
from distserve.cluster.driver import Driver, Log, Network
from distserve.cluster.observations import Observer
from distserve.cluster.role_requests import RoleRequests
from distserve.core.commands import Conclude, Deliver
from distserve.core.config import Role
from distserve.core.events import ClientGone, ClientRequest, ClientStop, Machine, Received, Timer
from distserve.core.messages import ChangeRole, RoleAnswer, Status
from distserve.core.request import Request

STATUS_LIFETIME = 5.0
"""Seconds after which a router that has said nothing counts as silent."""


class OwnerBackend:
    """Serves the requests of one API process.

    Args:
        owner_id: Name that instances send tokens to.
        machine: The owner's state machine.
        network: Carries messages to the router and the instances.
        loop: The event loop that everything runs in.
        log: Records the machine's events and commands, if wanted.
    """

    def __init__(
        self,
        owner_id: str,
        machine: Machine,
        network: Network,
        loop: asyncio.AbstractEventLoop,
        log: Log | None = None,
    ) -> None:
        self._owner_id = owner_id
        self._loop = loop
        self._streams: dict[str, _Stream] = {}
        self._status: Status | None = None
        self._status_time = float("-inf")
        self._status_changed = asyncio.Event()
        self._draining = False
        self._observers: list[Observer] = []
        self._role_requests = RoleRequests(network)
        self._idle: list[asyncio.Future[None]] = []
        timers = _LoopTimers(loop, lambda: self._driver.feed(Timer()))
        self._driver = Driver(machine, cluster_time, network, timers, sink=self, log=log)

    @property
    def owner_id(self) -> str:
        """The name instances send tokens to."""
        return self._owner_id

    @property
    def num_active(self) -> int:
        """Requests whose client still waits."""
        return len(self._streams)

    def observe(self, observer: Observer) -> None:
        """Tell ``observer`` of every request from now on."""
        self._observers.append(observer)

    def start(self) -> None:
        """Introduce the owner to the router."""
        self._driver.start()

    def close(self) -> None:
        """Handle nothing any more; clients still waiting are told so."""
        self._driver.stop()
        for request_id in list(self._streams):
            self.conclude(Conclude(request_id, 503, "the server was shut down"))

    # -- for the API ----------------------------------------------------------------------------------------------

    def submit(self, request: Request) -> AsyncIterator[Deliver | Conclude]:
        """Serve ``request``: yields tokens, then one Conclude. While draining, the Conclude (503) comes at once."""
        assert request.request_id not in self._streams
        stream = self._streams[request.request_id] = _Stream()
        if self._draining:
            self.conclude(Conclude(request.request_id, 503, "the server is shutting down"))
        else:
            for observer in self._observers:
                observer.arrived(request.request_id, cluster_time(), len(request.prompt_token_ids))
            self._driver.feed(ClientRequest(request))
        return stream

    def stop(self, request_id: str, choice: int, num_tokens: int) -> None:
        """A stop string was found: ``choice`` ends after ``num_tokens`` output tokens."""
        self._driver.feed(ClientStop(request_id, choice, num_tokens))

    def abandon(self, request_id: str) -> None:
        """The client is gone."""
        stream = self._streams.pop(request_id, None)
        if stream is not None:
            self._driver.feed(ClientGone(request_id))
            self._tell_end(request_id, stream, complete=False)
            self._wake_if_idle()

    def status(self) -> Status | None:
        """The cluster as last heard of; None if nothing was heard lately, or when shutting down."""
        silent = cluster_time() - self._status_time > STATUS_LIFETIME
        return None if silent or self._draining else self._status

    # -- for the cluster ------------------------------------------------------------------------------------------

    def receive(self, received: Received) -> None:
        """A message arrived."""
        if isinstance(received.message, RoleAnswer):
            self._role_requests.on_answer(received.message)
            return
        if isinstance(received.message, Status):
            self._status = received.message
            self._status_time = cluster_time()
            self._status_changed.set()
        self._driver.feed(received)

    async def ready(self, num_instances: int) -> None:
        """Wait until the router counts at least ``num_instances`` that have reported."""
        while (status := self.status()) is None or len(status.instances) < num_instances:
            self._status_changed.clear()
            await self._status_changed.wait()

    async def change_role(self, instance_id: str, role: Role, patience: float) -> None:
        """Have an instance become ``role`` while it serves; returns when that is agreed.

        When it has changed, :meth:`status` says so. What it has not ended after ``patience`` seconds goes on elsewhere.

        Raises:
            UnknownInstanceError: there is no such instance.
            ConflictError: it cannot be; says why.
            UnavailableError: the router does not answer.
        """
        await self._role_requests.ask(ChangeRole(instance_id, role, patience))

    async def drain(self, patience: float) -> bool:
        """Refuse new requests and wait for those there are, at most ``patience`` seconds; whether all have ended."""
        self._draining = True
        if not self._streams:
            return True
        idle = self._loop.create_future()
        self._idle.append(idle)
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(idle, patience)
        return not self._streams

    def deliver(self, command: Deliver) -> None:
        """Sink of the driver: tokens for a client."""
        stream = self._streams.get(command.request_id)
        if stream is not None:
            stream.put(command)

    def conclude(self, command: Conclude) -> None:
        """Sink of the driver: the end of a request."""
        stream = self._streams.pop(command.request_id, None)
        if stream is not None:
            stream.put(command)
            self._tell_end(command.request_id, stream, complete=command.status == 200)
            self._wake_if_idle()

    def _tell_end(self, request_id: str, stream: "_Stream", *, complete: bool) -> None:
        for observer in self._observers:
            observer.ended(request_id, stream.longest, complete=complete)

    def _wake_if_idle(self) -> None:
        if self._streams:
            return
        for idle in self._idle:
            if not idle.done():
                idle.set_result(None)
        self._idle.clear()


class _Stream:
    """One request's output; ends after its Conclude. ``longest`` counts the tokens of its longest choice so far."""

    def __init__(self) -> None:
        self.longest = 0
        self._items: asyncio.Queue[Deliver | Conclude] = asyncio.Queue()
        self._ended = False

    def put(self, item: Deliver | Conclude) -> None:
        if isinstance(item, Deliver):
            self.longest = max([self.longest, *(output.index + 1 for output in item.outputs)])
        self._items.put_nowait(item)

    def __aiter__(self) -> AsyncIterator[Deliver | Conclude]:
        return self

    async def __anext__(self) -> Deliver | Conclude:
        if self._ended:
            raise StopAsyncIteration
        item = await self._items.get()
        self._ended = isinstance(item, Conclude)
        return item


class _LoopTimers:
    """Timers of the event loop, on the cluster's clock."""

    def __init__(self, loop: asyncio.AbstractEventLoop, callback: Callable[[], None]) -> None:
        self._loop = loop
        self._callback = callback

    def wake_at(self, time: float) -> None:
        self._loop.call_later(max(0.0, time - cluster_time()), self._callback)
