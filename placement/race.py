"""The best goodput per GPU among many candidates, with as little simulation as optimism allows (branch and bound).

Every candidate carries an upper bound of its goodput: the smaller of its phases' bounds. The most promising candidates
are looked at first, each a step further: from capacities to the goodput of a phase alone, from both phases to the joint
simulation. A candidate whose bound is below what others have reached is dropped unseen.

What the bounds of phases alone rest on: the whole deployment serves no more than its phases would apart; and instances
that share their queue serve at least as much each as fewer do. Neither is exact for random runs; the slack of a coarse
search (its bracket's upper end) covers the difference.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from math import isfinite

from distserve.core.config import Role
from distserve.core.topology import Placement
from placement.bounds import ShapeBound, bound_shape, network_capacity, relief
from placement.candidates import Candidate, Kind
from placement.goodput import Goodput
from placement.shapes import Shape
from placement.tasks import JointGoodput, PhaseGoodput, Setting
from placement.workers import Workers

_WAVE = 4
"""Tasks per round, whatever the number of processes: the course of the race must not depend on it."""
_SLACK = 1.02
"""On capacities, which are means: a run may have seen shorter requests."""

Note = Callable[[str, int, int], None]
"""(what is going on, candidates settled, candidates in all)."""


@dataclass(frozen=True)
class Ranked:
    """A candidate that was simulated as a whole."""

    candidate: Candidate
    placement: Placement
    goodput: Goodput

    @property
    def per_gpu(self) -> float:
        """Requests/s and GPU."""
        return self.goodput.interval.estimate / self.candidate.num_gpus


class Bounds:
    """What is known of shapes and of phases alone; sharpened as a search goes on."""

    def __init__(self, setting: Setting) -> None:
        self._setting = setting
        self._shapes: dict[Shape, ShapeBound] = {}
        self._phases: dict[tuple[Shape, int], Goodput] = {}
        self._reliefs: dict[tuple[Shape, Shape], float] = {}

    def of_shape(self, shape: Shape) -> ShapeBound:
        """Its bounds, computed once."""
        if shape not in self._shapes:
            self._shapes[shape] = bound_shape(self._setting.problem, self._setting.offered, shape)
        return self._shapes[shape]

    def can_serve(self, shape: Shape) -> bool:
        """Whether enough lone requests are within the objective."""
        return self.of_shape(shape).attainment >= self._setting.problem.slo.attainment

    def of_pool(self, shape: Shape, count: int) -> float:
        """No more requests/s than this are served by ``count`` instances."""
        if not self.can_serve(shape):
            return 0.0
        if (shape, count) in self._phases:
            return self._phases[shape, count].high
        bound = self.of_shape(shape).capacity * count * _SLACK
        for (known, number), goodput in list(self._phases.items()):  # another race may note one meanwhile
            if known == shape and number > count:
                bound = min(bound, goodput.high * count / number)
        return bound

    def of_candidate(self, candidate: Candidate) -> float:
        """No more requests/s than this are served by the whole placement."""
        if candidate.kind is Kind.HYBRID:
            return self._of_hybrid(candidate)
        return min(self.of_pool(shape, count) for shape, count in candidate.pools)

    def _of_hybrid(self, candidate: Candidate) -> float:
        """Mixed instances do what others do not spare them, and decode no faster than with nothing else to do.

        Lone prompts bound nothing: the router has them computed where they are served best.
        """
        mixed, count = next(pool for pool in candidate.pools if pool[0].role is Role.MIXED)
        alone = self.of_shape(mixed)
        working, decoding = float(count), alone.decode_capacity * count * _SLACK
        same = next((s for s, _ in self._phases if (s.role, s.parallel) == (Role.DECODE, mixed.parallel)), None)
        if same is not None:
            decoding = min(decoding, self.of_pool(same, count))
        for shape, number in candidate.pools:
            if shape.role is Role.PREFILL:
                working += self._relief_by(shape, mixed) * number
            elif shape.role is Role.DECODE:
                working, decoding = float("inf"), decoding + self.of_pool(shape, number)
        return min(working * alone.capacity * _SLACK, decoding)

    def _relief_by(self, prefill: Shape, mixed: Shape) -> float:
        if (prefill, mixed) not in self._reliefs:
            self._reliefs[prefill, mixed] = relief(self._setting.problem, self._setting.offered, prefill, mixed)
        return self._reliefs[prefill, mixed]

    def note(self, shape: Shape, count: int, goodput: Goodput) -> None:
        """A phase alone was simulated."""
        self._phases[shape, count] = goodput

    def next_phase(self, candidate: Candidate) -> PhaseGoodput | None:
        """What to simulate of a disaggregated candidate before it is simulated as a whole: the tighter phase first."""
        if candidate.kind is not Kind.DISAGGREGATED:
            return None
        # What nothing bounds (decoding, where every answer is one token) has no goodput of its own to be found.
        unknown = [pool for pool in candidate.pools if pool not in self._phases and isfinite(self.of_pool(*pool))]
        if not unknown:
            return None
        shape, count = min(unknown, key=lambda pool: self.of_pool(*pool))
        ceiling = self.of_pool(shape, count)
        smaller = [(number, known) for (kind, number), known in self._phases.items() if kind == shape]
        if smaller:
            number, known = min(smaller, key=lambda item: abs(item[0] - count))
            return PhaseGoodput(shape, count, ceiling, known.low * count / number or None)
        return PhaseGoodput(shape, count, ceiling)


def race(
    setting: Setting,
    workers: Workers,
    bounds: Bounds,
    candidates: Iterable[Candidate],
    num_wanted: int,
    note: Note,
    beaten: float = 0.0,
) -> list[Ranked]:
    """Candidates by goodput per GPU, best first: the ``num_wanted`` best for sure, others as far as they were seen.

    Who has no more than ``beaten`` (requests/s and GPU) is out of the race.
    """
    open_: dict[Candidate, Placement] = {}
    networks: dict[Candidate, float] = {}
    for candidate in candidates:
        if bounds.of_candidate(candidate) > 0:
            placement = candidate.placement(setting.problem)
            if placement is not None:
                open_[candidate] = placement
                networks[candidate] = network_capacity(setting.problem, setting.offered, placement)
    total = len(open_)
    ranked: list[Ranked] = []

    def bound(candidate: Candidate) -> float:
        return min(bounds.of_candidate(candidate), networks[candidate])

    while True:
        ranked.sort(key=_order)
        bar = max(beaten, ranked[num_wanted - 1].per_gpu if len(ranked) >= num_wanted else 0.0)
        optimism = {candidate: bound(candidate) / candidate.num_gpus for candidate in open_}
        hopeful = [candidate for candidate in open_ if optimism[candidate] > bar]
        open_ = {candidate: open_[candidate] for candidate in hopeful}
        if not hopeful:
            return [entry for entry in ranked if entry.goodput.interval.estimate > 0]
        hopeful.sort(key=lambda c: (-optimism[c], c.num_gpus, open_[c].num_nodes, str(c)))
        phases: dict[tuple[Shape, int], PhaseGoodput] = {}
        joint: dict[Candidate, JointGoodput] = {}
        for candidate in hopeful:
            task = bounds.next_phase(candidate)
            if task is not None:
                phases.setdefault((task.shape, task.count), task)
            else:
                joint[candidate] = JointGoodput(
                    open_[candidate],
                    bound(candidate),
                    floor=bar * candidate.num_gpus,
                )
            if len(phases) + len(joint) >= _WAVE:
                break
        note(f"simulating {hopeful[0]}", total - len(hopeful), total)
        tasks: list[Callable[[Setting], Goodput]] = [*phases.values(), *joint.values()]
        results = workers.run(tasks)
        for (shape, count), goodput in zip(phases, results, strict=False):
            bounds.note(shape, count, goodput)
        for candidate, goodput in zip(joint, results[len(phases) :], strict=True):
            ranked.append(Ranked(candidate, open_.pop(candidate), goodput))


def _order(entry: Ranked) -> tuple[float, int, int, str]:
    return -entry.per_gpu, entry.candidate.num_gpus, entry.placement.num_nodes, str(entry.candidate)
