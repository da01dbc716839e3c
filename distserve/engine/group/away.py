"""Ranks on other nodes than rank 0's: how they come to it.

Rank 0 has a :class:`Muster`. On each other node somebody (a Ray actor, a test, a shell) calls :func:`join`, which
starts a nursery there whose connection, and those of its ranks, lead to the muster. Both sides prove that they know the
instance's secret, by the challenges of :mod:`multiprocessing.connection`; what they say then is not encrypted. A node
that vanishes without a word is noticed by TCP's own probes, on the nursery's connection: a nursery always listens,
while a rank may compute for long.
"""

import contextlib
import os
import socket
import struct
import subprocess
import threading
import time
from multiprocessing import AuthenticationError
from multiprocessing.connection import Connection, answer_challenge, deliver_challenge

import msgspec

from distserve.core.errors import InstanceError
from distserve.engine.group.processes import Crew, NodeShare, start_nursery
from distserve.engine.sharding.meeting import listen

_PATIENCE = 30.0
"""Seconds to reach a muster, and for each of its answers."""

_GREETING = 5.0
"""Seconds that a muster waits for each answer of who has connected; the next one waits meanwhile."""

_PROBES = {
    socket.TCP_KEEPIDLE: 10,
    socket.TCP_KEEPINTVL: 5,
    socket.TCP_KEEPCNT: 4,
    socket.TCP_USER_TIMEOUT: 30_000,
}
"""A connection is given up after half a minute (seconds, seconds, number, milliseconds)."""

_REFUSALS = (OSError, EOFError, AuthenticationError, AssertionError, msgspec.DecodeError)
"""What the challenges raise, and what is no hello."""


class _Here(msgspec.Struct, tag=True, frozen=True):
    """First on a nursery's connection: whom it will start, and what its node has for them."""

    share: NodeShare


class _Rank(msgspec.Struct, tag=True, frozen=True):
    """First on a rank's connection: its number."""

    rank: int


_hello: msgspec.msgpack.Decoder[_Here | _Rank] = msgspec.msgpack.Decoder(_Here | _Rank)


class Muster:
    """Where the ranks of one instance that are on other nodes report to rank 0.

    Args:
        host: The address to listen on.
        secret: What only they know as well.
        ranks: Who is to come.

    Raises OSError if ``host`` is no address of this machine.
    """

    def __init__(self, host: str, secret: bytes, ranks: frozenset[int]) -> None:
        self._listener = listen(host)
        self.host = host
        self.address = f"{host}:{self._listener.getsockname()[1]}"
        self._secret = secret
        self._awaited = ranks
        self._changed = threading.Condition()
        self._is_closed = False
        self._nurseries: list[tuple[NodeShare, Connection]] = []
        self._ranks: dict[int, Connection] = {}
        threading.Thread(target=self._accept, name="muster", daemon=True).start()

    def crews(self, patience: float) -> tuple[Crew, ...]:
        """All crews, once they are there, and the muster is over; waits at most ``patience`` seconds.

        Raises:
            InstanceError: some did not come; says which.
        """
        with self._changed:
            is_complete = self._changed.wait_for(self._is_complete, patience)
        self.close()
        if not is_complete:
            for end in (*(nursery for _, nursery in self._nurseries), *self._ranks.values()):
                end.close()
            missing = ", ".join(map(str, sorted(self._awaited - self._present())))
            raise InstanceError(f"the ranks {missing}, on other nodes, did not come to rank 0 within {patience:g} s")
        return tuple(
            Crew(share, nursery, {rank: self._ranks[rank] for rank in share.ranks})
            for share, nursery in self._nurseries
        )

    def close(self) -> None:
        """Take nobody on any more. May be called twice."""
        self._is_closed = True
        with contextlib.suppress(OSError):  # shut already
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()

    def _present(self) -> set[int]:
        announced = {rank for share, _ in self._nurseries for rank in share.ranks}
        return announced & self._ranks.keys()

    def _is_complete(self) -> bool:
        return self._present() == self._awaited

    def _accept(self) -> None:
        while not self._is_closed:
            try:
                accepted, _ = self._listener.accept()
            except OSError:  # closed, or out of descriptors
                time.sleep(0.05)
                continue
            self._greet(accepted)

    def _greet(self, accepted: socket.socket) -> None:
        connection = _connection(accepted, _GREETING)
        try:
            deliver_challenge(connection, self._secret)
            answer_challenge(connection, self._secret)
            hello = _hello.decode(connection.recv_bytes())
            _settle(connection, hello)
        except _REFUSALS:
            connection.close()
            return
        with self._changed:
            match hello:
                case _Here(share):
                    self._nurseries.append((share, connection))
                case _Rank(rank):
                    self._ranks[rank] = connection
            self._changed.notify_all()


def join(address: str, secret: bytes, share: NodeShare) -> "subprocess.Popen[bytes]":
    """Start a nursery for the ranks of ``share`` on this node, and have them report to the muster at ``address``.

    The nursery ends with the connection to rank 0, or when its standard input is closed.

    Raises:
        InstanceError: the muster cannot be reached, or does not know the secret.
    """
    hellos: list[_Here | _Rank] = [_Here(share), *map(_Rank, share.ranks)]
    with contextlib.ExitStack() as stack:
        ends = []
        for hello in hellos:
            try:
                end = stack.enter_context(_reach(address))
                answer_challenge(end, secret)
                deliver_challenge(end, secret)
                end.send_bytes(msgspec.msgpack.encode(hello))
                _settle(end, hello)
            except _REFUSALS as error:
                raise InstanceError(f"rank 0 of the instance cannot be reached at {address}: {error}") from error
            ends.append(end.fileno())
        return start_nursery(ends)


def _reach(address: str) -> Connection:
    host, _, port = address.rpartition(":")
    return _connection(socket.create_connection((host, int(port)), timeout=_PATIENCE), _PATIENCE)


def _connection(connected: socket.socket, patience: float) -> Connection:
    """A connection over TCP that sends at once, whose reads and writes may take ``patience`` seconds each so far."""
    connected.settimeout(None)  # Connection reads and writes the descriptor itself
    connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    _limit(connected, patience)
    return Connection(connected.detach())


def _limit(connected: socket.socket, seconds: float) -> None:
    """Bound each read and write, by an error of the operating system; 0: not at all."""
    interval = struct.pack("@ll", int(seconds), 0)
    connected.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, interval)
    connected.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, interval)


def _settle(connection: Connection, hello: _Here | _Rank) -> None:
    """Let a greeted connection wait as long as it takes, a nursery's with probes."""
    with socket.socket(fileno=os.dup(connection.fileno())) as settled:
        _limit(settled, 0)
        if isinstance(hello, _Here):
            settled.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            for option, value in _PROBES.items():
                settled.setsockopt(socket.IPPROTO_TCP, option, value)
