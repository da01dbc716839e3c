"""The transport between processes of one host: peers map each other's KV memory read-only and copy out of it.

Memory travels as file descriptors over a Unix socket (:mod:`~distserve.transfer.handshake`), so nothing has a name and
nothing outlives the processes (:mod:`~distserve.transfer.segment`). A peer's death closes its connection, which fails
the pulls from it at once; bytes already mapped stay readable, so a copy under way ends without harm.
"""

import contextlib
import logging
import mmap
import os
import socket
import threading
import time
from collections.abc import Callable

import numpy as np

from distserve.core.commands import Migrate
from distserve.core.config import KvLayout
from distserve.core.errors import TransferError
from distserve.core.events import Migrated
from distserve.transfer import handshake, progress, segment
from distserve.transfer.mover import Mover, Source
from distserve.transfer.source import SourceSide
from distserve.transfer.transport import Clock

_logger = logging.getLogger(__name__)

_ACCEPT_PAUSE = 0.1
"""Seconds after which accepting is tried again."""
_HANDSHAKE_TIMEOUT = 5.0
"""Seconds a live peer may take to answer: it only has to schedule a thread."""


class ShmTransport(SourceSide):
    """Implements :class:`~distserve.transfer.transport.Transport`; ``secret`` is shared by all ranks of a cluster.

    Raises :class:`~distserve.core.errors.TransferError` if memory for ``layout`` cannot be had. Linux only.
    """

    def __init__(self, layout: KvLayout, *, secret: bytes, clock: Clock) -> None:
        self._layout = layout
        self._secret = secret
        self._pool_fd, self._pool = segment.create("distserve-kv", layout.num_bytes)
        self._progress_fd, progress_memory = segment.create("distserve-progress", mmap.PAGESIZE)
        self._progress = progress.SourceProgress(memoryview(progress_memory))
        self._progress.open()
        self._mover = Mover(layout, np.frombuffer(self._pool, dtype=np.uint8), clock)
        # Guards the three below. A connection in either collection is open: it is closed under the lock, once removed.
        self._lock = threading.Lock()
        self._closed = False
        self._readers: set[socket.socket] = set()
        self._sources: dict[str, socket.socket] = {}
        self._server, self._address = handshake.listen()
        self._accepting = threading.Thread(target=self._accept, name="kv-accept", daemon=True)
        self._accepting.start()

    def connect(self, instance_id: str, address: str) -> None:
        """Shake hands and map the peer's memory."""
        try:
            connection, offered = handshake.dial(address, self._secret, self._layout, _HANDSHAKE_TIMEOUT)
        except TransferError as error:
            raise TransferError(f"cannot connect to instance {instance_id}: {error}") from error
        try:
            source = _map(offered)
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
                _hang_up(previous)
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
                _hang_up(connection)

    def close(self) -> None:
        """Retire the memory, hang up on everyone, end the threads."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
        self._progress.retire()
        self._mover.close()
        with self._lock:
            for connection in (self._server, *self._readers, *self._sources.values()):
                _hang_up(connection)
        self._accepting.join()
        os.close(self._pool_fd)
        os.close(self._progress_fd)

    def _accept(self) -> None:
        with self._server:
            while True:
                try:
                    connection, _ = self._server.accept()
                except OSError as error:
                    if self._closed:
                        return
                    # Out of descriptors, say: other peers must still find this rank later.
                    _logger.warning("cannot accept KV peers: %s", error)
                    time.sleep(_ACCEPT_PAUSE)
                    continue
                threading.Thread(target=self._serve, args=(connection,), name="kv-serve", daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        """Give a peer the memory and hold the connection until either side ends."""
        with self._lock:
            if self._closed:
                connection.close()
                return
            self._readers.add(connection)
        try:
            connection.settimeout(_HANDSHAKE_TIMEOUT)
            generation = self._progress.generation
            handshake.serve(connection, self._secret, self._layout, generation, self._pool_fd, self._progress_fd)
            connection.settimeout(None)
            _await_end(connection)
        except (TransferError, OSError) as error:
            if not self._closed:
                _logger.warning("KV peer not served: %s", error)
        finally:
            with self._lock:
                self._readers.discard(connection)
                connection.close()

    def _watch(self, instance_id: str, connection: socket.socket, source: Source) -> None:
        """Fail the pulls from a peer as soon as its process closes the connection, however it dies."""
        _await_end(connection)
        self._mover.detach(instance_id, f"instance {instance_id} closed its connection", source)
        with self._lock:
            if self._sources.get(instance_id) is connection:
                del self._sources[instance_id]
            connection.close()


def _map(offered: handshake.Offered) -> Source:
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
    )


def _await_end(connection: socket.socket) -> None:
    """Return when the peer has closed the connection, died, or was hung up on."""
    with contextlib.suppress(ConnectionError):
        while connection.recv(1):
            pass


def _hang_up(connection: socket.socket) -> None:
    """Wake the thread that waits on ``connection``; it closes it."""
    # The peer may have gone before.
    with contextlib.suppress(OSError):
        connection.shutdown(socket.SHUT_RDWR)
