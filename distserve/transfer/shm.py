"""The transport between processes of one host: peers map each other's KV memory read-only and copy out of it.

Memory travels as file descriptors over a Unix socket (:mod:`~distserve.transfer.handshake`), so nothing has a name and
nothing outlives the processes (:mod:`~distserve.transfer.segment`). A peer's death closes its connection, which fails
the pulls from it at once; bytes already mapped stay readable, so a copy under way ends without harm.
"""

import contextlib
import os
import socket
import threading
from collections.abc import Callable

import numpy as np

from distserve.core.commands import Migrate
from distserve.core.config import KvLayout
from distserve.core.errors import TransferError
from distserve.core.events import Migrated
from distserve.transfer import handshake, progress, segment
from distserve.transfer.acceptor import Acceptor, hang_up
from distserve.transfer.mover import Mover, Source
from distserve.transfer.plan import Part, whole
from distserve.transfer.pool import Pool
from distserve.transfer.source import SourceSide
from distserve.transfer.transport import Clock

_HANDSHAKE_TIMEOUT = 5.0
"""Seconds a live peer may take to answer: it only has to schedule a thread."""


class ShmTransport(SourceSide):
    """Implements :class:`~distserve.transfer.transport.PartTransport`.

    ``secret`` is shared by all ranks of a cluster. ``pool`` is the memory to offer and to pull into (default: a new
    one); it is closed with the transport. Raises :class:`~distserve.core.errors.TransferError` if memory for
    ``layout`` cannot be had. Linux only.
    """

    def __init__(self, layout: KvLayout, *, secret: bytes, clock: Clock, pool: Pool | None = None) -> None:
        self._layout = layout
        self._secret = secret
        self._offered = pool or Pool(layout)
        self._pool, self._progress = self._offered.memory, self._offered.progress
        self._mover = Mover(layout, self._offered.bytes, clock)
        # Guards the two below. A connection in the collection is open: it is closed under the lock, once removed.
        self._lock = threading.Lock()
        self._closed = False
        self._sources: dict[str, socket.socket] = {}
        server, self._address = handshake.listen()
        self._acceptor = Acceptor(server, self._serve)

    def connect(self, instance_id: str, address: str, part: Part | None = None) -> None:
        """Shake hands and map the peer's memory."""
        part = part or whole(self._layout)
        expected = part.source_layout(self._layout)
        try:
            connection, offered = handshake.dial(address, self._secret, expected, _HANDSHAKE_TIMEOUT)
        except TransferError as error:
            raise TransferError(f"cannot connect to instance {instance_id}: {error}") from error
        try:
            source = _map(offered, part)
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
        self._progress.retire()
        self._acceptor.close()
        self._mover.close()
        with self._lock:
            for connection in self._sources.values():
                hang_up(connection)
        self._offered.close()

    def _serve(self, connection: socket.socket) -> None:
        """Give a peer the memory and hold the connection until either side ends."""
        connection.settimeout(_HANDSHAKE_TIMEOUT)
        fds = self._offered.fd, self._offered.progress_fd
        handshake.serve(connection, self._secret, self._address, self._layout, self._offered.generation, fds)
        connection.settimeout(None)
        _await_end(connection)

    def _watch(self, instance_id: str, connection: socket.socket, source: Source) -> None:
        """Fail the pulls from a peer as soon as its process closes the connection, however it dies."""
        _await_end(connection)
        self._mover.detach(instance_id, f"instance {instance_id} closed its connection", source)
        with self._lock:
            if self._sources.get(instance_id) is connection:
                del self._sources[instance_id]
            connection.close()


def _map(offered: handshake.Offered, part: Part) -> Source:
    try:
        pool = segment.attach(offered.pool_fd, offered.layout.num_bytes)
        words = segment.attach(offered.progress_fd, progress.NUM_BYTES)
    finally:
        os.close(offered.pool_fd)
        os.close(offered.progress_fd)
    return Source(
        offered.layout,
        np.frombuffer(pool, dtype=np.uint8),
        progress.SourceProgress(memoryview(words)),
        offered.generation,
        part,
    )


def _await_end(connection: socket.socket) -> None:
    """Return when the peer has closed the connection, died, or was hung up on."""
    with contextlib.suppress(ConnectionError):
        while connection.recv(1):
            pass
