"""An instance over time: the scheduler of its role and, when it changes role, that of the next.

Told to :class:`~distserve.core.messages.Become` something else, an instance goes on as before: the router sends it
nothing new, so it runs dry. What is left after ``patience`` seconds goes back to its owners, who resubmit it with the
tokens it has. Once nothing is left, neither sequence nor block nor step, the scheduler of the new role takes over
engine and memory where they stand (:meth:`~distserve.core.scheduler.InstanceScheduler.succeed`) and reports itself. No
event is lost between the two, and what comes late for the former role is answered (:mod:`distserve.core.strays`).

Weights, KV pool and process stay: nothing here knows of them.
"""

from dataclasses import replace

from distserve.core.commands import Command, WakeAt
from distserve.core.config import InstanceSpec, Role
from distserve.core.decode import DecodeScheduler
from distserve.core.events import Event, Received, Timer
from distserve.core.messages import Become
from distserve.core.mixed import MixedScheduler
from distserve.core.prefill import PrefillScheduler
from distserve.core.scheduler import InstanceScheduler


def scheduler_for(spec: InstanceSpec) -> InstanceScheduler:
    """A fresh scheduler of the instance's role."""
    match spec.role:
        case Role.PREFILL:
            return PrefillScheduler(spec)
        case Role.DECODE:
            return DecodeScheduler(spec)
        case Role.MIXED:
            return MixedScheduler(spec)


class InstanceMachine:
    """One per instance; a machine in the sense of :class:`distserve.core.events.Machine`.

    Attributes:
        scheduler: Of the role it has now.
    """

    def __init__(self, spec: InstanceSpec) -> None:
        self.scheduler = scheduler_for(spec)
        self._hand_back_at = float("inf")

    def handle(self, now: float, event: Event) -> list[Command]:
        """Take one event; see :class:`distserve.core.events.Machine`."""
        if isinstance(event, Received) and isinstance(event.message, Become):
            commands = self._on_become(now, event.message)
        else:
            commands = self.scheduler.handle(now, event)
        if self.scheduler.becoming is None:
            return commands
        if now >= self._hand_back_at:
            commands += self.scheduler.hand_back(now)
        if self.scheduler.is_idle:
            commands += self._change(now, self.scheduler.becoming)
        return commands

    def _on_become(self, now: float, message: Become) -> list[Command]:
        self.scheduler.becoming = message.role
        self._hand_back_at = now + message.patience
        if self._hand_back_at == float("inf"):
            return []
        return [WakeAt(self._hand_back_at)]

    def _change(self, now: float, role: Role) -> list[Command]:
        former = self.scheduler
        self.scheduler = scheduler_for(replace(former.spec, role=role))
        self.scheduler.succeed(former)
        self._hand_back_at = float("inf")
        return self.scheduler.handle(now, Timer())
