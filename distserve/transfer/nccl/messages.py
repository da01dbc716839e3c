"""What two ranks tell each other beside the data: frames on the control connection of a pair. Knows no sockets.

A frame is a header of 5 bytes, little-endian (bytes of the body, kind), and its body. The destination dials, so it is
the one that asks:

===========  ===================  =====================================================================
``PULL``     to the source        what of which blocks, until when
``CANCEL``   to the source        the pull has ended here; no GO for it will follow
``INVITE``   to the destination   make this generation's communicator with me
``AGREE``    to the source        I am making it
``READY``    to the destination   a piece lies packed in my staging ring
``GO``       to the source        I am launching its receive: launch its send
``END``      to the destination   the pull cannot go on, and why
``GIVE_UP``  either way           I abort this generation: do so too, and why
``RETIRE``   either way           I destroy this generation, which is idle: do so too
===========  ===================  =====================================================================
"""

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from enum import IntEnum

from distserve.core.config import KvLayout
from distserve.core.errors import TransferError
from distserve.transfer.tcp_wire import Wanted

HEADER = struct.Struct("<IB")
MAX_REASON = 1024
"""Longest text, in bytes; longer ones are cut."""
MAX_UNIQUE_ID = 1024
"""Bytes; NCCL's has 128."""
_PULL = struct.Struct("<QdQ")
_NUMBER = struct.Struct("<Q")
_READY = struct.Struct("<QQQIQ")
_GO = struct.Struct("<QQ")


class Kind(IntEnum):
    """What a frame is."""

    PULL = 1
    CANCEL = 2
    INVITE = 3
    AGREE = 4
    READY = 5
    GO = 6
    END = 7
    GIVE_UP = 8
    RETIRE = 9


@dataclass(frozen=True, slots=True)
class Pull:
    """Asks for a pull under ``number``, cut into pieces of ``min_piece_bytes``; it ends in ``seconds_left``."""

    number: int
    seconds_left: float
    min_piece_bytes: int
    wanted: Wanted


@dataclass(frozen=True, slots=True)
class Cancel:
    """The destination's pull has ended."""

    number: int


@dataclass(frozen=True, slots=True)
class Invite:
    """The source would like the communicator of a generation."""

    generation: int
    unique_id: bytes


@dataclass(frozen=True, slots=True)
class Agree:
    """The destination makes it."""

    generation: int


@dataclass(frozen=True, slots=True)
class Ready:
    """Piece ``piece`` of pull ``number`` may be fetched, as operation ``op_id``."""

    generation: int
    op_id: int
    number: int
    piece: int
    num_bytes: int


@dataclass(frozen=True, slots=True)
class Go:
    """The receive of an operation is being launched."""

    generation: int
    op_id: int


@dataclass(frozen=True, slots=True)
class End:
    """The source cannot go on with a pull."""

    number: int
    reason: str


@dataclass(frozen=True, slots=True)
class GiveUp:
    """A generation has failed."""

    generation: int
    reason: str


@dataclass(frozen=True, slots=True)
class Retire:
    """A generation is not used any more; none of its operations is under way."""

    generation: int


ToSource = Pull | Cancel | Agree | Go | GiveUp | Retire
ToSink = Invite | Ready | End | GiveUp | Retire
Message = ToSource | ToSink


def encode(message: Message) -> bytes:
    """As a frame."""
    match message:
        case Pull():
            head = _PULL.pack(message.number, message.seconds_left, message.min_piece_bytes)
            kind, body = Kind.PULL, head + message.wanted.encode()
        case Cancel():
            kind, body = Kind.CANCEL, _NUMBER.pack(message.number)
        case Invite():
            kind, body = Kind.INVITE, _NUMBER.pack(message.generation) + message.unique_id
        case Agree():
            kind, body = Kind.AGREE, _NUMBER.pack(message.generation)
        case Ready():
            fields = message.generation, message.op_id, message.number, message.piece, message.num_bytes
            kind, body = Kind.READY, _READY.pack(*fields)
        case Go():
            kind, body = Kind.GO, _GO.pack(message.generation, message.op_id)
        case End():
            kind, body = Kind.END, _NUMBER.pack(message.number) + _text(message.reason)
        case GiveUp():
            kind, body = Kind.GIVE_UP, _NUMBER.pack(message.generation) + _text(message.reason)
        case Retire():
            kind, body = Kind.RETIRE, _NUMBER.pack(message.generation)
    return HEADER.pack(len(body), kind) + body


def _text(reason: str) -> bytes:
    return reason.encode()[:MAX_REASON]


class Decoder:
    """Turns what arrives into messages, for an end that has ``layout`` and is the source, or is not.

    The other end is not trusted to keep to the protocol: what it could not mean raises TransferError.
    """

    def __init__(self, layout: KvLayout, *, at_source: bool) -> None:
        self._layout = layout
        self._kinds = {Kind.GIVE_UP, Kind.RETIRE} | (
            {Kind.PULL, Kind.CANCEL, Kind.AGREE, Kind.GO} if at_source else {Kind.INVITE, Kind.READY, Kind.END}
        )
        self._most = 4096 + (Wanted.max_bytes(layout) if at_source else 0)
        self._bytes = bytearray()

    def feed(self, received: bytes) -> Iterator[Message]:
        """Yield the messages that ``received`` completes."""
        self._bytes += received
        while len(self._bytes) >= HEADER.size:
            num_bytes, kind = HEADER.unpack_from(self._bytes)
            if kind not in self._kinds or num_bytes > self._most:
                raise TransferError(f"frame {kind} of {num_bytes} bytes breaks the protocol")
            end = HEADER.size + num_bytes
            if len(self._bytes) < end:
                return
            body = bytes(self._bytes[HEADER.size : end])
            del self._bytes[:end]
            try:
                yield self._decoded(Kind(kind), body)
            except struct.error as error:
                raise TransferError(f"frame {kind} of {num_bytes} bytes breaks the protocol") from error

    def _decoded(self, kind: Kind, body: bytes) -> Message:
        match kind:
            case Kind.PULL:
                number, seconds_left, min_piece_bytes = _PULL.unpack_from(body)
                if min_piece_bytes < 1 or not seconds_left == seconds_left:  # noqa: PLR0124  # not a number
                    raise TransferError("malformed pull")
                return Pull(number, seconds_left, min_piece_bytes, Wanted.decode(body[_PULL.size :], self._layout))
            case Kind.READY:
                return Ready(*_READY.unpack(body))
            case Kind.GO:
                return Go(*_GO.unpack(body))
            case Kind.CANCEL:
                return Cancel(*_NUMBER.unpack(body))
            case Kind.AGREE:
                return Agree(*_NUMBER.unpack(body))
            case Kind.RETIRE:
                return Retire(*_NUMBER.unpack(body))
            case _:
                (number,), rest = _NUMBER.unpack_from(body), body[_NUMBER.size :]
                if kind is Kind.INVITE:
                    return Invite(number, rest)
                reason = rest.decode("utf-8", "replace")
                return End(number, reason) if kind is Kind.END else GiveUp(number, reason)
