"""One instance's engine in simulated time: its pipeline, and stretches of steps that nothing can change.

A step occupies the pipeline's stages one after the other, each for as long as the step-time model says; the next step
follows into a stage as soon as that is free. Where the scheduler says that the batch in flight will be the very same
for some steps more, their ends are computed ahead, as a :class:`Stretch`, and the scheduler is told of them in one go:
when the stretch ends, or when anything else is about to happen to the instance.
"""

from bisect import bisect_right
from dataclasses import dataclass, field

from distserve.core.commands import RunStep
from distserve.core.events import Event
from distserve.core.latency import StepShape, StepTime
from distserve.core.records import record
from distserve.core.scheduler import InstanceScheduler
from simulator.latency.interface import DecodeRunTime
from simulator.recorder import Recorder
from simulator.worker import SimulatedWorker, Worker

_AHEAD = range(4, 257)
"""Ends computed at a time, at least and at most: an arrival cuts most stretches short, and what lies beyond is lost."""


@dataclass(slots=True, eq=False)
class Stretch:
    """Steps of one batch without lookahead or pipelining: ``ends[i]`` is when the i-th of them ends (seconds).

    The scheduler knows of ``num_settled`` of them; ``num_steps`` are sure to come, the last of which is handled as any
    step, by ``event``. ``number`` tells this form of it from earlier ones, whose points on the heap are void.
    """

    ends: list[float]
    num_steps: int
    event: Event
    num_settled: int = 0
    number: int = 0


@record(frozen=True, slots=True)
class StretchPoint:
    """The last computed end of a stretch is reached."""

    number: int


@dataclass(slots=True, eq=False)
class Engine:
    """Times steps, and keeps count of what was done.

    Each stage has ``num_shards`` ranks. ``busy`` is seconds the busiest stage worked, ``num_sequences`` the batch
    sizes added up.
    """

    name: str
    worker: Worker
    step_time: StepTime
    num_stages: int = 1
    num_shards: int = 1
    recorder: Recorder | None = None
    step_ends: dict[int, float] = field(default_factory=dict)
    """When the steps under way end: a pull may wait for one."""
    step_starts: dict[int, float] = field(default_factory=dict)
    busy: float = 0.0
    num_steps: int = 0
    num_tokens: int = 0
    num_sequences: int = 0
    stretch: Stretch | None = None
    _free_at: list[float] = field(default_factory=list)
    _shape: StepShape = field(default_factory=StepShape)
    _number: int = 0
    _run_time: DecodeRunTime | None = None
    _usual_stretch: int = 0
    """Steps of the last stretch: the next one may be as long."""

    def __post_init__(self) -> None:
        self._free_at = [0.0] * self.num_stages
        self._run_time = self.step_time if isinstance(self.step_time, DecodeRunTime) else None

    def launch(self, now: float, step: RunStep) -> tuple[float, Event]:
        """Take a step on: when it ends (seconds), and the event to be fed back then."""
        shape, event = self.worker.run(step)
        self._shape = shape
        seconds, between = self.stage_times()
        start = self._enter(now, 0, seconds[0], shape)
        end = start + seconds[0]
        for stage in range(1, self.num_stages):
            end = self._enter(end + between, stage, seconds[stage], shape) + seconds[stage]
        self._count(shape, seconds[-1])
        if len(self.step_ends) > 2 * self.num_stages:
            over = [step_id for step_id, at in self.step_ends.items() if at <= now]
            for step_id in over:
                del self.step_ends[step_id], self.step_starts[step_id]
        self.step_starts[step.step_id] = start
        self.step_ends[step.step_id] = end
        return end, event

    def stage_times(self) -> tuple[tuple[float, ...], float]:
        """Of the step launched last: seconds in each stage, and between any two of them, if nothing is in its way."""
        seconds = self.step_time.seconds(self._shape)
        if self.num_stages == 1:
            return (seconds,), 0.0
        between = self.step_time.handover(self._shape)
        # Where a hand-over is below zero, stages before the last are the shorter ones.
        return (*(max(0.0, seconds + min(between, 0.0)),) * (self.num_stages - 1), seconds), max(between, 0.0)

    def _enter(self, now: float, stage: int, seconds: float, shape: StepShape) -> float:
        """When the step enters ``stage``, which it then holds for ``seconds``."""
        start = max(now, self._free_at[stage])
        self._free_at[stage] = start + seconds
        if self.recorder is not None:
            self.recorder.on_step(self.name, stage, start, start + seconds, shape)
        return start

    def _count(self, shape: StepShape, seconds: float, num_steps: int = 1) -> None:
        self.busy += seconds
        self.num_steps += num_steps
        self.num_tokens += num_steps * (shape.num_prefill_tokens + shape.num_decodes)
        self.num_sequences += num_steps * (shape.num_prefills + shape.num_decodes)

    # -- stretches ----------------------------------------------------------------------------------------------------

    def begin_stretch(self, num_more: int, end: float, event: Event) -> tuple[float, StretchPoint]:
        """The step just launched will be followed by ``num_more`` alike: a point, and when it is reached."""
        self._number += 1
        self.stretch = Stretch([end], num_more + 1, event, number=self._number)
        return self.extend(), StretchPoint(self._number)

    def extend(self) -> float:
        """Compute further ends; the last of them."""
        stretch = self.stretch
        assert stretch is not None
        ends, shape = stretch.ends, self._shape
        num_decodes = shape.num_decodes
        context = shape.decode_context + num_decodes * (len(ends) - 1)
        ahead = min(max(_AHEAD[0], self._usual_stretch, len(ends)), _AHEAD[-1])
        num_steps = min(ahead, stretch.num_steps - len(ends))
        if self._run_time is not None:
            ends += self._run_time.decode_ends(num_decodes, context + num_decodes, num_steps, ends[-1])
            return ends[-1]
        longest = shape.longest_context + len(ends) - 1
        for step in range(1, num_steps + 1):
            following = StepShape(0, 0, num_decodes, context + step * num_decodes, 0, longest + step)
            ends.append(ends[-1] + self.step_time.seconds(following))
        return ends[-1]

    def cut(self, num_more: int) -> tuple[float, StretchPoint] | None:
        """After the step now in flight there will be ``num_more`` alike; None if the point on the heap stands."""
        stretch = self.stretch
        assert stretch is not None
        stretch.num_steps = num_steps = stretch.num_settled + 1 + num_more
        if num_steps >= len(stretch.ends):
            return None
        del stretch.ends[num_steps:]
        self._number += 1
        stretch.number = self._number
        return stretch.ends[-1], StretchPoint(self._number)

    def settle(self, now: float, scheduler: InstanceScheduler) -> None:
        """Let the scheduler know of the steps of the stretch that ended by ``now``, the very last one excepted."""
        stretch = self.stretch
        assert stretch is not None
        ends, settled = stretch.ends, stretch.num_settled
        reached = bisect_right(ends, now, settled, len(ends) - 1)
        count = reached - settled
        if count == 0:
            return
        assert isinstance(self.worker, SimulatedWorker)
        scheduler.skip(ends[settled:reached])
        self.worker.skip(count)
        stretch.num_settled = reached
        self._count(self._shape, ends[reached] - ends[settled], count)
        self._free_at[0] = ends[reached]
        if self.recorder is not None:
            self._record(self.recorder, ends, settled, reached)

    def _record(self, recorder: Recorder, ends: list[float], settled: int, reached: int) -> None:
        shape = self._shape
        for index in range(settled, reached):
            context = shape.decode_context + shape.num_decodes * (index + 1)
            step = StepShape(0, 0, shape.num_decodes, context, 0, shape.longest_context + index + 1)
            recorder.on_step(self.name, 0, ends[index], ends[index + 1], step)

    def end_stretch(self) -> Event:
        """The last step of the stretch has ended: the event that says so."""
        stretch = self.stretch
        assert stretch is not None
        self.stretch = None
        self._usual_stretch = len(stretch.ends)
        return stretch.event
