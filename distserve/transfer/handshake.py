"""How two ranks of one host meet: a greeting over a Unix socket, at whose end memory is passed.

One Unix sequenced-packet connection in the abstract namespace, which leaves no file. The server's last packet of the
greeting (:mod:`~distserve.transfer.greeting`) carries two descriptors. Afterwards nothing is sent; the connection stays
open so that either side learns of the other's end at once. Both check the peer's user id first, since abstract sockets
carry no permissions.
"""

import os
import secrets
import socket
import struct
from dataclasses import dataclass

from distserve.core.config import KvLayout
from distserve.core.errors import TransferError
from distserve.transfer import greeting

_PREFIX = "distserve-kv-"


@dataclass(frozen=True, slots=True)
class Offered:
    """What a server gave: descriptors (now the caller's to close) of its pool and its progress words."""

    layout: KvLayout
    generation: int
    pool_fd: int
    progress_fd: int


@dataclass(frozen=True, slots=True)
class _UnixPackets:
    """Implements :class:`~distserve.transfer.greeting.Packets`: the socket keeps packets apart."""

    connection: socket.socket

    def send(self, packet: bytes) -> None:
        self.connection.send(packet)

    def receive(self) -> bytes:
        return self.connection.recv(greeting.MAX_PACKET)


def listen() -> tuple[socket.socket, str]:
    """Return a listening socket and its address: a fresh random name in this network namespace."""
    address = _PREFIX + secrets.token_hex(16)
    server = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC)
    server.bind("\0" + address)
    server.listen(64)
    return server, address


def serve(
    connection: socket.socket,
    secret: bytes,
    name: str,
    layout: KvLayout,
    generation: int,
    fds: tuple[int, int],
) -> None:
    """Server's side: offers ``fds``, the pool's and the progress words', to a peer that knows ``name``, its address.

    Raises TransferError (after telling the client why) if the peer is refused.
    """
    _check_user(connection)
    nonces = greeting.examine(_UnixPackets(connection), secret, name, layout)
    socket.send_fds(connection, [greeting.answer_of(layout, generation, secret, nonces)], fds)


def dial(address: str, secret: bytes, expected: KvLayout, timeout: float) -> tuple[socket.socket, Offered]:
    """Client's side: the connection to keep open, and what the server gave, whose layout is the ``expected`` one.

    Raises TransferError if nobody answers within ``timeout`` seconds or the two do not fit.
    """
    if not address.startswith(_PREFIX):
        raise TransferError(f"{address!r} is not an address of shared KV memory")
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC)
    connection.settimeout(timeout)
    try:
        connection.connect("\0" + address)
        offered = _greet(connection, secret, address, expected)
    except OSError as error:
        connection.close()
        raise TransferError(
            f"no KV memory to be reached at {address!r} on this host and network namespace: {error}"
        ) from error
    except BaseException:
        connection.close()
        raise
    connection.settimeout(None)
    return connection, offered


def _greet(connection: socket.socket, secret: bytes, name: str, expected: KvLayout) -> Offered:
    _check_user(connection)
    checked = greeting.introduce(_UnixPackets(connection), secret, name, expected)
    packet, fds, _, _ = socket.recv_fds(connection, greeting.MAX_PACKET, 2)
    try:
        return _offered(checked(packet), fds)
    except BaseException:
        for fd in fds:
            os.close(fd)
        raise


def _offered(answer: greeting.Answer, fds: list[int]) -> Offered:
    if len(fds) != 2:
        raise TransferError("malformed answer of the peer")
    return Offered(answer.layout, answer.generation, fds[0], fds[1])


def _check_user(connection: socket.socket) -> None:
    credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    _, uid, _ = struct.unpack("3i", credentials)
    if uid != os.geteuid():
        raise TransferError(f"the peer runs as user {uid}, not {os.geteuid()}")
