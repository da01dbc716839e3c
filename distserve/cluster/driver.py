"""The one driver of every state machine in a cluster: feeds it events, executes what it commands.

A driver is a monitor without threads of its own. Whichever thread has an event feeds it, and the machine's commands
are executed, in order, before that call returns: the engine thread that ends a step feeds ``StepDone`` and finds the
next ``RunStep`` in its own queue, with no thread switch between.

What a command touches is behind the small ports below. None of them may block, nor feed the driver from within its own
call. With other ports the same driver runs single-threaded on a virtual clock, which is how a simulation and the
cluster are shown to give identical commands.
"""

import threading
from collections.abc import Callable
from typing import Protocol, assert_never

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
from distserve.core.events import Event, Machine, Timer
from distserve.core.messages import Message

Clock = Callable[[], float]
"""Seconds on the cluster's clock; never decreasing within a process."""

EngineCommand = OpenSequence | CloseSequence | RunStep


class Network(Protocol):
    """Carries messages to other parts."""

    def send(self, to: str, message: Message) -> None:
        """Send, or drop if the receiver is gone or its queue is full."""
        ...


class Timers(Protocol):
    """Feeds the driver a Timer event when asked for."""

    def wake_at(self, time: float) -> None:
        """Feed a Timer once the clock has reached ``time`` (seconds)."""
        ...


class Engine(Protocol):
    """Takes engine commands in order; feeds StepDone or StepFailed for each RunStep."""

    def submit(self, command: EngineCommand) -> None:
        """Queue ``command`` behind those before it."""
        ...


class Migrator(Protocol):
    """Pulls KV; feeds exactly one Migrated for each Migrate."""

    def migrate(self, command: Migrate) -> None:
        """Start the pull."""
        ...

    def cancel(self, command: CancelMigrate) -> None:
        """Give the pull up."""
        ...


class Sink(Protocol):
    """Where an owner's output goes."""

    def deliver(self, command: Deliver) -> None:
        """Hand tokens to the client's stream."""
        ...

    def conclude(self, command: Conclude) -> None:
        """End the client's stream."""
        ...


class Log(Protocol):
    """Keeps what was fed and what was commanded."""

    def event(self, now: float, event: Event) -> None:
        """Called before the machine handles ``event``."""
        ...

    def command(self, command: Command) -> None:
        """Called before ``command`` is executed."""
        ...


class Driver:
    """Runs one machine.

    Args:
        machine: The state machine; only this driver may call it.
        clock: Seconds on the cluster's clock.
        network: Executes ``Send``.
        timers: Executes ``WakeAt``.
        engine: Executes ``OpenSequence``, ``CloseSequence`` and ``RunStep`` (instances).
        migrator: Executes ``Migrate`` and ``CancelMigrate`` (instances).
        sink: Executes ``Deliver`` and ``Conclude`` (owners).
        log: Records events and commands, if wanted.
    """

    def __init__(
        self,
        machine: Machine,
        clock: Clock,
        network: Network,
        timers: Timers,
        *,
        engine: Engine | None = None,
        migrator: Migrator | None = None,
        sink: Sink | None = None,
        log: Log | None = None,
    ) -> None:
        self._machine = machine
        self._clock = clock
        self._network = network
        self._timers = timers
        self._engine = engine
        self._migrator = migrator
        self._sink = sink
        self._log = log
        self._lock = threading.Lock()
        self._now = float("-inf")
        self._stopped = False

    def start(self) -> None:
        """Feed the first Timer, which comes before any other event."""
        self.feed(Timer())

    def stop(self) -> None:
        """Ignore every later event, and wait for the one being handled."""
        with self._lock:
            self._stopped = True

    def feed(self, event: Event) -> None:
        """Let the machine handle ``event`` now and execute what it commands. Safe to call from any thread."""
        with self._lock:
            if self._stopped:
                return
            # A machine is promised that time never goes back, whatever the clock does.
            now = self._now = max(self._now, self._clock())
            if self._log is not None:
                self._log.event(now, event)
            for command in self._machine.handle(now, event):
                if self._log is not None:
                    self._log.command(command)
                self._execute(command)

    def _execute(self, command: Command) -> None:
        match command:
            case Send(to, message):
                self._network.send(to, message)
            case WakeAt(time):
                self._timers.wake_at(time)
            case OpenSequence() | CloseSequence() | RunStep():
                assert self._engine is not None, f"{command} from a machine without an engine"
                self._engine.submit(command)
            case Migrate():
                assert self._migrator is not None, f"{command} from a machine without a transport"
                self._migrator.migrate(command)
            case CancelMigrate():
                assert self._migrator is not None, f"{command} from a machine without a transport"
                self._migrator.cancel(command)
            case Deliver():
                assert self._sink is not None, f"{command} from a machine without clients"
                self._sink.deliver(command)
            case Conclude():
                assert self._sink is not None, f"{command} from a machine without clients"
                self._sink.conclude(command)
            case _:
                assert_never(command)
