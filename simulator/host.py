"""Processors that instances share: when more computes than there are cores, everything computes more slowly.

A GPU belongs to one rank; the cores of a host that serves on CPUs do not. Engines' steps are jobs, and so is the light
work around them: what client, API, router and the instances' further threads do for a request or a step. The remaining
times of all jobs are worked out anew whenever one starts or ends.

The jobs of a core share it equally. Which core a job is on follows what the launcher and Linux do:

- Where there are cores enough, every engine is bound to one of its own. Else an engine that wakes goes to an idle core,
  or to the one that was idle most of late; a core that falls idle takes over an engine that shares another; and where
  engines outnumber cores for long, the scheduler moves them about, so that all of them get on.
- Light work goes to an idle core if there is one. If there is none it stays where it was, as threads do that wake: the
  more often a core was idle of late, the more of the light work is there.

An engine that slept computes its next step ``waking`` seconds longer: the machine has put other things into the caches.
Who is interrupted loses more than the time of the other: what it had in the core's caches. A step's light work costs an
engine ``crowding`` seconds more where it finds no idle core; engines that share one lose a part of what they share.

The host is a part on the loop like the others, which is told by timers of its own when the next job ends.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import exp

from distserve.core.commands import Command, Migrate, RunStep, Send, WakeAt
from distserve.core.events import Event, Machine, Timer
from distserve.core.messages import Submit
from simulator.engine import Engine
from simulator.loop import Loop, Observer, Part
from simulator.model import Delays, HostModel
from simulator.pulls import Pulls

HOST = "host"
"""The host's name on the loop."""
_MEMORY = 1.0
"""Seconds over which a core's idleness is looked back upon."""
_SLEEP = 0.05
"""Seconds without a step after which an engine has slept. A prompt comes this soon after the last only under load."""
_BALANCE = 0.064
"""Seconds for which engines share a core before one is moved, though no core is idle: the longest that Linux waits on
two busy cores (sched_domain: a busy factor of 16 times 2 to 4 ms)."""
_SHARING = 0.92
"""What engines that share a core do of what one would: two loops of matrix products on one core lost 12% together where
the weights' way from memory took the time, 3% where computing did."""
_DONE = 1e-9
"""Seconds of work below which a job has ended: what rounding leaves of it."""


@dataclass(slots=True, eq=False)
class _Job:
    """``work`` core seconds are left; ``event`` happens to the part ``name`` once none is (None: to nobody).

    ``aftermath`` core seconds of light work follow, on the tokens that a step gave. ``core`` runs it,
    and no other may if it ``is_bound`` to it.
    """

    work: float
    name: str = ""
    event: Event | None = None
    aftermath: float = 0.0
    core: int = 0
    is_bound: bool = False


class Host:
    """The jobs under way; a machine in the sense of :class:`distserve.core.events.Machine`."""

    def __init__(self, model: HostModel, loop: Loop) -> None:
        self.model = model
        self._loop = loop
        self._jobs: list[_Job] = []
        self._core_of: dict[str, int] = {}
        self._num_cores = max(1, int(model.num_cores))
        self._idle = [1.0] * self._num_cores
        """Share of the last second or so that each core had nothing to do."""
        self._turns = [0.0] * self._num_cores
        self._now = 0.0
        self._ended_at: dict[str, float] = {}
        """When each engine's last step ended: it goes on without a sleep if the next begins then."""
        self._balance_at = float("inf")
        """When an engine is to be moved off the fullest core."""
        self._wake_at = float("inf")
        """The earliest timer pending; later ones that it superseded are ignored when they come."""

    def add_engine(self, name: str) -> None:
        """An instance is there: its engine begins on the next core."""
        self._core_of.setdefault(name, len(self._core_of) % self._num_cores)

    @property
    def _is_bound(self) -> bool:
        return len(self._core_of) <= self._num_cores

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
        if not self._is_bound:
            self._core_of[name] = self._choose_core(now, name)
        if now - self._ended_at.get(name, float("-inf")) > _SLEEP:
            seconds += self.model.waking
        aftermath = self.model.cpu_per_step + num_tokens * self.model.cpu_per_token if num_tokens else 0.0
        self._jobs.append(_Job(seconds, name, event, aftermath, self._core_of[name]))
        self._spread()
        return self._go_on(now)

    def take_request(self, now: float, num_prompt_tokens: int) -> Sequence[Command]:
        """A request comes in, which its receivers have work with."""
        self._advance(now)
        self._add_light(self.model.cpu_per_request + num_prompt_tokens * self.model.cpu_per_prompt_token)
        self._spread()
        return self._go_on(now)

    def pull(self, now: float, name: str, num_blocks: int) -> Sequence[Command]:
        """An instance takes KV in: its threads do, on its engine's core."""
        self._advance(now)
        work = self.model.cpu_per_pull + num_blocks * self.model.cpu_per_pulled_block
        if work > 0:
            self._jobs.append(_Job(work, core=self._core_of[name], is_bound=self._is_bound))
        return self._go_on(now)

    def drop(self, now: float, name: str) -> None:
        """An instance died: its steps are no longer computed."""
        self._advance(now)
        self._jobs = [job for job in self._jobs if job.name != name]

    def _choose_core(self, now: float, name: str) -> int:
        """Where an engine's next step begins."""
        idle, last = self._idle_cores(), self._core_of[name]
        if idle:
            return last if last in idle else idle[0]
        goes_on = now - self._ended_at.get(name, float("-inf")) < _DONE
        return last if goes_on else max(range(self._num_cores), key=self._idle.__getitem__)

    def _idle_cores(self) -> list[int]:
        busy = {job.core for job in self._jobs}
        return [core for core in range(self._num_cores) if core not in busy]

    def _is_crowded(self, core: int) -> bool:
        """Engines compute on every core, the one that has just ended a step on ``core`` and goes on among them."""
        return len({job.core for job in self._jobs if job.name} | {core}) == self._num_cores

    def _add_light(self, work: float) -> None:
        """Light work begins, each piece of it on the core whose turn it is: turns come by how idle a core is."""
        if work <= 0:
            return
        for core, idle in enumerate(self._idle):
            self._turns[core] += idle
        chosen = max(range(self._num_cores), key=self._turns.__getitem__)
        self._turns[chosen] -= sum(self._idle)
        self._jobs.append(_Job(work, core=chosen))

    def _spread(self) -> None:
        """Move light work that shares a core to one that is idle.

        Not when a step ends: its engine is about to begin the next.
        """
        idle = self._idle_cores()
        busy = [job.core for job in self._jobs]
        for job in self._jobs:
            if idle and not job.name and not job.is_bound and busy.count(job.core) > 1:
                busy.remove(job.core)
                job.core = idle.pop()
                busy.append(job.core)

    def _balance(self, now: float) -> None:
        """Move engines off cores that they share: to an idle one now, to one where fewer are in time."""
        engines: list[list[_Job]] = [[] for _ in range(self._num_cores)]
        for job in self._jobs:
            if job.name:
                engines[job.core].append(job)
        idle = self._idle_cores()
        for core in idle:
            shared = max(engines, key=len)
            if len(shared) > 1:
                engines[core].append(self._move(shared.pop(0), core))
        fullest = max(engines, key=len)
        least = min(range(self._num_cores), key=lambda core: len(engines[core]))
        if len(fullest) < 2 or len(fullest) == len(engines[least]):
            self._balance_at = float("inf")
        elif self._balance_at == float("inf"):
            self._balance_at = now + _BALANCE
        elif now >= self._balance_at - _DONE:
            self._move(fullest[0], least)
            self._balance_at = now + _BALANCE

    def _move(self, job: _Job, core: int) -> _Job:
        """The engine of ``job`` goes to ``core``, and is the last there to be moved again."""
        job.core = self._core_of[job.name] = core
        self._jobs.remove(job)
        self._jobs.append(job)
        return job

    def _paces(self) -> list[float]:
        """Core seconds per second that each job gets."""
        sharing, engines = [0] * self._num_cores, [0] * self._num_cores
        for job in self._jobs:
            sharing[job.core] += 1
            engines[job.core] += bool(job.name)
        return [(_SHARING if engines[job.core] > 1 else 1.0) / sharing[job.core] for job in self._jobs]

    def _advance(self, now: float) -> None:
        elapsed = now - self._now
        if elapsed > 0 and self._jobs:
            for job, pace in zip(self._jobs, self._paces(), strict=True):
                job.work -= elapsed * pace
        if elapsed > 0:
            kept = exp(-elapsed / _MEMORY)
            busy = {job.core for job in self._jobs}
            self._idle = [idle * kept + (1 - kept) * (core not in busy) for core, idle in enumerate(self._idle)]
        self._now = now

    def _go_on(self, now: float) -> Sequence[Command]:
        """Let go of the jobs that have ended, and say when to look again."""
        self._advance(now)
        if not self._is_bound:
            self._balance(now)
        ended = [job for job in self._jobs if job.work <= _DONE]
        if ended:
            self._jobs = [job for job in self._jobs if job.work > _DONE]
            for job in ended:
                if job.event is not None:
                    self._loop.post(now, job.name, job.event)
                    self._ended_at[job.name] = now
            for job in ended:
                if job.aftermath > 0:
                    self._add_light(job.aftermath + (self.model.crowding if self._is_crowded(job.core) else 0.0))
        if not self._jobs:
            return ()
        wake_at = now + min(job.work / pace for job, pace in zip(self._jobs, self._paces(), strict=True))
        wake_at = min(wake_at, max(now, self._balance_at))
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
        super().add(HOST, self._host)

    def add(self, name: str, machine: Machine, engine: Engine | None = None, *, may_jump: bool = False) -> None:
        """See :class:`simulator.loop.Loop`."""
        if engine is not None:
            self._host.add_engine(name)
        super().add(name, machine, engine, may_jump=may_jump)

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
                case Migrate():
                    super()._execute(host, self._host.pull(self.now, part.name, len(command.src_blocks)))
                    super()._execute(part, (command,))
                case _:
                    super()._execute(part, (command,))
