"""The destination's end of a pair: asks, reserves a slot, says GO, unpacks what has arrived. Pure.

A pull ends as soon as no unpack of it is under way: what NCCL still delivers for it ends in a slot and goes no further.
"""

from collections import deque
from dataclasses import dataclass

from distserve.transfer.nccl.agreement import (
    Arrived,
    Begin,
    Ended,
    Event,
    Moved,
    Open,
    Receive,
    Stop,
    Unpack,
    Unpacked,
)
from distserve.transfer.nccl.link import WINDOW, Link, Phase
from distserve.transfer.nccl.messages import Agree, Cancel, End, Go, Invite, Pull, Ready
from distserve.transfer.nccl.pieces import Piece
from distserve.transfer.nccl.room import Limits, Ring, Seats


@dataclass(slots=True, eq=False)
class _Pull:
    number: int
    pieces: tuple[Piece, ...]
    deadline: float
    missing: set[int]
    """Pieces that are not announced, on their way or in their blocks."""
    num_unpacked: int = 0
    num_unpacking: int = 0
    failure: str = ""


@dataclass(slots=True, eq=False)
class _Op:
    ready: Ready
    slot: int
    deadline: float
    is_moving: bool = True
    """On its way; else it is being unpacked."""


class Inbound(Link):
    """See the module."""

    def __init__(self, link_id: int, ring: Ring, seats: Seats, limits: Limits) -> None:
        super().__init__(link_id, ring, seats, limits)
        self._pulls: dict[int, _Pull] = {}
        self._invitation: Invite | None = None
        self._announced: deque[Ready] = deque()
        self._ops: dict[int, _Op] = {}

    @property
    def is_idle(self) -> bool:
        """Nothing was announced, and nothing is on its way. What is being unpacked needs no communicator."""
        return self.phase is Phase.OPEN and not self._announced and not self._is_moving

    @property
    def needs_seat(self) -> bool:
        """There is an invitation."""
        return self.phase is Phase.CLOSED and not self.lost and self._invitation is not None

    @property
    def is_busy(self) -> bool:
        """A pull or an operation is there, or a communicator on its way in or out."""
        return bool(self._pulls or self._ops or self._invitation) or self.phase not in {Phase.CLOSED, Phase.OPEN}

    @property
    def _is_moving(self) -> bool:
        return any(op.is_moving for op in self._ops.values())

    def _take(self, now: float, event: Event) -> None:
        match event:
            case Begin():
                self._begin(now, event)
            case Stop(number, reason):
                if (pull := self._pulls.get(number)) is not None:
                    self._fail(pull, reason)
            case Arrived(Invite() as invitation):
                if invitation.generation > self.generation:
                    # The other end has no earlier one any more, whether or not that was heard of.
                    self._give_up(now, "the other end opens another generation", tell=False)
                    self._invitation = invitation
            case Arrived(Ready() as ready):
                self._ready(now, ready)
            case Arrived(End(number, reason)):
                if (pull := self._pulls.get(number)) is not None:
                    self._fail(pull, reason, tell=False)
            case Moved(generation, op_id):
                if generation == self.generation:
                    self._received(op_id)
            case Unpacked(op_id):
                self._unpacked(now, op_id)

    def _begin(self, now: float, begin: Begin) -> None:
        assert begin.number not in self._pulls
        missing = set(range(len(begin.pieces)))
        pull = self._pulls[begin.number] = _Pull(begin.number, begin.pieces, begin.deadline, missing)
        if self.lost:
            self._fail(pull, self.lost)
        elif now > begin.deadline:
            self._fail(pull, "deadline passed", tell=False)
        elif not begin.pieces:
            self._finish(pull)
        else:
            left = begin.deadline - now
            self._tell(Pull(begin.number, left, self._limits.min_piece_bytes, begin.wanted))

    def _ready(self, now: float, ready: Ready) -> None:
        if ready.generation != self.generation or self.phase not in {Phase.OPENING, Phase.OPEN}:
            return
        # Of a pull that has ended: the other end learns so from a CANCEL that is on its way.
        if (pull := self._pulls.get(ready.number)) is None or pull.failure:
            return
        fits = ready.piece in pull.missing and ready.num_bytes == pull.pieces[ready.piece].num_bytes
        if not fits or ready.op_id in self._ops:
            self._give_up(now, f"READY for {ready.num_bytes} bytes of piece {ready.piece} is not what was asked for")
            return
        pull.missing.remove(ready.piece)
        self._announced.append(ready)

    def _received(self, op_id: int) -> None:
        # Gone if its generation was given up meanwhile.
        if (op := self._ops.get(op_id)) is None or not op.is_moving:
            return
        pull = self._pulls.get(op.ready.number)
        if pull is None or pull.failure:
            self._free(op)
            return
        op.is_moving = False
        pull.num_unpacking += 1
        self._commands.append(Unpack(op_id, op.slot, pull.number, pull.pieces[op.ready.piece]))

    def _unpacked(self, now: float, op_id: int) -> None:
        op = self._ops[op_id]
        self._free(op)
        pull = self._pulls[op.ready.number]
        pull.num_unpacking -= 1
        pull.num_unpacked += 1
        # Bytes count only if the deadline had not passed when they were in their blocks.
        if now > pull.deadline:
            self._fail(pull, "deadline passed")
        elif pull.failure or pull.num_unpacked == len(pull.pieces):
            self._finish(pull)

    def _look_at_clock(self, now: float) -> None:
        if any(op.is_moving and now > op.deadline for op in self._ops.values()):
            self._give_up(now, f"a receive did not end within {self._limits.transfer_timeout:g} s")
        for pull in tuple(self._pulls.values()):
            if now > pull.deadline and not pull.failure:
                because = f"; before that: {self.last_failure}" if self.last_failure else ""
                self._fail(pull, f"deadline passed{because}")

    def _fail(self, pull: _Pull, reason: str, *, tell: bool = True) -> None:
        if pull.failure:
            if pull.num_unpacking == 0:
                self._finish(pull)
            return
        pull.failure = reason
        self._announced = deque(ready for ready in self._announced if ready.number != pull.number)
        if tell:
            self._tell(Cancel(pull.number))
        self._finish(pull)

    def _finish(self, pull: _Pull) -> None:
        """Report the pull, unless its blocks are still being written."""
        if pull.num_unpacking:
            return
        del self._pulls[pull.number]
        num_bytes = 0 if pull.failure else sum(piece.num_bytes for piece in pull.pieces)
        self._commands.append(Ended(pull.number, pull.failure, num_bytes))

    def _advance(self, now: float) -> None:
        if self._invitation is not None and self.phase is Phase.CLOSED:
            generation, unique_id = self._invitation.generation, self._invitation.unique_id
            if self._take_seat(generation, Phase.OPENING, now + self._limits.open_timeout):
                self._invitation = None
                self._tell(Agree(generation))
                self._commands.append(Open(generation, unique_id, rank=1))
        while self.phase is Phase.OPEN and self._announced and len(self._ops) < WINDOW:
            if (slot := self._ring.take()) is None:
                return
            ready = self._announced.popleft()
            self._ops[ready.op_id] = _Op(ready, slot, now + self._limits.transfer_timeout)
            self._tell(Go(self.generation, ready.op_id))
            self._commands.append(Receive(self.generation, ready.op_id, slot, ready.num_bytes))
            self._used()

    def _generation_failed(self, reason: str) -> None:
        self._generation_retired()
        for op in tuple(self._ops.values()):
            if op.is_moving:
                self._condemn(op.slot)
                del self._ops[op.ready.op_id]
                if (pull := self._pulls.get(op.ready.number)) is not None:
                    self._fail(pull, reason)

    def _generation_retired(self) -> None:
        # The other end announces them again.
        for ready in self._announced:
            if (pull := self._pulls.get(ready.number)) is not None:
                pull.missing.add(ready.piece)
        self._announced.clear()

    def _heard_retire(self, now: float, generation: int) -> None:
        if self._invitation is not None and self._invitation.generation == generation:
            self._invitation = None
        else:
            super()._heard_retire(now, generation)

    def _heard_give_up(self, now: float, generation: int, reason: str) -> None:
        if self._invitation is not None and self._invitation.generation == generation:
            self._invitation = None
        else:
            super()._heard_give_up(now, generation, reason)

    def _peer_gone(self, reason: str) -> None:
        self._invitation = None
        for pull in tuple(self._pulls.values()):
            self._fail(pull, reason)

    def _free(self, op: _Op) -> None:
        del self._ops[op.ready.op_id]
        self._ring.give(op.slot)
