"""The event loop: a heap of (time, sequence number, part, event) that drives the core's machines.

Ties go in the order of their making, so a run is a pure function of its inputs. The loop holds no policy: it executes
commands the way a cluster does, with delays in place of work. An engine runs its steps one after the other; a message
takes ``message_delay``; a pull takes its bytes' time on an uncontended link and ends no sooner than the step that
completes its source's KV.
"""

import heapq
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from distserve.core.commands import (
    CancelMigrate,
    CloseSequence,
    Command,
    Conclude,
    Deliver,
    Migrate,
    OpenSequence,
    RunStep,
    Send,
    WakeAt,
)
from distserve.core.events import Event, InstanceLost, Machine, Migrated, Received, Timer
from distserve.core.latency import StepTime
from distserve.core.scheduler import ROUTER
from simulator.model import Delays
from simulator.worker import SimulatedWorker


@dataclass(slots=True)
class SimulatedInstance:
    """One instance's engine: its worker, how long steps take, and when each step under way ends."""

    worker: SimulatedWorker
    step_time: StepTime
    free_at: float = 0.0
    step_ends: dict[int, float] = field(default_factory=dict)


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


class Loop:
    """Runs parts by name until nothing is left to happen or a time is reached."""

    def __init__(self, delays: Delays, observer: Observer | None = None) -> None:
        self.now = 0.0
        self._delays = delays
        self._observer = observer
        self._machines: dict[str, Machine] = {}
        self._instances: dict[str, SimulatedInstance] = {}
        self._heap: list[tuple[float, int, str, Event]] = []
        self._count = 0
        self._pulls: dict[tuple[str, int], Migrate] = {}

    def add(self, name: str, machine: Machine, instance: SimulatedInstance | None = None) -> None:
        """Add a part; like every driver, the loop feeds it one Timer first."""
        self._machines[name] = machine
        if instance is not None:
            self._instances[name] = instance
        self.post(self.now, name, Timer())

    def post(self, time: float, part: str, event: Event) -> None:
        """Let ``event`` happen to ``part`` at ``time`` (seconds)."""
        heapq.heappush(self._heap, (time, self._count, part, event))
        self._count += 1

    def lose(self, name: str) -> None:
        """The instance dies now.

        What it would do or receive vanishes, pulls from it fail, and the router hears of it later.
        """
        del self._machines[name]
        del self._instances[name]
        self.post(self.now + self._delays.loss, ROUTER, InstanceLost(name))
        for (part, pull_id), pull in list(self._pulls.items()):
            if part == name:
                del self._pulls[part, pull_id]
            elif pull.source_id == name:
                del self._pulls[part, pull_id]
                self.post(self.now, part, Migrated(pull_id, ok=False, reason=f"{name} died"))

    def run(self, until: float = float("inf")) -> None:
        """Handle events in order up to and including time ``until``."""
        while self._heap and self._heap[0][0] <= until:
            self.now, _, part, event = heapq.heappop(self._heap)
            machine = self._machines.get(part)
            if machine is None:
                continue
            if isinstance(event, Migrated) and event.ok and self._pulls.pop((part, event.pull_id), None) is None:
                continue  # cancelled or failed meanwhile
            commands = machine.handle(self.now, event)
            if self._observer is not None:
                self._observer.on_turn(TraceEntry(self.now, part, event, tuple(commands)))
            self._execute(part, commands)

    def _execute(self, part: str, commands: Sequence[Command]) -> None:
        for command in commands:
            match command:
                case RunStep():
                    self._run_step(part, command)
                case Send(to, message):
                    delay = self._delays.pairs.get((part, to), self._delays.message)
                    self.post(self.now + delay, to, Received(part, message))
                case WakeAt(time):
                    self.post(max(time, self.now), part, Timer())
                case OpenSequence():
                    self._instances[part].worker.open(command)
                case CloseSequence():
                    self._instances[part].worker.close(command)
                case Migrate():
                    self._migrate(part, command)
                case CancelMigrate(pull_id):
                    if self._pulls.pop((part, pull_id), None) is not None:
                        self.post(self.now, part, Migrated(pull_id, ok=False, reason="cancelled"))
                case Deliver() | Conclude():
                    pass  # leaves the system: the observer has seen it

    def _run_step(self, part: str, step: RunStep) -> None:
        instance = self._instances[part]
        shape, done = instance.worker.run(step)
        start = max(self.now, instance.free_at)
        instance.free_at = start + instance.step_time.seconds(shape)
        instance.step_ends = {number: end for number, end in instance.step_ends.items() if end > self.now}
        instance.step_ends[step.step_id] = instance.free_at
        self.post(instance.free_at, part, done)

    def _migrate(self, part: str, pull: Migrate) -> None:
        source = self._instances.get(pull.source_id)
        if source is None:
            self.post(self.now, part, Migrated(pull.pull_id, ok=False, reason=f"{pull.source_id} is gone"))
            return
        self._pulls[part, pull.pull_id] = pull
        num_late = len(pull.src_blocks) - pull.num_ready_blocks
        early = self.now + self._delays.pull_latency + pull.num_ready_blocks * self._delays.seconds_per_block
        ready = max(early, source.step_ends.get(pull.ready_step, 0.0))
        self.post(ready + num_late * self._delays.seconds_per_block, part, Migrated(pull.pull_id, ok=True))
