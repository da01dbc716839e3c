"""A transport whose peers map each other's memory: its connections. What is mapped, and copied how, its subclasses say.

Memory travels as file descriptors over a Unix socket (:mod:`~distserve.transfer.handshake`), so nothing has a name and
nothing outlives the processes. A peer's death closes its connection, which fails the pulls from it at once; what is
mapped stays readable, so a copy under way ends without harm.
"""

import contextlib
import socket
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Generic, Protocol

from distserve.core.commands import Migrate
from distserve.core.config import KvLayout
from distserve.core.errors import TransferError
from distserve.core.events import Migrated
from distserve.transfer import handshake
from distserve.transfer.acceptor import Acceptor, hang_up
from distserve.transfer.plan import Part, whole
from distserve.transfer.progress import SourceProgress
from distserve.transfer.pulls import PullThread, SourceT

_HANDSHAKE_TIMEOUT = 5.0
"""Seconds a live peer may take to answer: it only has to schedule a thread."""


class Offer(Protocol):
    """Memory of a rank as it is offered to peers: by descriptors, under a generation."""

    @property
    def fd(self) -> int:
        """Of the memory."""
        ...

    @property
    def progress_fd(self) -> int:
        """Of the progress words."""
        ...

    @property
    def progress(self) -> SourceProgress:
        """The words themselves."""
        ...

    @property
    def generation(self) -> int:
        """What the words say while this memory is served."""
        ...

    def close(self) -> None:
        """Retire it."""
        ...


class MappedTransport(ABC, Generic[SourceT]):
    """Most of :class:`~distserve.transfer.transport.PartTransport`: all but the source's own side.

    ``name`` is where peers find it on this host. Constructing it lets peers in, so a subclass does that last.
    """

    def __init__(self, layout: KvLayout, *, offered: Offer, mover: PullThread[SourceT], secret: bytes) -> None:
        self._layout = layout
        self._secret = secret
        self._offered = offered
        self._mover = mover
        # Guards the two below. A connection in the collection is open: it is closed under the lock, once removed.
        self._lock = threading.Lock()
        self._closed = False
        self._sources: dict[str, socket.socket] = {}
        server, self.name = handshake.listen()
        self._acceptor = Acceptor(server, self._serve)

    @abstractmethod
    def _locate(self, address: str) -> str:
        """The name in a peer's address; raises TransferError if the peer's memory cannot be mapped from here."""

    @abstractmethod
    def _map(self, address: str, offered: handshake.Offered, part: Part) -> SourceT:
        """Map a peer's memory and close its descriptors; raises TransferError."""

    def connect(self, instance_id: str, address: str, part: Part | None = None) -> None:
        """Shake hands and map the peer's memory."""
        part = part or whole(self._layout)
        expected = part.source_layout(self._layout)
        try:
            connection, offered = handshake.dial(self._locate(address), self._secret, expected, _HANDSHAKE_TIMEOUT)
        except TransferError as error:
            raise TransferError(f"cannot connect to instance {instance_id}: {error}") from error
        try:
            source = self._map(address, offered, part)
        except BaseException:
            connection.close()
            raise
        with self._lock:
            if self._closed:
                connection.close()
                raise TransferError("transport closed")
            previous = self._sources.get(instance_id)
            self._sources[instance_id] = connection
            self._mover.attach(instance_id, source)
            if previous is not None:
                hang_up(previous)
        threading.Thread(
            target=self._watch, args=(instance_id, connection, source), name="kv-watch", daemon=True
        ).start()

    def pull(self, migrate: Migrate, done: Callable[[Migrated], None]) -> None:
        """Queue a pull."""
        self._mover.pull(migrate, done)

    def cancel(self, pull_id: int) -> None:
        """End a pull."""
        self._mover.cancel(pull_id)

    def forget(self, instance_id: str) -> None:
        """Drop a peer."""
        with self._lock:
            self._mover.detach(instance_id, f"instance {instance_id} is gone")
            if (connection := self._sources.pop(instance_id, None)) is not None:
                hang_up(connection)

    def close(self) -> None:
        """Retire the memory, hang up on everyone, end the threads."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
        self._offered.progress.retire()
        self._acceptor.close()
        self._mover.close()
        with self._lock:
            for connection in self._sources.values():
                hang_up(connection)
        self._offered.close()

    @property
    def has_peers(self) -> bool:
        """Whether anybody reads this memory."""
        return self._acceptor.has_connections

    def _serve(self, connection: socket.socket) -> None:
        """Give a peer the memory and hold the connection until either side ends."""
        connection.settimeout(_HANDSHAKE_TIMEOUT)
        fds = self._offered.fd, self._offered.progress_fd
        handshake.serve(connection, self._secret, self.name, self._layout, self._offered.generation, fds)
        connection.settimeout(None)
        _await_end(connection)

    def _watch(self, instance_id: str, connection: socket.socket, source: SourceT) -> None:
        """Fail the pulls from a peer as soon as its process closes the connection, however it dies."""
        _await_end(connection)
        self._mover.detach(instance_id, f"instance {instance_id} closed its connection", source)
        with self._lock:
            if self._sources.get(instance_id) is connection:
                del self._sources[instance_id]
            connection.close()


def _await_end(connection: socket.socket) -> None:
    """Return when the peer has closed the connection, died, or was hung up on."""
    with contextlib.suppress(ConnectionError):
        while connection.recv(1):
            pass
