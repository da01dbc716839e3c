"""The source's end of a pair: packs what is ready, announces it, sends it when it hears GO. Pure.

A pull costs a slot only while one of its pieces is on its way: what still has to be computed holds nothing. An
operation is STAGING, STAGED, ANNOUNCED, LAUNCHED, and gone; one that was announced on a generation that failed or was
retired is STAGED again.
"""

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum, auto

from distserve.core.config import KvLayout
from distserve.core.errors import TransferError
from distserve.transfer.nccl.agreement import Arrived, Command, Event, MakeId, Moved, Named, Open, Pack, Packed, Send
from distserve.transfer.nccl.link import WINDOW, Link, Phase
from distserve.transfer.nccl.messages import Agree, Cancel, End, Go, Invite, Pull, Ready
from distserve.transfer.nccl.pieces import Piece, cell_bytes, cut
from distserve.transfer.nccl.room import Limits, Ring, Seats
from distserve.transfer.tcp_wire import Wanted

MAX_PULLS = 4096
"""Of one peer at a time."""
_FIRST_PAUSE, _LONGEST_PAUSE = 0.1, 5.0
"""Seconds between two generations, if the first could not be opened; doubled each time."""

LayersPassed = Callable[[int], int]
"""How many of the rank's layers have their KV of a step complete on the device."""


class _State(Enum):
    STAGING = auto()
    STAGED = auto()
    ANNOUNCED = auto()
    LAUNCHED = auto()


@dataclass(slots=True, eq=False)
class _Pull:
    number: int
    wanted: Wanted
    pieces: tuple[Piece, ...]
    deadline: float
    num_packed: int = 0
    num_sent: int = 0


@dataclass(slots=True, eq=False)
class _Op:
    op_id: int
    pull: _Pull | None
    """None once nobody wants it."""
    piece: int
    num_bytes: int
    slot: int
    state: _State = _State.STAGING
    deadline: float = 0.0


class Outbound(Link):
    """``layers_passed`` is looked at whenever an event comes in; it never goes back for a step."""

    def __init__(
        self, link_id: int, layout: KvLayout, ring: Ring, seats: Seats, limits: Limits, layers_passed: LayersPassed
    ) -> None:
        super().__init__(link_id, ring, seats, limits)
        self._layout = layout
        self._layers_passed = layers_passed
        self._pulls: dict[int, _Pull] = {}
        self._ops: dict[int, _Op] = {}
        self._num_ops = 0
        self._not_before = 0.0
        self._pause = _FIRST_PAUSE
        self._unique_id = b""

    @property
    def is_idle(self) -> bool:
        """No operation is there. Pulls may be: those that wait for a step hold no communicator."""
        return self.phase is Phase.OPEN and not self._ops

    @property
    def needs_seat(self) -> bool:
        """A piece is packed and cannot be announced."""
        return self.phase is Phase.CLOSED and not self.lost and self._has(_State.STAGED)

    @property
    def is_busy(self) -> bool:
        """A pull or an operation is there, or a communicator on its way in or out."""
        return bool(self._pulls or self._ops) or self.phase not in {Phase.CLOSED, Phase.OPEN}

    @property
    def _is_moving(self) -> bool:
        return self._has(_State.LAUNCHED)

    def layers_missing(self) -> int | None:
        """The fewest layers that any pull waits for; None if none waits for a layer."""
        missing = [
            self._last_layer(pull, pull.pieces[pull.num_packed]) - self._layers_passed(pull.wanted.ready_step)
            for pull in self._pulls.values()
            if pull.num_packed < len(pull.pieces) and pull.pieces[pull.num_packed].follows_step
        ]
        return max(min(missing), 0) if missing else None

    def _take(self, now: float, event: Event) -> None:
        match event:
            case Named(generation, unique_id):
                if generation == self.generation and self.phase is Phase.NAMING:
                    self.phase, self._phase_deadline = Phase.INVITING, now + self._limits.open_timeout
                    self._unique_id = unique_id
                    self._tell(Invite(generation, unique_id))
            case Arrived(Agree(generation)):
                if generation == self.generation and self.phase is Phase.INVITING:
                    self.phase, self._phase_deadline = Phase.OPENING, now + self._limits.open_timeout
                    self._do(Open(generation, self._unique_id, rank=0))
            case Arrived(Pull() as pull):
                self._begin(now, pull)
            case Arrived(Cancel(number)):
                self._drop(number)
            case Arrived(Go(generation, op_id)):
                self._go(now, generation, op_id)
            case Packed(op_id):
                self._packed(op_id)
            case Moved(generation, op_id):
                if generation == self.generation:
                    self._sent(op_id)

    def _opened(self) -> None:
        self._pause, self._not_before = _FIRST_PAUSE, 0.0

    def _begin(self, now: float, asked: Pull) -> None:
        wanted = asked.wanted
        try:
            if asked.number in self._pulls:
                raise TransferError(f"pull {asked.number} is under way already")  # noqa: TRY301
            if len(self._pulls) >= MAX_PULLS:
                raise TransferError(f"{MAX_PULLS} pulls from one peer are under way already")  # noqa: TRY301
            if asked.min_piece_bytes > self._limits.min_piece_bytes:
                raise TransferError(  # noqa: TRY301
                    f"pieces of {self._limits.min_piece_bytes} bytes there, {asked.min_piece_bytes} here"
                )
        except TransferError as error:
            self._tell(End(asked.number, str(error)))
            return
        cell = cell_bytes(self._layout, wanted.heads)
        pieces = cut(
            wanted.num_ready_blocks, len(wanted.blocks), len(wanted.layers), cell, asked.min_piece_bytes
        )  # fmt: skip
        deadline = now + asked.seconds_left + self._limits.grace
        if pieces:
            self._pulls[asked.number] = _Pull(asked.number, wanted, pieces, deadline)

    def _packed(self, op_id: int) -> None:
        op = self._ops[op_id]
        op.state = _State.STAGED
        if op.pull is None:
            self._free(op)

    def _go(self, now: float, generation: int, op_id: int) -> None:
        if generation != self.generation or self.phase is not Phase.OPEN:
            return
        op = self._ops.get(op_id)
        if op is None or op.state is not _State.ANNOUNCED:
            self._give_up(now, f"GO for operation {op_id}, which was not announced")
            return
        op.state, op.deadline = _State.LAUNCHED, now + self._limits.transfer_timeout
        self._do(Send(generation, op_id, op.slot, op.num_bytes))
        self._used()

    def _sent(self, op_id: int) -> None:
        # Gone if its generation was given up meanwhile.
        if (op := self._ops.get(op_id)) is None or op.state is not _State.LAUNCHED:
            return
        self._free(op)
        if op.pull is not None:
            op.pull.num_sent += 1
            if op.pull.num_sent == len(op.pull.pieces):
                del self._pulls[op.pull.number]

    def _drop(self, number: int) -> None:
        """Nobody wants the pull any more; what is launched of it goes on."""
        if (pull := self._pulls.pop(number, None)) is None:
            return
        for op in tuple(self._ops.values()):
            if op.pull is pull:
                op.pull = None
                if op.state in {_State.STAGED, _State.ANNOUNCED}:
                    self._free(op)

    def _look_at_clock(self, now: float) -> None:
        if any(op.state is _State.LAUNCHED and now > op.deadline for op in self._ops.values()):
            self._give_up(now, f"a send did not end within {self._limits.transfer_timeout:g} s")
        for pull in tuple(self._pulls.values()):
            if now > pull.deadline:
                # A GO that comes nevertheless, for what was announced, ends the generation.
                self._end(pull, "deadline passed at the source")

    def _end(self, pull: _Pull, reason: str) -> None:
        self._tell(End(pull.number, reason))
        self._drop(pull.number)

    def _advance(self, now: float) -> None:
        self._pack()
        if self.needs_seat and now >= self._not_before:
            generation = self.generation + 1
            if self._take_seat(generation, Phase.NAMING, now + self._limits.open_timeout):
                self._do(MakeId(generation))
        if self.phase is Phase.OPEN:
            for op in self._ops.values():
                if op.state is _State.STAGED:
                    assert op.pull is not None
                    op.state = _State.ANNOUNCED
                    self._tell(Ready(self.generation, op.op_id, op.pull.number, op.piece, op.num_bytes))

    def _pack(self) -> None:
        for pull in self._pulls.values():
            while pull.num_packed < len(pull.pieces):
                piece = pull.pieces[pull.num_packed]
                if piece.follows_step and self._layers_passed(pull.wanted.ready_step) < self._last_layer(pull, piece):
                    break
                if len(self._ops) >= WINDOW or (slot := self._ring.take()) is None:
                    return
                self._num_ops += 1
                self._ops[self._num_ops] = _Op(self._num_ops, pull, pull.num_packed, piece.num_bytes, slot)
                pull.num_packed += 1
                self._do(Pack(self._num_ops, slot, pull.wanted, piece))

    @staticmethod
    def _last_layer(pull: _Pull, piece: Piece) -> int:
        return pull.wanted.layers.start + piece.layers.stop

    def _generation_failed(self, reason: str) -> None:
        failed = []
        for op in tuple(self._ops.values()):
            if op.state is _State.LAUNCHED:
                self._condemn(op.slot)
                del self._ops[op.op_id]
                if op.pull is not None:
                    failed.append(op.pull)
        self._withdraw()
        for pull in failed:
            if pull.number in self._pulls:
                self._end(pull, reason)

    def _give_up(self, now: float, reason: str, *, tell: bool = True) -> None:
        if self.phase in {Phase.NAMING, Phase.INVITING, Phase.OPENING}:
            self._not_before, self._pause = now + self._pause, min(2 * self._pause, _LONGEST_PAUSE)
        super()._give_up(now, reason, tell=tell)

    def _generation_retired(self) -> None:
        self._withdraw()

    def _withdraw(self) -> None:
        for op in self._ops.values():
            if op.state is _State.ANNOUNCED:
                op.state = _State.STAGED

    def _peer_gone(self, reason: str) -> None:  # noqa: ARG002  # nobody is there to tell
        for number in tuple(self._pulls):
            self._drop(number)

    def _has(self, state: _State) -> bool:
        return any(op.state is state for op in self._ops.values())

    def _free(self, op: _Op) -> None:
        del self._ops[op.op_id]
        self._ring.give(op.slot)

    def _do(self, command: Command) -> None:
        self._commands.append(command)
