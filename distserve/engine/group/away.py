"""Ranks on other nodes than rank 0's: how they come to it.

Rank 0 has a :class:`Muster`. On each other node somebody (a Ray actor, a test, a shell) calls :func:`join`, which
starts a nursery there whose connection, and those of its ranks, lead to the muster. Both sides prove that they know the
instance's secret, by the challenges of :mod:`multiprocessing.connection`; what they say then is not encrypted. A node
that vanishes without a word is noticed by TCP's own probes.
"""

import contextlib
import socket
import subprocess
import threading
from multiprocessing import AuthenticationError
from multiprocessing.connection import Connection, answer_challenge, deliver_challenge

import msgspec

from distserve.core.errors import InstanceError
from distserve.engine.group.processes import Crew, NodeShare, start_nursery

_PATIENCE = 10.0
"""Seconds to reach a muster."""

_PROBES = {socket.TCP_KEEPIDLE: 10, socket.TCP_KEEPINTVL: 5, socket.TCP_KEEPCNT: 4}
"""A silent connection is given up after half a minute (seconds, seconds, number)."""

_GIVE_UP_MS = 30_000
"""And one that does not take what is sent after as long."""


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
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self._listener = socket.create_server((host, 0), family=family)
        self.host = host
        self.address = f"{host}:{self._listener.getsockname()[1]}"
        self._secret = secret
        self._awaited = ranks
        self._changed = threading.Condition()
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
            missing = ", ".join(map(str, sorted(self._awaited - self._present())))
            raise InstanceError(f"the ranks {missing}, on other nodes, did not come to rank 0 within {patience:g} s")
        return tuple(
            Crew(share, nursery, {rank: self._ranks[rank] for rank in share.ranks})
            for share, nursery in self._nurseries
        )

    def close(self) -> None:
        """Take nobody on any more. May be called twice."""
        with contextlib.suppress(OSError):  # shut already
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()

    def _present(self) -> set[int]:
        announced = {rank for share, _ in self._nurseries for rank in share.ranks}
        return announced & self._ranks.keys()

    def _is_complete(self) -> bool:
        return self._present() == self._awaited

    def _accept(self) -> None:
        while True:
            try:
                accepted, _ = self._listener.accept()
            except OSError:
                return  # closed
            # A thread each: who connects and says nothing holds nobody up.
            threading.Thread(target=self._greet, args=(accepted,), daemon=True).start()

    def _greet(self, accepted: socket.socket) -> None:
        connection = _connection(accepted)
        try:
            deliver_challenge(connection, self._secret)
            answer_challenge(connection, self._secret)
            hello = _hello.decode(connection.recv_bytes())
        except (OSError, EOFError, AuthenticationError, msgspec.DecodeError):
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
    hellos = [_Here(share), *map(_Rank, share.ranks)]
    with contextlib.ExitStack() as stack:
        ends = []
        for hello in hellos:
            try:
                end = stack.enter_context(_reach(address, secret))
            except (OSError, EOFError, AuthenticationError) as error:
                raise InstanceError(f"rank 0 of the instance cannot be reached at {address}: {error}") from error
            end.send_bytes(msgspec.msgpack.encode(hello))
            ends.append(end.fileno())
        return start_nursery(ends)


def _reach(address: str, secret: bytes) -> Connection:
    host, _, port = address.rpartition(":")
    connection = _connection(socket.create_connection((host, int(port)), timeout=_PATIENCE))
    try:
        answer_challenge(connection, secret)
        deliver_challenge(connection, secret)
    except BaseException:
        connection.close()
        raise
    return connection


def _connection(connected: socket.socket) -> Connection:
    """A connection over TCP that sends at once, and ends when the other machine is gone."""
    connected.settimeout(None)
    connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    connected.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in _PROBES.items():
        connected.setsockopt(socket.IPPROTO_TCP, option, value)
    connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, _GIVE_UP_MS)
    return Connection(connected.detach())
