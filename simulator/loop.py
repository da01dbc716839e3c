"""The event loop: what is to happen, as (time, sequence number, part, event), drives the core's machines.

Ties go in the order of their making, so a run is a pure function of its inputs. Most of it are messages; those that
take the usual time wait in the order they were sent, everything else on a heap. The loop holds no policy: it executes
commands the way a cluster does, with delays in place of work. An engine runs its steps one after the other (see
:mod:`simulator.engine`); a message takes ``Delays.message``; how long a pull takes, :mod:`simulator.pulls` says.
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from heapq import heappop, heappush
from typing import Final, Protocol, cast

from distserve.core.commands import (
    CancelMigrate,
    CloseSequence,
    Command,
    Migrate,
    OpenSequence,
    RunStep,
    Send,
    WakeAt,
)
from distserve.core.events import Event, InstanceLost, Machine, Migrated, Received, Timer
from distserve.core.messages import Message
from distserve.core.scheduler import ROUTER, InstanceScheduler
from simulator.engine import Engine, StretchPoint
from simulator.model import Delays
from simulator.pulls import Pulls

_TIMER: Final = Timer()
_NEVER: Final = float("inf")


@dataclass(frozen=True, slots=True)
class TraceEntry:
    """One turn of one machine."""

    time: float
    part: str
    event: Event
    commands: tuple[Command, ...]


class Observer(Protocol):
    """Sees what leaves the system, and every turn."""

    def on_turn(self, entry: TraceEntry) -> None:
        """A machine took an event."""


@dataclass(slots=True, eq=False)
class Part:
    """A machine on the loop; instances have an engine, and steps of theirs may be jumped over if it is a ``jumper``."""

    name: str
    machine: Machine
    engine: Engine | None = None
    jumper: InstanceScheduler | None = None
    is_alive: bool = True
    launched: tuple[float, Event] | None = None
    """A step of this turn whose end is not on the heap yet."""


class Loop:
    """Runs parts by name until nothing is left to happen, a time is reached or it is told to stop."""

    def __init__(self, delays: Delays, observer: Observer | None = None, pulls: Pulls | None = None) -> None:
        self.now = 0.0
        self.num_events = 0
        self.is_stopped = False
        self._delay, self._pairs, self._loss_delay = delays.message, delays.pairs, delays.loss
        self._observer = observer
        self._parts: dict[str, Part] = {}
        self._heap: list[tuple[float, int, Part, Event | StretchPoint]] = []
        self._mail: deque[tuple[float, int, Part, Received]] = deque()
        """Messages under way that take the usual delay: the earliest is the first."""
        self._count = 0
        self._pulls = pulls or Pulls(delays)
        self._pull_time = _NEVER
        """When pulls will be looked at next."""
        self._pull_number = 0

    def add(self, name: str, machine: Machine, engine: Engine | None = None, *, may_jump: bool = False) -> None:
        """Add a part; like every driver, the loop feeds it one Timer first."""
        jumper = machine if may_jump and isinstance(machine, InstanceScheduler) else None
        self._parts[name] = part = Part(name, machine, engine, jumper)
        self._push(self.now, part, Timer())

    def post(self, time: float, part: str, event: Event) -> None:
        """Let ``event`` happen to ``part`` at ``time`` (seconds), if it is there by now and still is then."""
        found = self._parts.get(part)
        if found is not None:
            self._push(time, found, event)

    def _push(self, time: float, part: Part, event: Event | StretchPoint) -> None:
        self._count += 1
        heappush(self._heap, (time, self._count, part, event))

    def lose(self, name: str) -> float:
        """The instance dies now; returns when the router hears of it (seconds).

        What it would do or receive vanishes, and pulls from it fail.
        """
        part = self._parts.pop(name)
        assert part.engine is not None
        if part.jumper is not None and part.engine.stretch is not None:
            part.engine.settle(self.now, part.jumper)
        part.engine.worker.die()
        part.is_alive = False
        noticed_at = self.now + self._loss_delay
        self.post(noticed_at, ROUTER, InstanceLost(name))
        for puller, pull_id in self._pulls.lose(self.now, name):
            self.post(self.now, puller, Migrated(pull_id, ok=False, reason=f"{name} died"))
        self._await_pulls()
        return noticed_at

    def stop(self) -> None:
        """Handle nothing more in this run."""
        self.is_stopped = True

    def run(self, until: float = _NEVER) -> None:
        """Handle events in order up to and including time ``until``."""
        heap, mail = self._heap, self._mail
        while not self.is_stopped:
            time, number = self._pull_time, self._pull_number
            is_heap = bool(heap) and _is_before(heap[0][0], heap[0][1], time, number)
            if is_heap:
                time, number = heap[0][0], heap[0][1]
            is_mail = bool(mail) and _is_before(mail[0][0], mail[0][1], time, number)
            if is_mail:
                time = mail[0][0]
            if time > until or time == _NEVER:
                return
            self.now = time
            if is_mail:
                _, _, part, received = mail.popleft()
                if part.is_alive:
                    self._turn(part, received)
            elif is_heap:
                _, _, part, event = heappop(heap)
                if part.is_alive and self._still_holds(part, event):
                    self._turn(part, event)
            else:
                self._on_pull_time()

    def _turn(self, part: Part, event: Event | StretchPoint) -> None:
        now, engine, jumper = self.now, part.engine, part.jumper
        if engine is not None and jumper is not None:
            stretch = engine.stretch
            if type(event) is StretchPoint:
                if stretch is None or event.number != stretch.number:
                    return
                if len(stretch.ends) < stretch.num_steps:
                    self._push(engine.extend(), part, event)
                    return
                engine.settle(now, jumper)
                event = engine.end_stretch()
            elif stretch is not None:
                engine.settle(now, jumper)
        self.num_events += 1
        commands = part.machine.handle(now, cast("Event", event))
        if self._observer is not None:
            self._observer.on_turn(TraceEntry(now, part.name, cast("Event", event), tuple(commands)))
        if commands:
            self._execute(part, commands)
        if engine is not None and jumper is not None:
            self._look_ahead(part, engine, jumper)

    def _look_ahead(self, part: Part, engine: Engine, scheduler: InstanceScheduler) -> None:
        """Begin a stretch with the step just launched, or see whether the one under way is still what will happen."""
        if part.launched is not None:
            end, event = part.launched
            part.launched = None
            num_more = scheduler.steady_steps()
            if num_more == 0:
                self._push(end, part, event)
            else:
                reached, point = engine.begin_stretch(num_more, end, event)
                self._push(reached, part, point)
        elif engine.stretch is not None:
            shorter = engine.cut(scheduler.steady_steps())
            if shorter is not None:
                self._push(shorter[0], part, shorter[1])

    def _execute(self, part: Part, commands: Sequence[Command]) -> None:
        now, engine = self.now, part.engine
        for command in commands:
            # Records have no subclasses, and isinstance() asks a struct's class for what its type says at once.
            if type(command) is Send:
                receiver = self._parts.get(command.to)
                if receiver is not None:
                    self._deliver(now, part.name, receiver, command.message)
            elif type(command) is WakeAt:
                time = command.time
                self._push(time if time > now else now, part, _TIMER)  # noqa: FURB136 -- half the time of max()
            elif type(command) is RunStep:
                assert engine is not None
                launched = engine.launch(now, command)
                if part.jumper is not None:
                    part.launched = launched
                else:
                    self._push(launched[0], part, launched[1])
            elif type(command) is OpenSequence:
                assert engine is not None
                engine.worker.open(command)
            elif type(command) is CloseSequence:
                assert engine is not None
                engine.worker.close(command)
            elif type(command) is Migrate:
                self._migrate(part, command)
            elif type(command) is CancelMigrate:
                self._cancel(part, command.pull_id)
            # What is left leaves the system: the observer has seen it.

    def _deliver(self, now: float, sender: str, receiver: Part, message: Message) -> None:
        received = Received(sender, message)
        if self._pairs:
            delay = self._pairs.get((sender, receiver.name))
            if delay is not None:
                self._push(now + delay, receiver, received)
                return
        self._count += 1
        self._mail.append((now + self._delay, self._count, receiver, received))

    # -- pulls --------------------------------------------------------------------------------------------------------

    def _migrate(self, part: Part, pull: Migrate) -> None:
        source = self._parts.get(pull.source_id)
        if source is None:
            self._push(self.now, part, Migrated(pull.pull_id, ok=False, reason=f"{pull.source_id} is gone"))
            return
        assert source.engine is not None
        end = self._pulls.start(self.now, part.name, pull, source.engine)
        if end is not None:
            self._push(end, part, Migrated(pull.pull_id, ok=True))
        else:
            self._await_pulls()

    def _cancel(self, part: Part, pull_id: int) -> None:
        if self._pulls.cancel(self.now, part.name, pull_id):
            self._push(self.now, part, Migrated(pull_id, ok=False, reason="cancelled"))
            self._await_pulls()

    def _still_holds(self, part: Part, event: Event | StretchPoint) -> bool:
        """Whether an event is not the end of a pull that was given up meanwhile."""
        return type(event) is not Migrated or not event.ok or self._pulls.end(self.now, part.name, event.pull_id)

    def _await_pulls(self) -> None:
        """Look at pulls when something happens to one next; to look early does no harm."""
        time = self._pulls.next_time
        if time < self._pull_time:
            self._count += 1
            self._pull_time, self._pull_number = time, self._count

    def _on_pull_time(self) -> None:
        self._pull_time = _NEVER
        for puller, event in self._pulls.advance(self.now):
            part = self._parts.get(puller)
            if part is not None:
                self._turn(part, event)
        self._await_pulls()


def _is_before(time: float, number: int, other: float, other_number: int) -> bool:
    return time < other or (time == other and number < other_number)
