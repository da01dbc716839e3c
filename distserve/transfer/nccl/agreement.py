"""What happens to a pair of ranks, and what is to be done about it: events in, commands out. Pure.

An *operation* is a piece on its way: it has a slot of the rank's staging ring from its first command on. The source
numbers the operations of a link; both ends use the number. Commands are to be executed in their order; each of the
events that answer one comes at most once.
"""

from dataclasses import dataclass

from distserve.transfer.nccl.messages import Message
from distserve.transfer.nccl.pieces import Piece
from distserve.transfer.tcp_wire import Wanted

# Events.


@dataclass(frozen=True, slots=True)
class Begin:
    """The destination begins a pull of ``pieces``, under a ``number`` that is new to the link."""

    number: int
    wanted: Wanted
    pieces: tuple[Piece, ...]
    deadline: float


@dataclass(frozen=True, slots=True)
class Stop:
    """The destination gives a pull up; nothing happens if it has ended."""

    number: int
    reason: str


@dataclass(frozen=True, slots=True)
class Arrived:
    """The other end said something."""

    message: Message


@dataclass(frozen=True, slots=True)
class Lost:
    """The other end will say nothing more, and hears nothing."""

    reason: str


@dataclass(frozen=True, slots=True)
class Evict:
    """Make room for another communicator, if this one is idle."""


@dataclass(frozen=True, slots=True)
class Tick:
    """Time has passed, or something outside changed: a slot, a seat, the step's progress."""


@dataclass(frozen=True, slots=True)
class Named:
    """Answers MakeId."""

    generation: int
    unique_id: bytes


@dataclass(frozen=True, slots=True)
class Opened:
    """Answers Open: the communicator is there."""

    generation: int


@dataclass(frozen=True, slots=True)
class Broken:
    """A communicator cannot be made, or it, or an operation on it, reports an error."""

    generation: int
    reason: str


@dataclass(frozen=True, slots=True)
class TornDown:
    """Answers Abort, Destroy and Abandon, however late: no host thread and no kernel uses the communicator any more."""

    generation: int


@dataclass(frozen=True, slots=True)
class Packed:
    """Answers Pack: the slot holds the piece."""

    op_id: int


@dataclass(frozen=True, slots=True)
class Moved:
    """Answers Send and Receive: NCCL is done with the slot."""

    generation: int
    op_id: int


@dataclass(frozen=True, slots=True)
class Unpacked:
    """Answers Unpack: the piece is in its blocks."""

    op_id: int


Event = (
    Begin | Stop | Arrived | Lost | Evict | Tick | Named | Opened | Broken | TornDown | Packed | Moved | Unpacked
)  # fmt: skip

# Commands.


@dataclass(frozen=True, slots=True)
class Tell:
    """Send a message to the other end. Commands that follow are executed later than it is on its way."""

    message: Message


@dataclass(frozen=True, slots=True)
class MakeId:
    """Have NCCL make the id under which the two ends of a generation meet."""

    generation: int


@dataclass(frozen=True, slots=True)
class Open:
    """Make the communicator of a generation, as ``rank`` of two."""

    generation: int
    unique_id: bytes
    rank: int


@dataclass(frozen=True, slots=True)
class Abandon:
    """What MakeId or Open began is not wanted; once it returns, end it. It cannot be interrupted."""

    generation: int


@dataclass(frozen=True, slots=True)
class Abort:
    """End a communicator and the operations on it at once, also those that the host is stuck in."""

    generation: int


@dataclass(frozen=True, slots=True)
class Destroy:
    """End a communicator that is idle on both ends."""

    generation: int


@dataclass(frozen=True, slots=True)
class Pack:
    """Gather a piece of what is wanted into a slot."""

    op_id: int
    slot: int
    wanted: Wanted
    piece: Piece


@dataclass(frozen=True, slots=True)
class Send:
    """Launch the send of a slot's first bytes."""

    generation: int
    op_id: int
    slot: int
    num_bytes: int


@dataclass(frozen=True, slots=True)
class Receive:
    """Launch the receive into a slot."""

    generation: int
    op_id: int
    slot: int
    num_bytes: int


@dataclass(frozen=True, slots=True)
class Unpack:
    """Scatter a slot into the blocks of a pull."""

    op_id: int
    slot: int
    number: int
    piece: Piece


@dataclass(frozen=True, slots=True)
class Ended:
    """A pull of the destination has ended and none of its blocks is written any more; no ``reason``: it is well."""

    number: int
    reason: str
    num_bytes: int


Command = (
    Tell | MakeId | Open | Abandon | Abort | Destroy | Pack | Send | Receive | Unpack | Ended
)  # fmt: skip
