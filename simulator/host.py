"""Processors that instances share: when more computes than there are cores, everything computes more slowly.

A GPU belongs to one rank; the cores of a host that serves on CPUs do not. Engines' steps are jobs, and so is the light
work around them: what client, API, router and the instances' further threads do for a request or a step. The remaining
times of all jobs are worked out anew whenever one starts or ends.

The jobs of a core share it equally. Which core a job is on follows what the launcher and Linux do:

- An engine is a rank of an instance: a stage's shards compute side by side, and it is over when the last of them is;
  what they tell each other meanwhile is in their times.
- Where there are cores enough, every engine is bound to one of its own. Else an engine that wakes goes to an idle core,
  or to the one that was idle most of late; a core that falls idle takes over an engine that shares another; and where
  engines outnumber cores for long, the scheduler moves them about, so that all of them get on.
- Light work goes to an idle core if there is one. If there is none it stays where it was, as threads do that wake: the
  more often a core was idle of late, the more of the light work is there.

An engine that slept computes its next step ``waking`` seconds longer: the machine has put other things into the caches.
Engines that share a core lose a part of what they share. Ranks of one instance that has more of them than there are
cores shared them already when their steps were measured. What keeps ``idle_cores`` busy goes on all the time, and slows
engines only while no core is free of them.

The host is a part on the loop (:mod:`simulator.host_loop`) like the others, which is told by timers of its own when the
next job ends.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from math import exp

from distserve.core.commands import Command, WakeAt
from distserve.core.events import Event, Timer
from simulator.loop import Loop
from simulator.model import HostModel
from simulator.passage import Passage, Pipeline

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

_Engine = tuple[str, int]
"""An instance's name, and which of its ranks."""


@dataclass(slots=True, eq=False)
class _Job:
    """``work`` core seconds are left, of light work or of rank ``rank`` of the instance ``name`` on its ``passage``.

    ``core`` runs it, and no other may if it ``is_bound`` to it.
    """

    work: float
    name: str = ""
    rank: int = 0
    passage: Passage | None = None
    core: int = 0
    is_bound: bool = False


class Host:
    """The jobs under way; a machine in the sense of :class:`distserve.core.events.Machine`."""

    def __init__(self, model: HostModel, loop: Loop) -> None:
        self.model = model
        self._loop = loop
        self._jobs: list[_Job] = []
        self._core_of: dict[_Engine, int] = {}
        self._pipelines: dict[str, Pipeline] = {}
        self._own_sharing: dict[str, int] = {}
        """Engines of an instance that shared a core when it was measured, where it has more than there are cores."""
        self._between: list[tuple[float, Passage]] = []
        """Steps on their way from one stage to the next, and when they arrive."""
        self._num_cores = max(1, int(model.num_cores))
        self._idle = [1.0] * self._num_cores
        """Share of the last second or so that each core had nothing to do."""
        self._turns = [0.0] * self._num_cores
        self._now = 0.0
        self._ended_at: dict[_Engine, float] = {}
        """When each engine's last step ended: it goes on without a sleep if the next begins then."""
        self._balance_at = float("inf")
        """When an engine is to be moved off the fullest core."""
        self._wake_at = float("inf")
        """The earliest timer pending; later ones that it superseded are ignored when they come."""

    def add_instance(self, name: str, num_stages: int, num_shards: int) -> None:
        """An instance is there: its engines begin on the next cores."""
        pipeline = self._pipelines[name] = Pipeline(num_stages, num_shards)
        for rank in range(pipeline.num_ranks):
            # Where it was before, if it starts again.
            self._core_of.setdefault((name, rank), len(self._core_of) % self._num_cores)
        if pipeline.num_ranks > self._num_cores:
            self._own_sharing[name] = -(-pipeline.num_ranks // self._num_cores)

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

    def run_step(self, now: float, passage: Passage) -> Sequence[Command]:
        """A step of an instance begins with its first stage; its seconds are those on cores of its own."""
        self._advance(now)
        self._arrive(now, passage)
        self._spread()
        return self._go_on(now)

    def take_request(self, now: float, num_prompt_tokens: int) -> Sequence[Command]:
        """A request comes in, which its receivers have work with."""
        self._advance(now)
        self._add_light(self.model.cpu_per_request + num_prompt_tokens * self.model.cpu_per_prompt_token)
        self._spread()
        return self._go_on(now)

    def pull(self, now: float, name: str, num_blocks: int) -> Sequence[Command]:
        """An instance takes KV in: its threads do, on its engines' cores, each rank its own part."""
        self._advance(now)
        work = self.model.cpu_per_pull + num_blocks * self.model.cpu_per_pulled_block
        num_ranks = self._pipelines[name].num_ranks
        for rank in range(num_ranks if work > 0 else 0):
            self._jobs.append(_Job(work / num_ranks, core=self._core_of[name, rank], is_bound=self._is_bound))
        return self._go_on(now)

    def drop(self, now: float, name: str) -> Sequence[Command]:
        """An instance died: its steps are no longer computed, and what shared its cores goes on faster."""
        self._advance(now)
        self._jobs = [job for job in self._jobs if job.name != name]
        self._between = [(at, passage) for at, passage in self._between if passage.name != name]
        return self._go_on(now)

    def _arrive(self, now: float, passage: Passage) -> None:
        if self._pipelines[passage.name].enter(passage):
            self._begin(now, passage)

    def _begin(self, now: float, passage: Passage) -> None:
        """The shards of the step's stage begin to compute."""
        pipeline = self._pipelines[passage.name]
        num_shards = passage.num_computing = pipeline.num_shards
        for rank in range(passage.stage * num_shards, (passage.stage + 1) * num_shards):
            engine = (passage.name, rank)
            if not self._is_bound:
                self._core_of[engine] = self._choose_core(now, engine)
            work, core = passage.seconds[passage.stage], self._core_of[engine]
            if now - self._ended_at.get(engine, float("-inf")) > _SLEEP:
                work += self.model.waking / pipeline.num_ranks  # of what is to be fetched, each rank has a part
            self._jobs.append(_Job(work, passage.name, rank, passage, core))

    def _end(self, now: float, job: _Job, passage: Passage) -> None:
        """One shard has done its part of a stage."""
        self._ended_at[job.name, job.rank] = now
        passage.num_computing -= 1
        if passage.num_computing:
            return
        following = self._pipelines[passage.name].leave(passage)
        if following is not None:
            self._begin(now, following)
        if passage.is_in_last_stage:
            self._loop.post(now, passage.name, passage.event)
            self._add_light(passage.aftermath)
            return
        self._between.append((self._pipelines[passage.name].send_on(now, passage), passage))

    def _choose_core(self, now: float, engine: _Engine) -> int:
        """Where an engine's next step begins."""
        idle, last = self._idle_cores(), self._core_of[engine]
        if idle:
            return last if last in idle else idle[0]
        if now - self._ended_at.get(engine, float("-inf")) < _DONE:
            return last  # goes on where it is
        # Away from others of its instance, which begin when it does.
        own = Counter(job.core for job in self._jobs if job.name == engine[0])
        return max(range(self._num_cores), key=lambda core: (-own[core], self._idle[core]))

    def _idle_cores(self) -> list[int]:
        busy = {job.core for job in self._jobs}
        return [core for core in range(self._num_cores) if core not in busy]

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
        job.core = self._core_of[job.name, job.rank] = core
        self._jobs.remove(job)
        self._jobs.append(job)
        return job

    def _paces(self) -> list[float]:
        """Core seconds per second that each job gets."""
        sharing, engines = [0] * self._num_cores, [0] * self._num_cores
        for job in self._jobs:
            sharing[job.core] += 1
            engines[job.core] += bool(job.name)
        alone = 1.0
        if all(engines):
            alone -= self.model.idle_cores / self._num_cores
        paces = [alone * (_SHARING if engines[job.core] > 1 else 1.0) / sharing[job.core] for job in self._jobs]
        if self._own_sharing:
            self._allow_own_sharing(paces, sharing, engines)
        return paces

    def _allow_own_sharing(self, paces: list[float], sharing: list[int], engines: list[int]) -> None:
        """Engines that shared a core with their own instance's when they were measured do not pay for it again."""
        together = Counter((job.name, job.core) for job in self._jobs)
        for index, job in enumerate(self._jobs):
            own = min(self._own_sharing.get(job.name, 1), together[job.name, job.core])
            if own > 1:
                has_others = engines[job.core] > own
                paces[index] = own * (_SHARING if has_others else 1.0) / sharing[job.core]

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
                if job.passage is not None:
                    self._end(now, job, job.passage)
        arrived = [passage for at, passage in self._between if at <= now + _DONE]
        if arrived:
            self._between = [(at, passage) for at, passage in self._between if at > now + _DONE]
            for passage in arrived:
                self._arrive(now, passage)
        wake_at = min((at for at, _ in self._between), default=float("inf"))
        if self._jobs:
            ends = (job.work / pace for job, pace in zip(self._jobs, self._paces(), strict=True))
            wake_at = min(wake_at, now + min(ends), max(now, self._balance_at))
        if wake_at >= self._wake_at:
            return ()
        self._wake_at = wake_at
        return (WakeAt(wake_at),)
