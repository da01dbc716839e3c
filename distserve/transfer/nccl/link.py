"""One end of a pair: its communicators, one generation after the other. Pure.

::

    source:  CLOSED -> NAMING -> INVITING -> OPENING -> OPEN [-> RETIRING] -> CLOSING -> CLOSED
    sink:    CLOSED ------------------------> OPENING -> OPEN [-> RETIRING] -> CLOSING -> CLOSED

- The source names a generation, invites the sink, and makes the communicator when the sink agrees; the sink makes it as
  it agrees. Both ends need a seat for it before they do anything, and keep the seat until it is torn down.
- Up to OPENING nothing can be interrupted: what takes too long is abandoned, and the next generation may begin. An open
  communicator is aborted when an operation on it fails or takes too long, or when the other end says GIVE_UP; the next
  generation begins when it is torn down, or when that takes too long as well.
- An open communicator without operations may be retired by either end: it says RETIRE, launches nothing more, and the
  other end says RETIRE when it has seen the end of all that it launched. Both have said and heard it before they
  destroy it. A source that has said READY and hears RETIRE in place of GO says READY again in the next generation.
"""

from abc import ABC, abstractmethod
from enum import Enum, auto
from math import inf

from distserve.transfer.nccl.agreement import (
    Abandon,
    Abort,
    Arrived,
    Broken,
    Command,
    Destroy,
    Event,
    Evict,
    Lost,
    Named,
    Opened,
    Tell,
    TornDown,
)
from distserve.transfer.nccl.messages import GiveUp, Retire
from distserve.transfer.nccl.room import Limits, Ring, Seat, Seats

WINDOW = 2
"""Operations of a link at a time: one is packed or unpacked while the other is on its way."""


class Phase(Enum):
    """Where the newest generation is."""

    CLOSED = auto()
    NAMING = auto()
    INVITING = auto()
    OPENING = auto()
    OPEN = auto()
    RETIRING = auto()
    CLOSING = auto()


class Link(ABC):
    """What source and sink have in common. ``ring`` and ``seats`` are the rank's, shared with its other links."""

    def __init__(self, link_id: int, ring: Ring, seats: Seats, limits: Limits) -> None:
        self.link_id = link_id
        self.phase = Phase.CLOSED
        self.generation = 0
        self.lost = ""
        """Why there is no other end any more; empty while there is."""
        self.last_failure = ""
        """Why the last generation that failed did."""
        self._ring = ring
        self._seats = seats
        self._limits = limits
        self._commands: list[Command] = []
        self._phase_deadline = inf
        self._first_use = -inf
        self._has_told_retire = self._has_heard_retire = False
        # Slots of operations that were launched and have not ended, by generation, until that is torn down.
        self._condemned: dict[int, list[int]] = {}

    def handle(self, now: float, event: Event) -> list[Command]:
        """Take an event in and say what to do. ``now`` never decreases."""
        match event:
            case Lost(reason):
                self._lose(now, reason)
            case Evict():
                if self.may_make_way(now):
                    self._tell_retire()
                    self._retire(now)
            case Opened(generation):
                if generation == self.generation and self.phase is Phase.OPENING:
                    self.phase, self._phase_deadline = Phase.OPEN, inf
                    self._first_use = now + self._limits.grace
                    self._opened()
                    if self._has_heard_retire:
                        self._retire(now)
            case Broken(generation, reason):
                if generation == self.generation:
                    self._give_up(now, reason)
            case TornDown(generation):
                self._torn_down(generation)
            case Arrived(GiveUp(generation, reason)):
                self._heard_give_up(now, generation, reason)
            case Arrived(Retire(generation)):
                self._heard_retire(now, generation)
            case _ if not self.lost or not isinstance(event, (Arrived, Named)):
                self._take(now, event)
        if now > self._phase_deadline:
            self._overdue(now)
        self._look_at_clock(now)
        if self.phase is Phase.RETIRING and self._has_heard_retire and not self._is_moving:
            if not self._has_told_retire:
                self._tell_retire()
            self._destroy(now)
        if not self.lost:
            self._advance(now)
        commands, self._commands = self._commands, []
        return commands

    @property
    @abstractmethod
    def is_idle(self) -> bool:
        """Whether the communicator is open and nothing is, or is about to be, on its way."""

    def may_make_way(self, now: float) -> bool:
        """Whether the communicator is idle, and was of use or given the time for it.

        Else two pairs could take the seat from each other for ever, each before its first READY has arrived.
        """
        return self.is_idle and now >= self._first_use

    @property
    @abstractmethod
    def needs_seat(self) -> bool:
        """Whether something waits for a communicator that there is no seat for."""

    @property
    @abstractmethod
    def is_busy(self) -> bool:
        """Whether anything is going on that time or the outside may change."""

    @property
    def is_finished(self) -> bool:
        """Whether the link is lost and has nothing left of the rank's."""
        return bool(self.lost) and not self.is_busy and not self._holds_seats

    @property
    @abstractmethod
    def _is_moving(self) -> bool:
        """Whether an operation is launched and has not ended."""

    @property
    def _holds_seats(self) -> bool:
        return any(seat.link_id == self.link_id for seat in self._seats.by_use)

    @abstractmethod
    def _take(self, now: float, event: Event) -> None:
        """An event that is not the communicator's."""

    @abstractmethod
    def _look_at_clock(self, now: float) -> None:
        """End what is past its deadline."""

    @abstractmethod
    def _advance(self, now: float) -> None:
        """Begin what can begin."""

    @abstractmethod
    def _generation_failed(self, reason: str) -> None:
        """Nothing more happens on the generation; operations that were launched are condemned, with their pulls."""

    @abstractmethod
    def _generation_retired(self) -> None:
        """The generation ends unused; what waited to be launched on it must wait for the next."""

    @abstractmethod
    def _peer_gone(self, reason: str) -> None:
        """There is no other end any more."""

    def _opened(self) -> None:
        """A generation can be used."""

    def _tell(self, message: object) -> None:
        if not self.lost:
            self._commands.append(Tell(message))  # type: ignore[arg-type]

    def _take_seat(self, generation: int, phase: Phase, deadline: float) -> bool:
        assert self.phase is Phase.CLOSED
        assert generation > self.generation
        if not self._seats.take(Seat(self.link_id, generation)):
            return False
        self.generation, self.phase, self._phase_deadline = generation, phase, deadline
        self._has_told_retire = self._has_heard_retire = False
        return True

    def _used(self) -> None:
        self._first_use = -inf
        seat = Seat(self.link_id, self.generation)
        if seat in self._seats:
            self._seats.use(seat)

    def _give_up(self, now: float, reason: str, *, tell: bool = True) -> None:
        """Fail the newest generation, unless it has ended."""
        if self.phase in {Phase.CLOSED, Phase.CLOSING}:
            return
        self.last_failure = reason
        if tell:
            self._tell(GiveUp(self.generation, reason))
        if self.phase in {Phase.OPEN, Phase.RETIRING}:
            self._commands.append(Abort(self.generation))
            self.phase, self._phase_deadline = Phase.CLOSING, now + self._limits.close_timeout
        else:
            self._commands.append(Abandon(self.generation))
            self.phase, self._phase_deadline = Phase.CLOSED, inf
        self._generation_failed(reason)

    def _tell_retire(self) -> None:
        self._tell(Retire(self.generation))
        self._has_told_retire = True

    def _retire(self, now: float) -> None:
        self.phase, self._phase_deadline = Phase.RETIRING, now + self._limits.close_timeout
        self._generation_retired()

    def _destroy(self, now: float) -> None:
        self._commands.append(Destroy(self.generation))
        self.phase, self._phase_deadline = Phase.CLOSING, now + self._limits.close_timeout

    def _overdue(self, now: float) -> None:
        """The phase takes too long."""
        if self.phase is Phase.CLOSING:
            # It keeps its seat; the pair goes on without it.
            self.phase, self._phase_deadline = Phase.CLOSED, inf
        elif self.phase is Phase.RETIRING:
            self._give_up(now, f"RETIRE was not answered within {self._limits.close_timeout:g} s")
        else:
            waited = f"{self._limits.open_timeout:g} s"
            self._give_up(now, f"no communicator within {waited} ({self.phase.name.lower()})")

    def _torn_down(self, generation: int) -> None:
        self._seats.leave(Seat(self.link_id, generation))
        for slot in self._condemned.pop(generation, ()):
            self._ring.give(slot)
        if generation == self.generation and self.phase is Phase.CLOSING:
            self.phase, self._phase_deadline = Phase.CLOSED, inf

    def _condemn(self, slot: int) -> None:
        """NCCL may still use the slot, until the generation is torn down."""
        self._condemned.setdefault(self.generation, []).append(slot)

    def _heard_give_up(self, now: float, generation: int, reason: str) -> None:
        if generation == self.generation:
            self._give_up(now, f"the other end gave up: {reason}", tell=False)

    def _heard_retire(self, now: float, generation: int) -> None:
        if generation != self.generation:
            return
        self._has_heard_retire = True
        if self.phase is Phase.OPEN:
            self._retire(now)

    def _lose(self, now: float, reason: str) -> None:
        if self.lost:
            return
        self.lost = reason
        self._give_up(now, reason, tell=False)
        self._peer_gone(reason)
