"""The thread that does what the state machines say: connections, kernels, communicators, callbacks.

Nothing on it waits for a peer, a device or NCCL. It owns the hub, all links and all pulls; other threads hand it orders
through an inbox.
"""

import contextlib
import queue
import socket
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

from distserve.core.commands import Migrate
from distserve.core.config import KvLayout
from distserve.core.errors import TransferError
from distserve.core.events import Migrated
from distserve.transfer.nccl.agreement import (
    Begin,
    Command,
    Ended,
    Event,
    Lost,
    Pack,
    Packed,
    Stop,
    Tell,
    Unpack,
    Unpacked,
)
from distserve.transfer.nccl.collectives import Collectives
from distserve.transfer.nccl.control import Control
from distserve.transfer.nccl.device import Completion, Device
from distserve.transfer.nccl.generations import Generations
from distserve.transfer.nccl.hub import Commands, Hub
from distserve.transfer.nccl.pieces import cell_bytes, cut
from distserve.transfer.nccl.staging import Staging
from distserve.transfer.nccl.wires import Wires
from distserve.transfer.plan import Part, check_blocks
from distserve.transfer.stream import pause
from distserve.transfer.tcp_wire import Wanted
from distserve.transfer.transport import Clock

_BUSY_LOOK = 50e-6
"""Seconds between two looks while a kernel or NCCL is at work: their end is what the next command waits for."""
_LOOK = 0.02
"""Seconds between two looks at deadlines while nothing happens."""

Done = Callable[[Migrated], None]


@dataclass(slots=True, eq=False)
class _Fetch:
    """A pull of this rank's, until it is reported."""

    migrate: Migrate
    done: Done
    part: Part


@dataclass(slots=True, eq=False)
class _Peer:
    """What belongs to a link. ``part`` and ``layout`` are of a source that this rank pulls from, else None."""

    generations: Generations
    part: Part | None
    layout: KvLayout | None
    num_pulls: int = 0
    fetches: dict[int, _Fetch] = field(default_factory=dict)


class Driver:
    """Drives ``hub`` for a rank with ``layout``, whose KV goes through ``staging``. Public methods: from any thread."""

    def __init__(
        self, layout: KvLayout, hub: Hub, staging: Staging, device: Device, collectives: Collectives, clock: Clock
    ) -> None:
        self._layout = layout
        self._hub = hub
        self._staging = staging
        self._device = device
        self._collectives = collectives
        self._clock = clock
        self._inbox: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._peers: dict[int, _Peer] = {}
        self._sources: dict[str, int] = {}
        self._pulls: dict[int, tuple[int, int]] = {}
        # Kernels of ours under way, and what happens to which link when they end.
        self._kernels: list[tuple[Completion, int, Event]] = []
        self._events: deque[tuple[int, Event]] = deque()
        self._last_moved = time.monotonic()
        self._stopping = False
        self._is_over = False
        self._wires = Wires()
        self._thread = threading.Thread(target=self._run, name="kv-nccl", daemon=True)
        self._thread.start()

    def admit(self, connection: socket.socket) -> None:
        """A rank has come that will pull from this one."""
        self._order(partial(self._admit, connection))

    def attach(self, instance_id: str, connection: socket.socket, layout: KvLayout, part: Part) -> None:
        """Pulls from ``instance_id`` use this connection from now on; those from an earlier one fail."""
        self._order(partial(self._attach, instance_id, connection, layout, part))

    def detach(self, instance_id: str, reason: str) -> None:
        """Fail the pulls from ``instance_id`` and hang up."""
        self._order(partial(self._detach, instance_id, reason))

    def pull(self, migrate: Migrate, done: Done) -> None:
        """Queue a pull; see :meth:`distserve.transfer.transport.Transport.pull`."""
        assert not self._stopping, "pull after close"
        self._order(partial(self._begin, migrate, done))

    def cancel(self, pull_id: int) -> None:
        """End a pull."""
        self._order(partial(self._cancel, pull_id))

    def close(self) -> None:
        """Fail what is left, hang up, end all communicators as far as they can be; returns within ``close_timeout``."""
        self._order(self._stop)
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def _order(self, order: Callable[[], None]) -> None:
        self._inbox.put(order)
        self._wires.ring()

    # Everything below runs on the thread.

    def _run(self) -> None:
        reason = "the transfer thread failed"
        try:
            self._device.bind()
            while not self._stopping:
                self._turn()
            reason = "transport closed"
            self._wind_up(reason)
        finally:
            # Nobody waits for ever on a pull, not even if this thread dies of a bug.
            self._stopping = self._is_over = True
            self._take_orders()
            self._wires.close()
            for peer in self._peers.values():
                peer.generations.abort()
            for peer in self._peers.values():
                for number in tuple(peer.fetches):
                    self._report(peer, number, reason, 0)

    def _wind_up(self, reason: str) -> None:
        """End everything in order, as far as that goes within a deadline."""
        for link_id in tuple(self._hub.links):
            self._handle(link_id, Lost(reason))
        deadline = time.monotonic() + self._hub.limits.close_timeout
        while self._hub.links and time.monotonic() < deadline:
            self._turn()

    def _turn(self) -> None:
        ready = self._wires.wait(self._timeout())
        self._take_orders()
        for link_id, what in ready:
            for event in self._wires.serve(link_id, what):
                self._handle(link_id, event)
        self._poll()
        self._do(self._hub.tick(self._clock()))
        self._settle()

    def _timeout(self) -> float | None:
        if self._kernels or any(peer.generations.is_moving for peer in self._peers.values()):
            # Selectors round up to milliseconds, so this is slept elsewhere.
            time.sleep(_BUSY_LOOK)
            return 0.0
        missing = self._hub.layers_missing()
        if missing is not None:
            return min(pause(missing, time.monotonic() - self._last_moved), _LOOK)
        return _LOOK if self._hub.is_busy or self._stopping else None

    def _take_orders(self) -> None:
        with contextlib.suppress(queue.Empty):
            while True:
                self._inbox.get_nowait()()
                self._settle()

    def _poll(self) -> None:
        under_way = []
        for completion, link_id, event in self._kernels:
            if completion.query():
                self._events.append((link_id, event))
            else:
                under_way.append((completion, link_id, event))
        self._kernels = under_way
        for link_id, peer in self._peers.items():
            self._events.extend((link_id, event) for event in peer.generations.poll())
        self._settle()

    def _handle(self, link_id: int, event: Event) -> None:
        self._events.append((link_id, event))
        self._settle()

    def _settle(self) -> None:
        """Have the links take in all that has happened, and what follows from it."""
        while self._events and not self._is_over:
            link_id, event = self._events.popleft()
            if isinstance(event, Lost):
                self._sources = {name: link for name, link in self._sources.items() if link != link_id}
            if link_id in self._hub.links:
                self._do(self._hub.handle(self._clock(), link_id, event))
        for link_id in self._peers.keys() - self._hub.links.keys():
            self._wires.hang_up(link_id)
            del self._peers[link_id]

    def _do(self, commands: Commands) -> None:
        if commands:
            self._last_moved = time.monotonic()
        for link_id, command in commands:
            self._execute(link_id, self._peers[link_id], command)

    def _execute(self, link_id: int, peer: _Peer, command: Command) -> None:
        match command:
            case Tell(message):
                if (lost := self._wires.tell(link_id, message)) is not None:
                    self._events.append((link_id, lost))
            case Pack(op_id, slot, wanted, piece):
                blocks = wanted.blocks[piece.blocks.start : piece.blocks.stop]
                done = self._staging.pack(slot, blocks, _within(wanted.layers, piece.layers), wanted.heads)
                self._kernels.append((done, link_id, Packed(op_id)))
            case Unpack(op_id, slot, number, piece):
                fetch = peer.fetches[number]
                blocks = fetch.migrate.dst_blocks[piece.blocks.start : piece.blocks.stop]
                part = fetch.part
                done = self._staging.unpack(slot, blocks, _within(part.dst_layers, piece.layers), part.dst_heads)
                self._kernels.append((done, link_id, Unpacked(op_id)))
            case Ended(number, reason, num_bytes):
                self._report(peer, number, reason, num_bytes)
            case _:
                peer.generations.do(command)

    def _report(self, peer: _Peer, number: int, reason: str, num_bytes: int) -> None:
        fetch = peer.fetches.pop(number)
        pull_id = fetch.migrate.pull_id
        del self._pulls[pull_id]
        fetch.done(Migrated(pull_id, ok=not reason, reason=reason, num_bytes=num_bytes))

    def _admit(self, connection: socket.socket) -> None:
        if self._stopping:
            connection.close()
            return
        self._add(self._hub.add_source(), Control(connection, self._layout, at_source=True))

    def _attach(self, instance_id: str, connection: socket.socket, layout: KvLayout, part: Part) -> None:
        if self._stopping:
            connection.close()
            return
        self._detach(instance_id, f"instance {instance_id} was replaced")
        link_id = self._sources[instance_id] = self._hub.add_sink()
        self._add(link_id, Control(connection, self._layout, at_source=False), instance_id, part, layout)

    def _detach(self, instance_id: str, reason: str) -> None:
        if (link_id := self._sources.get(instance_id)) is not None:
            self._wires.hang_up(link_id)
            self._events.append((link_id, Lost(reason)))

    def _add(
        self,
        link_id: int,
        control: Control,
        instance_id: str = "",
        part: Part | None = None,
        layout: KvLayout | None = None,
    ) -> None:
        """Have a link; a destination's name does not matter."""

        def report(event: Event) -> None:
            self._order(partial(self._handle, link_id, event))

        generations = Generations(self._collectives, self._staging, report)
        self._peers[link_id] = _Peer(generations, part, layout)
        self._wires.add(link_id, f"instance {instance_id}" if instance_id else "a destination", control)

    def _begin(self, migrate: Migrate, done: Done) -> None:
        assert migrate.pull_id not in self._pulls, f"pull {migrate.pull_id} is under way"
        link_id = self._sources.get(migrate.source_id)
        failure = "transport closed" if self._stopping else ""
        if link_id is None:
            failure = failure or f"not connected to instance {migrate.source_id}"
        else:
            failure = failure or self._begin_from(link_id, migrate, done)
        if failure:
            done(Migrated(migrate.pull_id, ok=False, reason=failure))

    def _begin_from(self, link_id: int, migrate: Migrate, done: Done) -> str:
        """Begin a pull, or say why that cannot be."""
        peer = self._peers[link_id]
        part, layout = peer.part, peer.layout
        assert part is not None
        assert layout is not None
        try:
            check_blocks(migrate.src_blocks, migrate.dst_blocks, layout, self._layout)
        except TransferError as error:
            return str(error)
        num_ready, num_blocks = migrate.num_ready_blocks, len(migrate.src_blocks)
        cell = cell_bytes(self._layout, part.dst_heads)
        pieces = cut(num_ready, num_blocks, part.num_layers, cell, self._hub.limits.min_piece_bytes)
        wanted = Wanted(migrate.ready_step, num_ready, part.src_layers, part.src_heads, migrate.src_blocks)
        peer.num_pulls += 1
        peer.fetches[peer.num_pulls] = _Fetch(migrate, done, part)
        self._pulls[migrate.pull_id] = (link_id, peer.num_pulls)
        self._handle(link_id, Begin(peer.num_pulls, wanted, pieces, migrate.deadline))
        return ""

    def _cancel(self, pull_id: int) -> None:
        if (found := self._pulls.get(pull_id)) is not None:
            link_id, number = found
            self._handle(link_id, Stop(number, "cancelled"))

    def _stop(self) -> None:
        self._stopping = True


def _within(whole: range, some: range) -> range:
    return whole[some.start : some.stop]
