"""The control connection of a pair, once the two have met: messages in and out of a socket that does not block."""

import socket
from collections.abc import Iterator

from distserve.core.config import KvLayout
from distserve.core.errors import TransferError
from distserve.transfer.nccl.messages import Decoder, Message, encode

_MAX_OUTGOING = 64 << 20
"""Bytes that may wait for a peer that does not read; more than all its pulls can be."""
_READ_BYTES = 64 << 10


class Control:
    """``connection`` is non-blocking, and this end is the source, or is not."""

    def __init__(self, connection: socket.socket, layout: KvLayout, *, at_source: bool) -> None:
        self.connection = connection
        self._decoder = Decoder(layout, at_source=at_source)
        self._outgoing = bytearray()

    @property
    def has_more(self) -> bool:
        """Whether bytes wait to be written."""
        return bool(self._outgoing)

    def send(self, message: Message) -> None:
        """Send now, or when there is room. Raises OSError if the connection is broken, TransferError if it is stuck."""
        self._outgoing += encode(message)
        self.flush()
        if len(self._outgoing) > _MAX_OUTGOING:
            raise TransferError("does not read what it is told")

    def flush(self) -> None:
        """Write what there is room for. Raises OSError."""
        try:
            while self._outgoing:
                del self._outgoing[: self.connection.send(self._outgoing)]
        except BlockingIOError:
            return

    def read(self) -> Iterator[Message]:
        """Yield what has arrived.

        Raises OSError if the connection broke, EOFError if the other end closed it, TransferError for nonsense.
        """
        try:
            received = self.connection.recv(_READ_BYTES)
        except BlockingIOError:
            return
        if not received:
            raise EOFError
        yield from self._decoder.feed(received)
