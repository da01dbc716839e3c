"""Ports that record, and machines that answer from a script."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from distserve.core.commands import Command, WakeAt
from distserve.core.events import Event, Timer
from distserve.core.messages import Message


@dataclass
class Recorder:
    """Every port at once; remembers the calls in order."""

    calls: list[tuple[str, object]] = field(default_factory=list)

    def send(self, to: str, message: Message) -> None:
        self.calls.append((f"send {to}", message))

    def wake_at(self, time: float) -> None:
        self.calls.append(("wake_at", time))

    def submit(self, command: object) -> None:
        self.calls.append(("submit", command))

    def migrate(self, command: object) -> None:
        self.calls.append(("migrate", command))

    def cancel(self, command: object) -> None:
        self.calls.append(("cancel", command))

    def deliver(self, command: object) -> None:
        self.calls.append(("deliver", command))

    def conclude(self, command: object) -> None:
        self.calls.append(("conclude", command))


@dataclass
class Scripted:
    """A machine that answers through a function and remembers what it was fed."""

    answer: Callable[[float, Event], Sequence[Command]] = lambda _now, _event: ()
    fed: list[tuple[float, Event]] = field(default_factory=list)

    def handle(self, now: float, event: Event) -> Sequence[Command]:
        self.fed.append((now, event))
        return self.answer(now, event)


def ticking(period: float) -> Callable[[float, Event], Sequence[Command]]:
    """Answer of a machine that wants to be woken every ``period`` seconds."""
    return lambda now, event: (WakeAt(now + period),) if isinstance(event, Timer) else ()
