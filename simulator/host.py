"""Processors that instances share: when more computes than there are cores, everything computes more slowly.

A GPU belongs to one rank; the cores of a host that serves on CPUs do not. Engines' steps, and the processor time that
client, API and router spend on requests and tokens, are jobs that share ``num_cores`` cores equally, none of them on
more than one: the egalitarian processor sharing that Linux's fair scheduler comes to over some milliseconds. The
remaining times of all jobs are worked out anew whenever one starts or ends.

The host is a part on the loop like the others, which is told by timers of its own when the next job ends.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from distserve.core.commands import Command, RunStep, Send, WakeAt
from distserve.core.events import Event, Timer
from distserve.core.messages import Submit
from simulator.loop import Loop, Observer, Part
from simulator.model import Delays, HostModel
from simulator.pulls import Pulls

HOST = "host"
"""The host's name on the loop."""
_DONE = 1e-9
"""Seconds of work below which a job has ended: what rounding leaves of it."""


@dataclass(slots=True, eq=False)
class _Job:
    """``work`` core seconds are left; ``event`` happens to the part ``name`` once none is (None: to nobody).

    ``aftermath`` core seconds are then spent outside the instances, on the tokens that a step gave.
    """

    work: float
    name: str = ""
    event: Event | None = None
    aftermath: float = 0.0


class Host:
    """The jobs under way; a machine in the sense of :class:`distserve.core.events.Machine`."""

    def __init__(self, model: HostModel, loop: Loop) -> None:
        self.model = model
        self._loop = loop
        self._jobs: list[_Job] = []
        self._now = 0.0
        self._wake_at = float("inf")
        """The earliest timer pending; later ones that it superseded are ignored when they come."""

    def handle(self, now: float, event: Event) -> Sequence[Command]:
        """A job may have ended."""
        assert isinstance(event, Timer)
        if now < self._wake_at:
            return ()
        self._wake_at = float("inf")
        return self._go_on(now)

    def run_step(self, now: float, name: str, seconds: float, event: Event, num_tokens: int) -> Sequence[Command]:
        """An engine's step of ``seconds`` on a core of its own, at whose end ``event`` happens to ``name``."""
        self._advance(now)
        self._jobs.append(_Job(seconds, name, event, num_tokens * self.model.cpu_per_token))
        return self._go_on(now)

    def take_request(self, now: float, num_prompt_tokens: int) -> Sequence[Command]:
        """A request comes in, which its receivers have work with."""
        self._advance(now)
        work = self.model.cpu_per_request + num_prompt_tokens * self.model.cpu_per_prompt_token
        self._jobs.append(_Job(work))
        return self._go_on(now)

    def drop(self, now: float, name: str) -> None:
        """An instance died: its steps are no longer computed."""
        self._advance(now)
        self._jobs = [job for job in self._jobs if job.name != name]

    def _pace(self) -> float:
        """Core seconds per second that each job gets."""
        return min(1.0, self.model.num_cores / len(self._jobs))

    def _advance(self, now: float) -> None:
        if self._jobs:
            done = (now - self._now) * self._pace()
            for job in self._jobs:
                job.work -= done
        self._now = now

    def _go_on(self, now: float) -> Sequence[Command]:
        """Let go of the jobs that have ended, and say when to look again."""
        self._advance(now)
        ended = [job for job in self._jobs if job.work <= _DONE]
        if ended:
            self._jobs = [job for job in self._jobs if job.work > _DONE]
            for job in ended:
                if job.event is not None:
                    self._loop.post(now, job.name, job.event)
                if job.aftermath > 0:
                    self._jobs.append(_Job(job.aftermath))
        if not self._jobs:
            return ()
        wake_at = now + min(job.work for job in self._jobs) / self._pace()
        if wake_at >= self._wake_at:
            return ()
        self._wake_at = wake_at
        return (WakeAt(wake_at),)


class HostLoop(Loop):
    """A loop whose engines share a host. Nothing is jumped over: a stretch's ends depend on what others do."""

    def __init__(
        self, model: HostModel, delays: Delays, observer: Observer | None = None, pulls: Pulls | None = None
    ) -> None:
        super().__init__(delays, observer, pulls)
        self._host = Host(model, self)
        self.add(HOST, self._host)

    def lose(self, name: str) -> None:
        """See :class:`simulator.loop.Loop`."""
        super().lose(name)
        self._host.drop(self.now, name)

    def _execute(self, part: Part, commands: Sequence[Command]) -> None:
        host = self._parts[HOST]
        for command in commands:
            match command:
                case RunStep():
                    assert part.engine is not None
                    end, event = part.engine.launch(self.now, command)
                    num_tokens = sum(chunk.samples for chunk in command.chunks)
                    super()._execute(host, self._host.run_step(self.now, part.name, end - self.now, event, num_tokens))
                case Send(_, Submit(request)):
                    super()._execute(host, self._host.take_request(self.now, request.num_prefill_tokens))
                    super()._execute(part, (command,))
                case _:
                    super()._execute(part, (command,))
