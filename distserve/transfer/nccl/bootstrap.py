"""Who meets whom: how two ranks get the connection on which ids and generations travel.

An address is all that has to be known of a rank. How it gets from one process to another, by Ray, a file or a pipe, is
not this package's business.
"""

import json
import socket
import time
from collections.abc import Callable
from typing import Protocol

from distserve.core.config import KvLayout
from distserve.core.errors import TransferError
from distserve.transfer import greeting, tcp_wire
from distserve.transfer.acceptor import Acceptor

GREETING_TIMEOUT = 5.0
"""Seconds for a peer to answer, from the first packet to the last."""
_PREFIX = "nccl+"


class Bootstrap(Protocol):
    """Brings the ranks of a cluster together, two at a time."""

    @property
    def address(self) -> str:
        """Where this rank is met. New for every one, so that a restarted rank is never mistaken."""
        ...

    def listen(self, admit: Callable[[socket.socket], None]) -> None:
        """From now on call ``admit``, on any thread, with the connection to each rank that has come to meet this one.

        It does not block, and is the callee's to close.
        """
        ...

    def meet(self, address: str, expected: KvLayout) -> tuple[socket.socket, KvLayout]:
        """Connect to a rank whose layout must be the ``expected`` one but for ``num_blocks``; return the one it has.

        The connection does not block, and is the caller's to close. Raises TransferError if nobody answers, or one
        whose secret, layout or version of NCCL differs; the message has both values.
        """
        ...

    def close(self) -> None:
        """Let nobody in any more. Idempotent."""
        ...


class TcpBootstrap:
    """Implements :class:`Bootstrap` with the greeting of the TCP transport, for a rank with ``layout``.

    ``host`` is the interface that is listened on and that peers reach; the port is the system's choice. ``version`` is
    that of the library that communicators are made with. Raises TransferError if this host has no such interface.
    """

    def __init__(self, layout: KvLayout, *, host: str, secret: bytes, version: str) -> None:
        self._layout = layout
        self._secret = secret
        self._version = version
        self._server, address, self._name = tcp_wire.listen(host)
        self.address = _PREFIX + address
        self._acceptor: Acceptor | None = None

    def listen(self, admit: Callable[[socket.socket], None]) -> None:
        """See :class:`Bootstrap`, here and below."""

        def serve(connection: socket.socket) -> None:
            packets = tcp_wire.Packets(connection, time.monotonic() + GREETING_TIMEOUT)
            nonces = greeting.examine(packets, self._secret, self._name, self._layout)
            packets.send(greeting.answer_of(self._layout, 0, self._secret, nonces))
            packets.send(self._hello())
            self._check(packets.receive())
            tcp_wire.prepare(connection)
            # The acceptor closes what it has accepted.
            admit(connection.dup())

        assert self._acceptor is None
        self._acceptor = Acceptor(self._server, serve)

    def meet(self, address: str, expected: KvLayout) -> tuple[socket.socket, KvLayout]:
        """Dial."""
        if not address.startswith(_PREFIX):
            raise TransferError(f"{address!r} is not the address of a rank that uses NCCL")
        deadline = time.monotonic() + GREETING_TIMEOUT
        connection, answer = tcp_wire.dial(
            address.removeprefix(_PREFIX), self._secret, expected, GREETING_TIMEOUT
        )  # fmt: skip
        try:
            packets = tcp_wire.Packets(connection, deadline)
            packets.send(self._hello())
            self._check(packets.receive())
            tcp_wire.prepare(connection)
        except OSError as error:
            connection.close()
            raise TransferError(f"no answer from {address}: {error}") from error
        except BaseException:
            connection.close()
            raise
        return connection, answer.layout

    def close(self) -> None:
        """Hang up on those that are still greeting."""
        if self._acceptor is None:
            self._server.close()
        else:
            self._acceptor.close()

    def _hello(self) -> bytes:
        return json.dumps({"nccl": self._version}).encode()

    def _check(self, packet: bytes) -> None:
        theirs = greeting.decode(packet).get("nccl")
        if theirs != self._version:
            raise TransferError(f"NCCL {theirs} there, {self._version} here")
