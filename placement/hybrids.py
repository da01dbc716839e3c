"""Hybrid candidates, prefill beside mixed instances, made of what the search for the other two kinds has shown.

A search of their own would cost as much as both others together: so their shapes are those of the leaders, and of all
numbers of instances those are looked at whose division of the GPUs is nearest to the best disaggregated one. A hybrid
is more to run than either of the others: it has to do better than they do, and equal ones need not be found.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from math import gcd

from distserve.core.config import PrefillPolicy, Role
from placement.candidates import Candidate, Kind, pairs, replications
from placement.fewest import Fewest, Holding, in_order
from placement.problem import Problem
from placement.race import Bounds, Note
from placement.shapes import Shape
from placement.tasks import JointPoint, Setting
from placement.workers import Workers

_NEAREST = 6
"""Divisions looked at of one pair of shapes."""


@dataclass(frozen=True, slots=True)
class Seed:
    """A prefill and a mixed instance, and the ``share`` of the GPUs that prefill has in the placement they are from."""

    single: Candidate
    share: float


def find_seeds(problem: Problem, shapes: Iterable[Shape], leaders: Sequence[Candidate]) -> list[Seed]:
    """From disaggregated ``leaders``; mixed instances are the colocated leaders' or shaped like those that decode."""
    mixed = [shape for shape in shapes if (shape.role, shape.policy) == (Role.MIXED, PrefillPolicy.SPLITFUSE)]
    leading = {leader.pools[0][0] for leader in leaders if leader.kind is Kind.COLOCATED}
    seeds: dict[Candidate, Seed] = {}
    for leader in leaders:
        if leader.kind is Kind.DISAGGREGATED:
            (prefill, _), (decode, _) = leader.pools
            partners = [shape for shape in mixed if shape in leading or shape.parallel == decode.parallel]
            for single in pairs(problem, [prefill, *partners], Role.MIXED):
                seeds.setdefault(single, Seed(single, _share(leader)))
    return list(seeds.values())


def hybrid_units(problem: Problem, seeds: Iterable[Seed]) -> list[Candidate]:
    """Units to be replicated. Of every ratio of instances the largest: instances that share a queue serve more each."""
    units: dict[Candidate, None] = {}
    for seed in seeds:
        largest: dict[tuple[int, int], Candidate] = {}
        for unit in replications(problem, seed.single):
            (_, first), (_, second) = unit.pools
            largest[first // gcd(first, second), second // gcd(first, second)] = unit
        units |= dict.fromkeys(_nearest(seed, largest.values()))
    return list(units)


def fewer_gpus(
    setting: Setting,
    workers: Workers,
    bounds: Bounds,
    seeds: Sequence[Seed],
    rate: float,
    num_known: int,
    note: Note,
) -> Fewest:
    """The hybrid with the fewest GPUs that holds at ``rate``, if it takes fewer than ``num_known``.

    From above: instances more do no harm, so where none of the largest holds no smaller one does.
    """
    problem = setting.problem
    target = problem.slo.attainment
    best: Holding | None = None
    num_gpus, num_seen, num_simulated = num_known, 0, 0
    while True:
        largest = [candidate for seed in seeds for candidate in _largest(problem, bounds, seed, rate, num_gpus - 1)]
        note(f"hybrids of fewer than {num_gpus} GPUs", num_seen, num_seen + len(largest))
        found = [(candidate, placement) for candidate in largest if (placement := candidate.placement(problem))]
        num_seen += len(largest)
        num_simulated += len(found)
        # A short look first: what surely fails then needs no interval.
        roughly = workers.run([JointPoint(placement, rate) for _, placement in found])
        hopeful = [entry for entry, short in zip(found, roughly, strict=True) if not short.point.surely_fails(target)]
        results = workers.run([JointPoint(placement, rate, fine=True) for _, placement in hopeful])
        held = [
            Holding(*entry, measurement)
            for entry, measurement in zip(hopeful, results, strict=True)
            if measurement.point.surely_holds(target)
        ]
        if not held:
            return Fewest([best] if best is not None else [], None, num_seen, num_simulated)
        best = min(held, key=in_order)
        num_gpus = best.candidate.num_gpus


def _largest(problem: Problem, bounds: Bounds, seed: Seed, rate: float, num_gpus: int) -> list[Candidate]:
    """Prefill instances, as many mixed ones as ``num_gpus`` have room for beside them, if they may serve ``rate``."""
    return _nearest(
        seed,
        (unit for unit in _divisions(problem, seed.single, num_gpus) if bounds.of_candidate(unit) >= rate),
    )


def _divisions(problem: Problem, single: Candidate, num_gpus: int) -> Iterator[Candidate]:
    prefill, mixed = (shape.num_gpus for shape, _ in single.pools)
    most = problem.search.max_instances
    for first in range(1, min(num_gpus // prefill, most) + 1):
        second = min((num_gpus - first * prefill) // mixed, most)
        if second:
            yield single.with_counts(first, second)


def _nearest(seed: Seed, units: Iterable[Candidate]) -> list[Candidate]:
    return sorted(units, key=lambda unit: abs(_share(unit) - seed.share))[:_NEAREST]


def _share(candidate: Candidate) -> float:
    """Of its GPUs, what its first pool has."""
    shape, count = candidate.pools[0]
    return shape.num_gpus * count / candidate.num_gpus
