"""What travels on a TCP connection between two ranks: the greeting in packets, then frames.

A greeting packet is a 32-bit length and its bytes. A frame is a header of 16 bytes, little-endian (kind, planes, bytes
of the body, number of the pull on this connection), and its body:

=========  ================  =======================================================================
``PULL``   to the source     a :class:`Wanted`: what of which blocks, and when they are ready
``CANCEL`` to the source     nothing; the source sends no more of the pull, nor its end
``DATA``   from the source   the next bytes of the pull, of so many planes, as its ``Stream`` has them
``END``    from the source   why it ended early, in UTF-8; empty after the last byte
=========  ================  =======================================================================

The greeting authenticates the peers; what follows is neither encrypted nor authenticated byte by byte, so the network
between the ranks must be one that strangers cannot alter.
"""

import secrets
import socket
import struct
import time
from collections.abc import Callable
from dataclasses import dataclass
from enum import IntEnum

import numpy as np

from distserve.core.config import KvLayout
from distserve.core.errors import TransferError
from distserve.transfer import greeting
from distserve.transfer.plan import token_bytes

HEADER = struct.Struct("<BxHIQ")
_WANTED = struct.Struct("<qIHHHHI")
FRAME_BYTES = 1 << 20
"""Longest body of a DATA frame; part of the protocol, since both ends cut the stream by it."""
LONG_PIECE = 16 << 10
"""Bytes of an average piece from which it is worth to send and receive it in place; shorter ones are gathered."""
MAX_REASON = 1024
"""Longest body of an END frame."""

_PREFIX = "tcp://"
_LENGTH = struct.Struct("<I")
# A peer whose host has vanished is noticed after this long, by keepalive or by data not acknowledged.
_KEEPALIVE_IDLE, _KEEPALIVE_INTERVAL, _KEEPALIVE_COUNT = 5, 2, 3
_USER_TIMEOUT_MS = 15_000


class Kind(IntEnum):
    """What a frame is."""

    DATA = 1
    END = 2
    PULL = 3
    CANCEL = 4


@dataclass(frozen=True, slots=True)
class Wanted:
    """The body of a PULL frame: layers and heads of the source's own, of blocks of its pool."""

    ready_step: int
    num_ready_blocks: int
    layers: range
    heads: range
    blocks: tuple[int, ...]

    def encode(self) -> bytes:
        """As the frame's body."""
        head = _WANTED.pack(
            self.ready_step,
            self.num_ready_blocks,
            self.layers.start,
            self.layers.stop,
            self.heads.start,
            self.heads.stop,
            len(self.blocks),
        )
        return head + np.array(self.blocks, dtype="<u4").tobytes()

    @staticmethod
    def max_bytes(layout: KvLayout) -> int:
        """Bytes of the longest body that asks for blocks of ``layout``, each once."""
        return _WANTED.size + 4 * layout.num_blocks

    @classmethod
    def decode(cls, body: bytes, layout: KvLayout) -> "Wanted":
        """Read a body; raises TransferError if it asks for what a pool of ``layout`` does not have."""
        if len(body) < _WANTED.size:
            raise TransferError("malformed pull")
        step, num_ready, first_layer, end_layer, first_head, end_head, num_blocks = _WANTED.unpack_from(body)
        if len(body) != _WANTED.size + 4 * num_blocks or num_ready > num_blocks:
            raise TransferError("malformed pull")
        if not first_layer < end_layer <= layout.num_layers or not first_head < end_head <= layout.num_kv_heads:
            raise TransferError(
                f"layers {first_layer}..{end_layer - 1} and KV heads {first_head}..{end_head - 1} are not all within "
                f"{layout.num_layers} layers and {layout.num_kv_heads} heads"
            )
        blocks = np.frombuffer(body, dtype="<u4", offset=_WANTED.size)
        if num_blocks and int(blocks.max()) >= layout.num_blocks:
            raise TransferError(f"source block {int(blocks.max())} is not within 0..{layout.num_blocks - 1}")
        layers, heads = range(first_layer, end_layer), range(first_head, end_head)
        return cls(step, num_ready, layers, heads, tuple(blocks.tolist()))


def batch_bytes(layout: KvLayout, heads: range) -> int:
    """Most bytes of a batch that fits a frame: whole tokens, so that no gathered row is cut in two."""
    return FRAME_BYTES - FRAME_BYTES % token_bytes(layout, heads) or FRAME_BYTES


def skip(buffers: list[memoryview], num_bytes: int) -> None:
    """Drop the first ``num_bytes`` of ``buffers``, which have been sent or filled."""
    done = 0
    while done < len(buffers) and num_bytes >= len(buffers[done]):
        num_bytes -= len(buffers[done])
        done += 1
    del buffers[:done]
    if num_bytes:
        buffers[0] = buffers[0][num_bytes:]


@dataclass(frozen=True, slots=True)
class Packets:
    """Implements :class:`~distserve.transfer.greeting.Packets` on a blocking socket, all of it before ``deadline``.

    The deadline (``time.monotonic``) is one for the whole greeting, so a peer that sends a byte now and then gains
    nothing by it.
    """

    connection: socket.socket
    deadline: float

    def send(self, packet: bytes) -> None:
        """Send one packet."""
        self._arm()
        self.connection.sendall(_LENGTH.pack(len(packet)) + packet)

    def receive(self) -> bytes:
        """Return the next packet; empty if the peer has closed."""
        head = self._receive(_LENGTH.size)
        if not head:
            return b""
        (length,) = _LENGTH.unpack(head)
        if length > greeting.MAX_PACKET:
            raise TransferError("the peer does not speak the KV transfer protocol")
        return self._receive(length)

    def _receive(self, num_bytes: int) -> bytes:
        """Return exactly so many bytes, and no byte of what follows; none if the peer closes before."""
        received = bytearray()
        while len(received) < num_bytes:
            self._arm()
            if not (some := self.connection.recv(num_bytes - len(received))):
                return b""
            received += some
        return bytes(received)

    def _arm(self) -> None:
        left = self.deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError("timed out")
        self.connection.settimeout(left)


def listen(host: str) -> tuple[socket.socket, str, str]:
    """Return a socket that listens on ``host``, its address and the random name in it.

    Raises TransferError if this host has no such interface.
    """
    try:
        family, _, _, _, where = socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM)[0]
        server = socket.create_server((str(where[0]), 0), family=family, backlog=64)
    except OSError as error:
        raise TransferError(f"cannot listen for KV peers on {host!r}: {error}") from error
    name = secrets.token_hex(16)
    shown = f"[{host}]" if ":" in host else host
    return server, f"{_PREFIX}{shown}:{server.getsockname()[1]}/{name}", name


def dial(address: str, secret: bytes, expected: KvLayout, timeout: float) -> tuple[socket.socket, greeting.Answer]:
    """Client's side of a connection, ready for frames, to a server whose layout is the ``expected`` one.

    Raises TransferError if nobody answers within ``timeout`` seconds or the two do not fit.
    """
    host, port, name = _parse(address)
    deadline = time.monotonic() + timeout
    try:
        connection = socket.create_connection((host, port), timeout)
    except OSError as error:
        raise TransferError(f"no KV memory to be reached at {address}: {error}") from error
    try:
        packets = Packets(connection, deadline)
        checked = greeting.introduce(packets, secret, name, expected)
        answer = checked(packets.receive())
        prepare(connection)
    except OSError as error:
        connection.close()
        raise TransferError(f"no KV memory to be reached at {address}: {error}") from error
    except BaseException:
        connection.close()
        raise
    return connection, answer


def prepare(connection: socket.socket) -> None:
    """Make a connection ready for frames: it never blocks, never delays, and notices when the peer's host is gone."""
    connection.setblocking(False)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, _KEEPALIVE_IDLE)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, _KEEPALIVE_INTERVAL)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, _KEEPALIVE_COUNT)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, _USER_TIMEOUT_MS)


def _parse(address: str) -> tuple[str, int, str]:
    place, _, name = address.removeprefix(_PREFIX).partition("/")
    host, _, port = place.rpartition(":")
    if not address.startswith(_PREFIX) or not host or not port.isdecimal():
        raise TransferError(f"{address!r} is not an address of KV memory over TCP")
    return host.removeprefix("[").removesuffix("]"), int(port), name


class Inlet:
    """Reads frames off a connection that does not block: headers, then bodies into memory that the reader names.

    ``begin`` is called with a header (kind, planes, bytes, pull) and returns where the body goes; ``finish`` once it
    is there. Both may raise TransferError for what breaks the protocol. Holds no more than a header of its own.
    """

    def __init__(
        self,
        connection: socket.socket,
        begin: Callable[[int, int, int, int], list[memoryview]],
        finish: Callable[[], None],
    ) -> None:
        self._connection = connection
        self._begin = begin
        self._finish = finish
        self._header = bytearray(HEADER.size)
        self._in_header = True
        self.targets = [memoryview(self._header)]
        """Where the next bytes go; the reader may exchange a body's targets for others of the same length."""

    def read(self, max_calls: int) -> None:
        """Read what is there, in at most ``max_calls`` system calls.

        Raises OSError if the connection broke, EOFError if the peer closed it, and what the callbacks raise.
        """
        for _ in range(max_calls):
            try:
                num_bytes = self._connection.recvmsg_into(self.targets)[0]
            except BlockingIOError:
                return
            if num_bytes == 0:
                raise EOFError
            skip(self.targets, num_bytes)
            if self.targets:
                continue
            if self._in_header:
                self._in_header = False
                self.targets = self._begin(*HEADER.unpack(self._header))
            if not self.targets:
                self._finish()
                self._in_header = True
                self.targets = [memoryview(self._header)]
