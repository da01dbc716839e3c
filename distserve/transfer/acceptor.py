"""Lets peers in: one thread that accepts, one per connection, all ended by :meth:`Acceptor.close`."""

import contextlib
import logging
import socket
import threading
import time
from collections.abc import Callable

from distserve.core.errors import TransferError

_logger = logging.getLogger(__name__)

Serve = Callable[[socket.socket], None]
"""What is done with a connection, until it ends."""

_ACCEPT_PAUSE = 0.1
"""Seconds after which accepting is tried again."""
_MAX_CONNECTIONS = 1024
"""Strangers must not make a rank run out of descriptors and threads; a greeting takes seconds at most."""


class Acceptor:
    """Runs ``serve`` for every connection to ``server``, until it returns, raises, or the acceptor is closed.

    ``serve`` raises TransferError or OSError for a peer it does not want, or that is gone; the connection is closed
    after it. It must notice when its connection is shut down.
    """

    def __init__(self, server: socket.socket, serve: Serve) -> None:
        self._server = server
        # Guards the two below. A connection in the set is open: it is closed under the lock, once removed.
        self._lock = threading.Lock()
        self._closed = False
        self._connections: set[socket.socket] = set()
        # Handed on and not kept: it is mostly a method of whoever has this, whose memory is to go with its last user.
        self._thread = threading.Thread(target=self._accept, args=(serve,), name="kv-accept", daemon=True)
        self._thread.start()

    @property
    def has_connections(self) -> bool:
        """Whether a peer is there, or somebody who may become one."""
        return bool(self._connections)

    def close(self) -> None:
        """Hang up on everyone and let nobody in; the threads that serve end on their own. Idempotent."""
        with self._lock:
            self._closed = True
            for connection in (self._server, *self._connections):
                hang_up(connection)
        self._thread.join()

    def _accept(self, serve: Serve) -> None:
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
                self._admit(connection, serve)

    def _admit(self, connection: socket.socket, serve: Serve) -> None:
        with self._lock:
            if self._closed or len(self._connections) >= _MAX_CONNECTIONS:
                connection.close()
                return
            self._connections.add(connection)
        threading.Thread(target=self._hold, args=(connection, serve), name="kv-serve", daemon=True).start()

    def _hold(self, connection: socket.socket, serve: Serve) -> None:
        try:
            serve(connection)
        except (TransferError, OSError) as error:
            if not self._closed:
                _logger.warning("KV peer not served: %s", error)
        finally:
            with self._lock:
                self._connections.discard(connection)
                connection.close()


def hang_up(connection: socket.socket) -> None:
    """Wake the thread that waits on ``connection``; it closes it."""
    # The peer may have gone before.
    with contextlib.suppress(OSError):
        connection.shutdown(socket.SHUT_RDWR)
