"""The receiving end of TCP pulls: one thread, all connections. Asks, and reads the answers to where they belong.

Long pieces are received in place, short ones in a buffer from which they are spread once a frame is complete. What
still arrives for a pull that has ended goes nowhere.
"""

import contextlib
import selectors
import socket
from dataclasses import dataclass, field

import numpy as np

from distserve.core.config import KvLayout
from distserve.core.errors import TransferError
from distserve.transfer.copy import Bytes, copy_pieces
from distserve.transfer.plan import Part, Pieces, check_blocks, plane_bytes, stream_pieces
from distserve.transfer.pulls import Pull, PullThread
from distserve.transfer.stream import Batch, Stream
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
from distserve.transfer.transport import Clock

_LOOK = 0.02
"""Seconds between two looks at deadlines while nothing arrives."""
_CALLS_PER_LOOK = 32
"""System calls that read one connection before others, orders and deadlines have their turn."""


@dataclass(slots=True, eq=False)
class _Data:
    """A DATA frame on its way in: ``batch`` of ``pull``, which is None once nobody wants it."""

    pull: "Pull[Link] | None"
    batch: Batch | None
    is_staged: bool


@dataclass(slots=True, eq=False)
class _End:
    """An END frame on its way in."""

    number: int
    reason: bytearray


@dataclass(slots=True, eq=False)
class Link:
    """A connection to one life of a source, and the part of its KV to pull; belongs to the receiver's thread.

    ``pulls`` are those that the source has not ended, by the numbers they have on this connection.
    """

    instance_id: str
    connection: socket.socket
    layout: KvLayout
    part: Part
    is_open: bool = True
    num_asked: int = 0
    pulls: "dict[int, Pull[Link]]" = field(default_factory=dict)
    outgoing: list[memoryview] = field(default_factory=list)
    inlet: Inlet | None = None
    frame: _Data | _End | None = None
    stage: Bytes = field(default_factory=lambda: np.empty(FRAME_BYTES, dtype=np.uint8))

    def number_of(self, pull: "Pull[Link]") -> int | None:
        """The number of a pull that the source has not ended."""
        return next((number for number, other in self.pulls.items() if other is pull), None)


class Receiver(PullThread[Link]):
    """Pulls into ``memory`` of ``layout``, out of the links attached."""

    def __init__(self, layout: KvLayout, memory: Bytes, clock: Clock) -> None:
        super().__init__("kv-receiver", clock)
        self._layout = layout
        self._memory = memory
        self._view = memory.data
        self._selector = selectors.DefaultSelector()
        self._waking, self._waker = socket.socketpair()
        for end in (self._waking, self._waker):
            end.setblocking(False)
        self._selector.register(self._waking, selectors.EVENT_READ)
        self._thread.start()

    def _wake(self) -> None:
        # Full: it is awake. Closed: the thread has ended, and so has every pull.
        with contextlib.suppress(OSError):
            self._waker.send(b"\0")

    def _run(self) -> None:
        try:
            super()._run()
        finally:
            self._selector.close()
            self._waking.close()
            self._waker.close()

    def _turn(self) -> None:
        ready = self._selector.select(_LOOK if self._pulls else None)
        # The bell before the inbox, or an order that comes between the two would not ring. Orders before what arrived:
        # a pull that was asked for before its source closed fails for that reason.
        with contextlib.suppress(BlockingIOError):
            self._waking.recv(4096)
        self._take_orders(0.0)
        for key, events in ready:
            if key.data is not None:
                self._serve(key.data, events)
        for pull in tuple(self._pulls.values()):
            if failure := self._invalidity(pull):
                self._end(pull, failure)

    def _attach(self, instance_id: str, source: Link) -> None:
        super()._attach(instance_id, source)
        source.inlet = Inlet(
            source.connection,
            lambda *header: self._begin_frame(source, *header),
            lambda: self._finish_frame(source),
        )
        self._selector.register(source.connection, selectors.EVENT_READ, source)

    def _let_go(self, source: Link) -> None:
        source.is_open = False
        self._selector.unregister(source.connection)
        source.connection.close()

    def _is_serving(self, source: Link) -> bool:
        return source.is_open

    def _open(self, pull: Pull[Link], source: Link) -> None:
        migrate, part = pull.migrate, source.part
        check_blocks(migrate.src_blocks, migrate.dst_blocks, source.layout, self._layout)
        ready, late = (
            self._places(migrate.dst_blocks[blocks], part.dst_heads)
            for blocks in (slice(migrate.num_ready_blocks), slice(migrate.num_ready_blocks, None))
        )
        pull.stream = Stream(ready, late, part.num_layers, batch_bytes(self._layout, part.dst_heads))
        wanted = Wanted(
            migrate.ready_step, migrate.num_ready_blocks, part.src_layers, part.src_heads, migrate.src_blocks
        )
        source.num_asked += 1
        source.pulls[source.num_asked] = pull
        body = wanted.encode()
        self._send(source, HEADER.pack(Kind.PULL, 0, len(body), source.num_asked) + body)

    def _ended(self, pull: Pull[Link], source: Link) -> None:
        if (number := source.number_of(pull)) is not None:
            del source.pulls[number]
            self._send(source, HEADER.pack(Kind.CANCEL, 0, 0, number))
        if isinstance(source.frame, _Data) and source.frame.pull is pull:
            # The rest of the frame still arrives, but not in memory that is about to be somebody else's.
            source.frame.pull = None
            assert source.inlet is not None
            left = sum(len(target) for target in source.inlet.targets)
            source.inlet.targets = [source.stage.data[:left]]

    def _places(self, blocks: tuple[int, ...], heads: range) -> Pieces:
        """Pieces out of the stream of a plane, to where ``heads`` of ``blocks`` lie."""
        return np.ascontiguousarray(stream_pieces(blocks, self._layout, heads)[:, [1, 0, 2]])

    def _serve(self, link: Link, events: int) -> None:
        """Read and write what a connection is ready for; its end, or nonsense on it, is the end of the link."""
        if not link.is_open:
            return
        assert link.inlet is not None
        try:
            if events & selectors.EVENT_READ:
                link.inlet.read(_CALLS_PER_LOOK)
            if events & selectors.EVENT_WRITE:
                self._flush(link)
        except EOFError:
            self._lose(link, "closed its connection")
        except (OSError, TransferError) as error:
            self._lose(link, f"is not reachable any more: {error}")

    def _lose(self, link: Link, how: str) -> None:
        self._detach(link.instance_id, f"instance {link.instance_id} {how}", link)

    def _send(self, link: Link, message: bytes) -> None:
        """Send a message now or when there is room."""
        if not link.is_open:
            return
        link.outgoing.append(memoryview(message))
        if len(link.outgoing) == 1:
            # If the connection is broken, reading from it says so.
            with contextlib.suppress(OSError):
                self._flush(link)
            if link.outgoing:
                self._selector.modify(link.connection, selectors.EVENT_READ | selectors.EVENT_WRITE, link)

    def _flush(self, link: Link) -> None:
        with contextlib.suppress(BlockingIOError):
            while link.outgoing:
                # The system takes no more than 1024 at a time.
                skip(link.outgoing, link.connection.sendmsg(link.outgoing[:64]))
            self._selector.modify(link.connection, selectors.EVENT_READ, link)

    def _begin_frame(self, link: Link, kind: int, num_planes: int, num_bytes: int, number: int) -> list[memoryview]:
        """Return where the body of a frame goes; raises TransferError if it is none that was asked for."""
        if kind == Kind.END and num_bytes <= MAX_REASON and number <= link.num_asked:
            end = _End(number, bytearray(num_bytes))
            link.frame = end
            return [memoryview(end.reason)] if num_bytes else []
        if kind != Kind.DATA or num_bytes > FRAME_BYTES or number > link.num_asked:
            raise TransferError(f"frame {kind} of {num_bytes} bytes for pull {number} breaks the protocol")
        staged = [link.stage.data[:num_bytes]]
        if (pull := link.pulls.get(number)) is None:
            link.frame = _Data(None, None, is_staged=True)
            return staged
        assert pull.stream is not None
        batch = pull.stream.take(num_planes)
        if batch.num_bytes != num_bytes:
            raise TransferError(f"a frame of {num_bytes} bytes arrived in place of one of {batch.num_bytes}")
        is_staged = batch.plane_bytes < LONG_PIECE * len(batch.pieces)
        link.frame = _Data(pull, batch, is_staged)
        return staged if is_staged else self._targets(batch, link.part)

    def _finish_frame(self, link: Link) -> None:
        frame, link.frame = link.frame, None
        assert frame is not None
        if isinstance(frame, _Data):
            if frame.pull is not None and frame.batch is not None and frame.is_staged:
                self._spread(link.stage, frame.batch, link.part)
            return
        if (pull := link.pulls.pop(frame.number, None)) is None:
            return
        reason = frame.reason.decode("utf-8", "replace")
        assert pull.stream is not None
        if not reason and not pull.stream.is_done:
            reason = f"instance {link.instance_id} ended the pull too early"
        self._end(pull, pull.failure or reason or self._invalidity(pull))

    def _first_byte(self, batch: Batch, part: Part) -> int:
        return (2 * part.dst_layers.start + batch.planes.start) * plane_bytes(self._layout)

    def _targets(self, batch: Batch, part: Part) -> list[memoryview]:
        """The batch's places in our memory, in order."""
        first, stride = self._first_byte(batch, part), plane_bytes(self._layout)
        return [
            self._view[start + offset : start + offset + length]
            for start in range(first, first + len(batch.planes) * stride, stride)
            for _, offset, length in batch.pieces.tolist()
        ]

    def _spread(self, stage: Bytes, batch: Batch, part: Part) -> None:
        """Copy a frame that arrived in ``stage`` to its places."""
        pieces = batch.pieces - (batch.pieces[0, 0], 0, 0)
        memory = self._memory[self._first_byte(batch, part) :]
        planes = range(len(batch.planes))
        copy_pieces(stage, memory, pieces, planes, batch.plane_bytes, plane_bytes(self._layout))
