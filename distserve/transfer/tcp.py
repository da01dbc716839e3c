"""The transport between hosts: a rank sends the KV its peers ask for, over one TCP connection per peer and direction.

Peers meet by the greeting of :mod:`~distserve.transfer.greeting`; :mod:`~distserve.transfer.tcp_wire` says what they
exchange. The source paces itself by its step and by what the peer takes. Bytes count as they arrive, so a deadline
holds whatever the source or the network do.
"""

import socket
import threading
import time
from collections.abc import Callable

from distserve.core.commands import Migrate
from distserve.core.config import KvLayout
from distserve.core.errors import TransferError
from distserve.core.events import Migrated
from distserve.transfer import greeting, tcp_wire
from distserve.transfer.acceptor import Acceptor
from distserve.transfer.plan import Part, whole
from distserve.transfer.pool import Pool
from distserve.transfer.source import SourceSide
from distserve.transfer.tcp_sink import Link, Receiver
from distserve.transfer.tcp_source import Sender
from distserve.transfer.transport import Clock

GREETING_TIMEOUT = 5.0
"""Seconds for a peer to answer, from the first packet to the last."""


class TcpTransport(SourceSide):
    """Implements :class:`~distserve.transfer.transport.PartTransport`.

    ``host`` is the name or address of the interface to listen on, as peers reach it; the port is the system's choice.
    ``secret`` is shared by all ranks of a cluster. ``pool`` is the memory to offer and to pull into (default: a new
    one); it is closed with the transport. Raises :class:`~distserve.core.errors.TransferError` if memory for
    ``layout`` cannot be had, or the interface. Linux only.
    """

    def __init__(self, layout: KvLayout, *, host: str, secret: bytes, clock: Clock, pool: Pool | None = None) -> None:
        self._layout = layout
        self._secret = secret
        server, self._address, self._name = tcp_wire.listen(host)
        self._offered = pool or Pool(layout)
        self._pool, self._progress = self._offered.memory, self._offered.progress
        self._receiver = Receiver(layout, self._offered.bytes, clock)
        # Guards the one below; held while a connection is handed to the receiver.
        self._lock = threading.Lock()
        self._closed = False
        self._acceptor = Acceptor(server, self._serve)

    def connect(self, instance_id: str, address: str, part: Part | None = None) -> None:
        """Connect and shake hands."""
        part = part or whole(self._layout)
        expected = part.source_layout(self._layout)
        try:
            connection, answer = tcp_wire.dial(address, self._secret, expected, GREETING_TIMEOUT)
        except TransferError as error:
            raise TransferError(f"cannot connect to instance {instance_id}: {error}") from error
        with self._lock:
            if self._closed:
                connection.close()
                raise TransferError("transport closed")
            self._receiver.attach(instance_id, Link(instance_id, connection, answer.layout, part))

    def pull(self, migrate: Migrate, done: Callable[[Migrated], None]) -> None:
        """Queue a pull."""
        self._receiver.pull(migrate, done)

    def cancel(self, pull_id: int) -> None:
        """End a pull."""
        self._receiver.cancel(pull_id)

    def forget(self, instance_id: str) -> None:
        """Drop a peer."""
        self._receiver.detach(instance_id, f"instance {instance_id} is gone")

    def close(self) -> None:
        """Hang up on everyone, end the threads."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
        self._progress.retire()
        self._acceptor.close()
        self._receiver.close()
        self._offered.close()

    def _serve(self, connection: socket.socket) -> None:
        packets = tcp_wire.Packets(connection, time.monotonic() + GREETING_TIMEOUT)
        nonces = greeting.examine(packets, self._secret, self._name, self._layout)
        packets.send(greeting.answer_of(self._layout, self._offered.generation, self._secret, nonces))
        tcp_wire.prepare(connection)
        Sender(connection, self._layout, self._offered.bytes, self._progress).run()
