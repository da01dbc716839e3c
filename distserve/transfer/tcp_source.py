"""The sending end of a connection: answers PULL frames with the bytes, as the source's step gets ahead.

One thread per connection; the peer's reading paces it, and nothing is queued but what the peer asked for. Long pieces
are sent from where they lie, short ones gathered first.
"""

import selectors
import socket
import time
from dataclasses import dataclass

import numpy as np

from distserve.core.config import KvLayout
from distserve.core.errors import TransferError
from distserve.transfer.copy import Bytes, copy_pieces
from distserve.transfer.plan import plane_bytes, stream_pieces
from distserve.transfer.progress import SourceProgress
from distserve.transfer.stream import Batch, Stream, pause
from distserve.transfer.tcp_wire import (
    FRAME_BYTES,
    HEADER,
    LONG_PIECE,
    MAX_REASON,
    Inlet,
    Kind,
    Wanted,
    batch_bytes,
    skip,
)

_MAX_PULLS = 4096
"""Of one peer at a time."""
_MAX_REPLIES = 64
"""While so many refusals wait to be sent, no more requests are read."""


@dataclass(frozen=True, slots=True, eq=False)
class _Asked:
    wanted: Wanted
    stream: Stream

    def layers_passed(self, progress: SourceProgress, num_layers: int) -> int:
        """How many of the layers asked for the step has passed."""
        passed = progress.layers_passed(self.wanted.ready_step, num_layers)
        return min(max(passed - self.wanted.layers.start, 0), len(self.wanted.layers))


class Sender:
    """Serves one connection that has greeted, out of ``memory`` of ``layout``."""

    def __init__(self, connection: socket.socket, layout: KvLayout, memory: Bytes, progress: SourceProgress) -> None:
        self._connection = connection
        self._layout = layout
        self._memory = memory
        self._view = memory.data
        self._progress = progress
        self._inlet = Inlet(connection, self._begin, self._finish)
        self._request: tuple[int, int, bytearray] = (0, 0, bytearray())
        self._asked: dict[int, _Asked] = {}
        self._replies: list[bytes] = []
        self._outgoing: list[memoryview] = []
        self._stage = np.empty(FRAME_BYTES, dtype=np.uint8)
        self._last_moved = time.monotonic()

    def run(self) -> None:
        """Serve until the peer closes or the connection is shut down.

        Raises OSError if the connection breaks, TransferError if the peer breaks the protocol.
        """
        with selectors.DefaultSelector() as selector:
            selector.register(self._connection, selectors.EVENT_READ)
            try:
                while True:
                    self._turn(selector)
            except EOFError:
                return

    def _turn(self, selector: selectors.BaseSelector) -> None:
        if not self._outgoing:
            self._next_frame()
        interest = selectors.EVENT_WRITE if self._outgoing else 0
        if len(self._replies) < _MAX_REPLIES:
            interest |= selectors.EVENT_READ
        selector.modify(self._connection, interest)
        for _, events in selector.select(self._timeout()):
            if events & selectors.EVENT_READ:
                self._inlet.read(max_calls=64)
            if events & selectors.EVENT_WRITE:
                skip(self._outgoing, self._connection.sendmsg(self._outgoing))
                self._last_moved = time.monotonic()

    def _timeout(self) -> float | None:
        """Seconds to the next look at the step's progress."""
        if self._outgoing or not self._asked:
            return None
        num_layers = self._layout.num_layers
        fewest = min(
            len(asked.wanted.layers) - asked.layers_passed(self._progress, num_layers) for asked in self._asked.values()
        )
        return pause(fewest, time.monotonic() - self._last_moved)

    def _next_frame(self) -> None:
        """Put what the oldest pull that can go on has next into ``_outgoing``; refusals first."""
        if self._replies:
            self._outgoing = [memoryview(reply) for reply in self._replies]
            self._replies = []
            return
        for number, asked in self._asked.items():
            if not asked.stream.is_done:
                batch = asked.stream.next(asked.layers_passed(self._progress, self._layout.num_layers))
                if batch is None:
                    continue
                header = HEADER.pack(Kind.DATA, len(batch.planes), batch.num_bytes, number)
                self._outgoing = [memoryview(header), *self._body(batch, asked.wanted)]
            if asked.stream.is_done:
                self._outgoing.append(memoryview(HEADER.pack(Kind.END, 0, 0, number)))
                del self._asked[number]
            return

    def _body(self, batch: Batch, wanted: Wanted) -> list[memoryview]:
        stride = plane_bytes(self._layout)
        first = (2 * wanted.layers.start + batch.planes.start) * stride
        if batch.plane_bytes >= LONG_PIECE * len(batch.pieces):
            return [
                self._view[start + offset : start + offset + length]
                for start in range(first, first + len(batch.planes) * stride, stride)
                for offset, _, length in batch.pieces.tolist()
            ]
        pieces = batch.pieces - (0, batch.pieces[0, 1], 0)
        planes = range(len(batch.planes))
        copy_pieces(self._memory[first:], self._stage, pieces, planes, stride, batch.plane_bytes)
        return [self._stage.data[: batch.num_bytes]]

    def _begin(self, kind: int, _num_planes: int, num_bytes: int, number: int) -> list[memoryview]:
        if not (kind == Kind.PULL and num_bytes <= Wanted.max_bytes(self._layout)) and not (
            kind == Kind.CANCEL and num_bytes == 0
        ):
            raise TransferError(f"the peer broke the protocol: frame {kind} of {num_bytes} bytes")
        body = bytearray(num_bytes)
        self._request = (kind, number, body)
        return [memoryview(body)] if body else []

    def _finish(self) -> None:
        kind, number, body = self._request
        if kind == Kind.CANCEL:
            self._asked.pop(number, None)
            return
        try:
            if len(self._asked) >= _MAX_PULLS:
                raise TransferError(f"{_MAX_PULLS} pulls from one peer are under way already")  # noqa: TRY301
            if number in self._asked:
                raise TransferError(f"pull {number} is under way already")  # noqa: TRY301
            self._asked[number] = self._planned(Wanted.decode(bytes(body), self._layout))
        except TransferError as error:
            reason = str(error).encode()[:MAX_REASON]
            self._replies.append(HEADER.pack(Kind.END, 0, len(reason), number) + reason)
        # What was asked for before may have waited for long.
        self._last_moved = time.monotonic()

    def _planned(self, wanted: Wanted) -> _Asked:
        ready, late = (
            stream_pieces(wanted.blocks[part], self._layout, wanted.heads)
            for part in (slice(wanted.num_ready_blocks), slice(wanted.num_ready_blocks, None))
        )
        max_bytes = batch_bytes(self._layout, wanted.heads)
        return _Asked(wanted, Stream(ready, late, len(wanted.layers), max_bytes))
