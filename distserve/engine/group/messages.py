"""What rank 0 and the other ranks of its instance tell each other: msgpack over sockets that only they have.

On one node each pair has a socket made before the process was, and inherited: nobody else can connect to it, so nothing
needs to be proved. What ranks of other nodes prove is :mod:`distserve.engine.group.away`'s. Decoding checks types and
can make nothing but these messages.
"""

from multiprocessing.connection import Connection

import msgspec

from distserve.core.commands import OpenSequence, RunStep
from distserve.core.config import KvConfig, ParallelConfig
from distserve.core.events import StepDone
from distserve.engine.sharding.meeting import Meeting


class RankPlan(msgspec.Struct, frozen=True):
    """What the ranks of an instance on one node need to know: the model, its shape, and where all its ranks meet.

    ``ranks`` are those of the node, ascending. ``timeout`` is how many seconds a rank waits for one that is alive but
    silent. ``cores`` are CPUs, ``num_threads`` for each of ``ranks`` in order; without any the operating system
    chooses. ``memory`` names (``module:class``) the :class:`distserve.engine.group.memory_port.RankMemory` that each
    rank keeps its KV in, made with ``memory_options``; without a name it is memory of its own.

    On a device, decode batches of up to ``max_batch_size`` are captured, none if that is 0. ``backend`` names
    (``module:function``) what makes the :class:`distserve.engine.device.backend.Backend` that a rank computes on in
    place of ``device``, of its local rank and ``backend_options``: a rehearsal's.
    """

    model_dir: str
    dtype: str
    kv: KvConfig
    parallel: ParallelConfig
    ranks: tuple[int, ...]
    meeting: Meeting
    device: str
    num_threads: int
    timeout: float
    cores: tuple[int, ...] = ()
    memory: str = ""
    memory_options: bytes = b""
    max_batch_size: int = 64
    backend: str = ""
    backend_options: str = ""

    def local_rank(self, rank: int) -> int:
        """Which of its node's ranks ``rank`` is, and so which of its devices it has."""
        return self.ranks.index(rank)


class Open(msgspec.Struct, tag=True, frozen=True):
    """To a rank: a sequence begins."""

    command: OpenSequence


class Close(msgspec.Struct, tag=True, frozen=True):
    """To a rank: a sequence is over."""

    seq_id: int


class Step(msgspec.Struct, tag=True, frozen=True):
    """To a rank: run your part of a step."""

    step: RunStep


class Drawn(msgspec.Struct, tag=True, frozen=True):
    """To a rank: the tokens that a step drew, before any later step of its sequences."""

    step_id: int
    tokens: tuple[int, ...]


class Ask(msgspec.Struct, tag=True, frozen=True):
    """To a rank: something for its memory."""

    request: bytes


class Told(msgspec.Struct, tag=True, frozen=True):
    """From a rank: something that its memory says."""

    answer: bytes


class Loaded(msgspec.Struct, tag=True, frozen=True):
    """From a rank: ready for steps. ``address`` is where its memory is reached, if it is to be."""

    address: str = ""


class Done(msgspec.Struct, tag=True, frozen=True):
    """From the rank that draws the tokens: a step's outcome."""

    done: StepDone


class Failed(msgspec.Struct, tag=True, frozen=True):
    """From a rank that ends: why. ``kind`` is the error's class, ``trace`` its traceback if it is not the user's."""

    kind: str
    reason: str
    trace: str = ""


class Ended(msgspec.Struct, tag=True, frozen=True):
    """From the nursery: the process of a rank ended with this status (negative: killed by that signal)."""

    rank: int
    status: int


ToRank = Open | Close | Step | Drawn | Ask
FromRank = Loaded | Done | Failed | Told

_encoder = msgspec.msgpack.Encoder()
_to_rank: msgspec.msgpack.Decoder[ToRank] = msgspec.msgpack.Decoder(ToRank)
_from_rank: msgspec.msgpack.Decoder[FromRank] = msgspec.msgpack.Decoder(FromRank)
_plan = msgspec.msgpack.Decoder(RankPlan)
_ended = msgspec.msgpack.Decoder(Ended)


def encode(message: ToRank | FromRank | Ended | RankPlan) -> bytes:
    """Bytes of a message."""
    return _encoder.encode(message)


def receive_command(connection: Connection) -> ToRank:
    """The next message to a rank; raises EOFError when rank 0 is gone."""
    return _to_rank.decode(_receive(connection))


def receive_report(connection: Connection) -> FromRank:
    """The next message from a rank; raises EOFError when it is gone."""
    return _from_rank.decode(_receive(connection))


def receive_plan(connection: Connection) -> RankPlan:
    """The nursery's first message; raises EOFError when rank 0 is gone."""
    return _plan.decode(_receive(connection))


def receive_ended(connection: Connection) -> Ended:
    """The nursery's next message; raises EOFError when it is gone."""
    return _ended.decode(_receive(connection))


def _receive(connection: Connection) -> bytes:
    try:
        return connection.recv_bytes()
    except OSError as error:  # over TCP the end of the other side is not always orderly
        raise EOFError(str(error)) from error
