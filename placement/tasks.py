"""What is looked for apart: each task is one search for a goodput or one look at a rate, which others run beside.

A task is a pure function of the problem and its own fields. So the answer depends neither on the number of processes
nor on which of them is faster.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from threading import Lock

from distserve.bench.arrivals import TraceTimes
from distserve.core.config import ParallelConfig, Role
from distserve.core.topology import Placement
from placement.bounds import lone_decode
from placement.deployment import Alone, Deployed, Whole
from placement.goodput import Goodput, find_goodput
from placement.measure import Effort, Measurement, Runs, measure, one_by_one
from placement.offered import Offered
from placement.problem import Problem
from placement.shapes import Shape

_RESIDENCES = 5.0
"""Runs last so many times as long as a request stays: shorter ones end before the system has filled."""
_PATIENCES = 12.0
"""And so many times the TTFT allowed: in shorter ones a queue that grows is not yet too long."""
COARSE_TOLERANCE = 0.08
"""How wide a goodput stays bracketed that is only to be ranked, as a share of itself."""
_WORKING_OUT = Lock()
_HALF_WIDTH = 0.03
"""Of an attainment's interval, narrow enough to need no more runs."""
SHORT_RUNS_FLATTER = 0.95
"""Where the goodput of long runs is looked for, as a share of what short ones showed."""


@dataclass(frozen=True)
class Setting:
    """What every task of a search shares."""

    problem: Problem
    offered: Offered
    _residences: dict[frozenset[tuple[Role, ParallelConfig]], float] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    def runs(self, deployed: Deployed) -> Runs:
        """How ``deployed`` is simulated: here, unless a setting knows better."""
        return one_by_one(deployed.run(self.problem, self.offered))

    def effort(self, kinds: Iterable[tuple[Role, ParallelConfig]], rate: float, *, fine: bool) -> Effort:
        """How much to simulate at ``rate``: by Little's law several times as many requests as are present at once."""
        search = self.problem.search
        span = _RESIDENCES * self._residence(frozenset(kinds)) + _PATIENCES * self.problem.slo.ttft
        num = max(search.num_requests, int(rate * span))
        if fine:
            pair = 3 * num  # a bracket takes one pair of runs at least; to be sure, two
            most, sure = max(search.max_requests, pair), max(search.max_requests, 2 * pair)
            arrivals = self.offered.spec.arrivals
            if isinstance(arrivals, TraceTimes):
                # Runs are stretches of the trace: beyond its length they would repeat it, and look like more evidence.
                total = len(arrivals.timestamps)
                if total <= pair:
                    return Effort(total, total, half_width=_HALF_WIDTH)
                most, sure = min(most, total), min(sure, total)
            return Effort(pair // 2, most, min_runs=2, half_width=_HALF_WIDTH, sure_requests=sure)
        return Effort(num, num, half_width=_HALF_WIDTH)

    def _residence(self, kinds: frozenset[tuple[Role, ParallelConfig]]) -> float:
        """About how many seconds a request decodes: its tokens, each at twice the lone TPOT at most."""
        with _WORKING_OUT:  # a source of step times takes its time to make some, and is not asked by two tasks at once
            if kinds not in self._residences:
                self._residences[kinds] = self._work_out_residence(kinds)
            return self._residences[kinds]

    def _work_out_residence(self, kinds: frozenset[tuple[Role, ParallelConfig]]) -> float:
        prompts, outputs = self.offered.sample
        slo = self.problem.slo
        context = int(prompts.mean() + outputs.mean() / 2)
        gaps = [
            min(slo.tpot, 2 * lone_decode(self.problem.latency.step_time(parallel), parallel.pp, context))
            for role, parallel in kinds
            if role is not Role.PREFILL
        ]
        return float(outputs.mean()) * max(gaps, default=0.0)


@dataclass(frozen=True)
class PhaseGoodput:
    """The goodput of ``count`` instances of one phase alone."""

    shape: Shape
    count: int
    ceiling: float
    start: float | None = None

    def __call__(self, setting: Setting) -> Goodput:
        """Simulate."""
        return find_goodput(
            setting.runs(Alone(self.shape, self.count)),
            setting.problem.slo,
            setting.offered.cv,
            self.ceiling,
            lambda rate: setting.effort([(self.shape.role, self.shape.parallel)], rate, fine=False),
            tolerance=COARSE_TOLERANCE,
            start=self.start,
        )


@dataclass(frozen=True)
class PhasePoint:
    """``count`` instances of one phase alone at one rate."""

    shape: Shape
    count: int
    rate: float

    def __call__(self, setting: Setting) -> Measurement:
        """Simulate."""
        return measure(
            setting.runs(Alone(self.shape, self.count)),
            self.rate,
            setting.problem.slo,
            setting.offered.cv,
            setting.effort([(self.shape.role, self.shape.parallel)], self.rate, fine=False),
        )


@dataclass(frozen=True)
class JointGoodput:
    """The goodput of a whole placement; ``fine`` with an interval, near ``start`` or what short runs find."""

    placement: Placement
    ceiling: float
    start: float | None = None
    floor: float = 0.0
    fine: bool = False

    def __call__(self, setting: Setting) -> Goodput:
        """Simulate."""
        if self.fine and self.start is None:
            roughly = replace(self, fine=False)(setting)
            if roughly.interval.estimate <= 0:
                return roughly  # it serves nothing; longer runs would not either
            found = replace(self, start=SHORT_RUNS_FLATTER * roughly.interval.estimate)(setting)
            return replace(found, num_before=roughly.num_simulated)
        return find_goodput(
            setting.runs(Whole(self.placement)),
            setting.problem.slo,
            setting.offered.cv,
            self.ceiling,
            lambda rate: setting.effort(_kinds(self.placement), rate, fine=self.fine),
            tolerance=setting.problem.search.tolerance if self.fine else COARSE_TOLERANCE,
            start=self.start,
            floor=self.floor,
            with_interval=self.fine,
        )


@dataclass(frozen=True)
class JointPoint:
    """A whole placement at one rate; ``fine`` until it is decided or narrow."""

    placement: Placement
    rate: float
    fine: bool = False

    def __call__(self, setting: Setting) -> Measurement:
        """Simulate."""
        return measure(
            setting.runs(Whole(self.placement)),
            self.rate,
            setting.problem.slo,
            setting.offered.cv,
            setting.effort(_kinds(self.placement), self.rate, fine=self.fine),
        )


def _kinds(placement: Placement) -> list[tuple[Role, ParallelConfig]]:
    return [(instance.spec.role, instance.spec.parallel) for instance in placement.instances]
