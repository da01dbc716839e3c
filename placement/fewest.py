"""The fewest GPUs that hold the objective at a given rate: best first, from below.

Every pair of shapes starts from the instance counts that capacity asks for at least. The candidate with the fewest
GPUs is looked at first: its phases alone at the rate, then the whole. A phase that surely fails alone gets one instance
more; a whole that does not surely hold is replaced by its two neighbours with one instance more. That goes on until
whatever is left has no fewer GPUs than what holds. So no placement with fewer GPUs than the answer is left that could
have held; one with more is simulated only to fill a round that began with fewer.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from distserve.core.topology import Placement
from placement.bounds import network_capacity
from placement.candidates import Candidate, Kind
from placement.measure import Measurement
from placement.race import Bounds, Note
from placement.shapes import Shape
from placement.tasks import JointPoint, PhasePoint, Setting
from placement.workers import Workers

_WAVE = 4
_SLACK = 1.02
_OVERLOADED = 0.9
_SURELY = 0.95
"""An overloaded pool's instances serve as much as they can, give or take a few percent."""


@dataclass(frozen=True)
class Holding:
    """A candidate that holds the objective at the rate with its whole interval."""

    candidate: Candidate
    placement: Placement
    measurement: Measurement


@dataclass(frozen=True)
class Fewest:
    """``holding``: fewest GPUs first. ``best_failing``: the closest any placement came, if none holds."""

    holding: list[Holding]
    best_failing: Holding | None
    num_seen: int
    num_simulated: int


def fewest_gpus(
    setting: Setting,
    workers: Workers,
    bounds: Bounds,
    pairs: Iterable[Candidate],
    rate: float,
    num_wanted: int,
    note: Note,
) -> Fewest:
    """The smallest that hold at ``rate``, up to ``num_wanted``, made from ``pairs`` by adding instances."""
    problem = setting.problem
    target = problem.slo.attainment
    open_: dict[Candidate, Placement] = {}
    seen: set[Candidate] = set()
    alone: dict[tuple[Shape, int], Measurement] = {}
    holding: list[Holding] = []
    best: Holding | None = None
    num_simulated = 0

    def add(candidate: Candidate) -> None:
        counts = tuple(_enough(alone, pool, target) for pool in candidate.pools)
        candidate = candidate.with_counts(*counts)
        if candidate in seen or max(counts) > problem.search.max_instances:
            return
        seen.add(candidate)
        if candidate.num_gpus <= problem.cluster.num_gpus:
            placement = candidate.placement(problem)
            if placement is not None:
                if network_capacity(problem, setting.offered, placement) * _SLACK < rate:
                    widen(candidate)
                else:
                    open_[candidate] = placement

    def widen(candidate: Candidate, failed: Measurement | None = None) -> None:
        counts = [count for _, count in candidate.pools]
        if candidate.kind is Kind.COLOCATED and failed is not None:
            add(candidate.with_counts(_beyond(counts[0], failed)))
            return
        for index in range(len(counts)):
            add(candidate.with_counts(*(count + (place == index) for place, count in enumerate(counts))))

    for pair in pairs:
        if all(bounds.can_serve(shape) for shape, _ in pair.pools):
            add(
                pair.with_counts(
                    *(max(int(-(-rate // (bounds.of_shape(shape).capacity * _SLACK))), 1) for shape, _ in pair.pools)
                )
            )
    while smaller := [candidate for candidate in open_ if candidate.num_gpus < _most_gpus(holding, num_wanted)]:
        ranked = sorted(smaller, key=lambda c: (c.num_gpus, open_[c].num_nodes, str(c)))
        phases: dict[tuple[Shape, int], PhasePoint] = {}
        joint: dict[Candidate, JointPoint] = {}
        for candidate in ranked:
            unknown = [pool for pool in candidate.pools if pool not in alone and candidate.kind is Kind.DISAGGREGATED]
            if unknown:
                phases.setdefault(unknown[0], PhasePoint(*unknown[0], rate))
            else:
                joint[candidate] = JointPoint(open_[candidate], rate, fine=True)
            if len(phases) + len(joint) >= _WAVE:
                break
        note(f"{ranked[0].num_gpus} GPUs: {ranked[0]}", len(seen) - len(open_), len(seen))
        tasks: list[Callable[[Setting], Measurement]] = [*phases.values(), *joint.values()]
        results = workers.run(tasks)
        num_simulated += len(joint)
        alone.update(zip(phases, results, strict=False))
        for candidate, measurement in zip(joint, results[len(phases) :], strict=True):
            entry = Holding(candidate, open_.pop(candidate), measurement)
            if measurement.point.surely_holds(target):
                holding.append(entry)
                continue
            if best is None or _closer(measurement, best.measurement):
                best = entry
            widen(candidate, measurement)
        for candidate in list(open_):
            if any(_enough(alone, pool, target) > pool[1] for pool in candidate.pools):
                del open_[candidate]
                add(candidate)
    holding.sort(key=in_order)
    return Fewest(holding[:num_wanted], best, len(seen), num_simulated)


def in_order(holding: Holding) -> tuple[int, int, float]:
    """Fewest GPUs first, then fewest nodes, then most attained."""
    return holding.candidate.num_gpus, holding.placement.num_nodes, -holding.measurement.point.attainment.estimate


def _most_gpus(holding: list[Holding], num_wanted: int) -> float:
    """A candidate with fewer GPUs than this would be among the ``num_wanted`` smallest that hold, if it held."""
    sizes = sorted(entry.candidate.num_gpus for entry in holding)
    return sizes[num_wanted - 1] if len(sizes) >= num_wanted else math.inf


def _enough(alone: dict[tuple[Shape, int], Measurement], pool: tuple[Shape, int], target: float) -> int:
    """The pool's count, or the next that does not surely fail as far as is known."""
    shape, count = pool
    while (shape, count) in alone and alone[shape, count].point.surely_fails(target):
        count = _beyond(count, alone[shape, count])
    return count


def _beyond(count: int, failed: Measurement) -> int:
    """The next number of instances worth a look, ``count`` having failed: what an overloaded pool served says more."""
    served = failed.throughput / failed.point.rate
    if 0.1 < served < _OVERLOADED:
        return max(count + 1, math.ceil(_SURELY * count / served))
    return count + 1


def _closer(one: Measurement, other: Measurement) -> bool:
    """More stable, then more attained."""
    return (one.point.is_stable, one.point.attainment.estimate) > (
        other.point.is_stable,
        other.point.attainment.estimate,
    )
