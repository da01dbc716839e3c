"""The planner: from a problem to a plan.

Without a rate the answer is the unit with the best goodput per GPU, to be replicated. With one it is the placement with
the fewest GPUs that holds the objective at that rate with its whole interval; then the fewest nodes. Disaggregated and
colocated placements are searched for themselves, so that a plan can say what the other would have cost; hybrids of
their leaders then have to do better than both.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from distserve.core.config import Role
from placement.candidates import Candidate, Kind, colocated, pairs, replications
from placement.evaluation import evaluate
from placement.fewest import Holding, fewest_gpus
from placement.goodput import Goodput
from placement.hybrids import fewer_gpus, find_seeds, hybrid_units
from placement.offered import Offered
from placement.plan import Evaluation, Plan, SearchStats
from placement.problem import Problem
from placement.race import Bounds, Note, Ranked, race
from placement.shapes import Shape, find_shapes
from placement.tasks import COARSE_TOLERANCE, SHORT_RUNS_FLATTER, JointGoodput, JointPoint, Setting
from placement.unreachable import explain_unreachable
from placement.workers import Workers

_TIE = 0.01
"""Goodputs per GPU closer than this are equal: fewer GPUs and nodes decide, then what is simpler to run."""


def silent(what: str, done: int, total: int) -> None:
    """Progress nobody looks at."""


@dataclass
class _Count:
    """How much was looked at."""

    candidates: int = 0
    pruned: int = 0
    simulated: int = 0


def find_plan(problem: Problem, progress: Note = silent, paper: Candidate | None = None) -> Plan:
    """The plan for ``problem``. ``paper`` is a placement to be measured beside, and to be beaten.

    ``progress`` hears what is going on and how many candidates are settled of how many; from several threads, for kinds
    of placement that are looked at side by side. Raises UnreachableError if no
    placement on the cluster reaches the objective; ConfigError and WorkloadError for a problem that is wrong itself.
    """
    began = time.perf_counter()
    setting = Setting(problem, Offered(problem.workload, problem.search.seed))
    shapes, refused = find_shapes(problem, setting.offered)
    bounds = Bounds(setting)
    usable = [shape for shape in shapes if bounds.can_serve(shape)]
    with Workers(setting, problem.search.num_workers) as workers:
        searcher = _Searcher(setting, workers, bounds, progress)
        if problem.rate is None:
            evaluations = searcher.best_units(usable, paper)
        else:
            evaluations = searcher.fewest(usable, problem.rate, paper)
        measured_paper = searcher.evaluate_paper()
        if measured_paper is not None:
            evaluations.append(measured_paper)
        if not any(evaluation.goodput.estimate for evaluation in evaluations):
            raise explain_unreachable(setting, bounds, shapes, refused, searcher.closest)
    count = searcher.count
    notes = [f"step times: {problem.latency.source}"]
    if paper is not None and measured_paper is None:
        notes.append(f"the placement as given, {paper}, was not measured: the cluster has no room for it")
    key = _by_size if problem.rate is not None else _by_goodput
    ordered = sorted(evaluations, key=key)
    chosen = _chosen(problem, ordered)
    others = [evaluation for evaluation in ordered if evaluation.placement != chosen.placement]

    def first_of(kind: Kind) -> Evaluation | None:
        return next((evaluation for evaluation in [chosen, *others] if evaluation.kind is kind), None)

    stats = SearchStats(
        num_candidates=count.candidates,
        num_pruned=count.pruned,
        num_simulated=count.simulated,
        num_requests=workers.num_requests,
        seconds=time.perf_counter() - began,
    )
    return Plan(
        problem=problem,
        chosen=chosen,
        runner_up=others[0] if others else None,
        finalists=(chosen, *others),
        disaggregated=first_of(Kind.DISAGGREGATED),
        colocated=first_of(Kind.COLOCATED),
        hybrid=first_of(Kind.HYBRID),
        paper=measured_paper,
        stats=stats,
        notes=tuple(notes),
    )


def _by_goodput(evaluation: Evaluation) -> tuple[float, tuple[int, int, bool]]:
    return -evaluation.goodput_per_gpu, _size(evaluation)


def _by_size(evaluation: Evaluation) -> tuple[tuple[int, int, bool], float]:
    return _size(evaluation), -evaluation.goodput.estimate


def _size(evaluation: Evaluation) -> tuple[int, int, bool]:
    """What decides between equals: GPUs, nodes, and whether there are two ways for a prompt to go."""
    return evaluation.num_gpus, evaluation.placement.num_nodes, evaluation.kind is Kind.HYBRID


def _chosen(problem: Problem, ordered: Sequence[Evaluation]) -> Evaluation:
    """The first that keeps its promise; without a rate, the smallest of those as good per GPU as the best."""
    if problem.rate is not None:
        return next((e for e in ordered if e.point.surely_holds(problem.slo.attainment)), ordered[0])
    equal = [e for e in ordered if _as_good(e, ordered[0], problem.search.tolerance)]
    return min(equal, key=lambda e: (_size(e), -e.goodput_per_gpu))


def _as_good(one: Evaluation, best: Evaluation, tolerance: float) -> bool:
    """Closer than a tie, or than goodputs are looked for, with intervals that overlap."""
    if one.goodput_per_gpu >= (1 - _TIE) * best.goodput_per_gpu:
        return True
    return one.overlaps(best) and one.goodput_per_gpu >= (1 - tolerance) * best.goodput_per_gpu


def _cheap_first(found: Sequence[Ranked]) -> list[Ranked]:
    """Of equally good ones those of few requests/s: they take least to simulate, and their goodput bars the others."""
    bar = (1 - COARSE_TOLERANCE) * max((entry.per_gpu for entry in found), default=0.0)
    return sorted(found, key=lambda entry: entry.goodput.interval.estimate if entry.per_gpu >= bar else float("inf"))


class _Searcher:
    def __init__(self, setting: Setting, workers: Workers, bounds: Bounds, progress: Note) -> None:
        self._setting = setting
        self._workers = workers
        self._bounds = bounds
        self._progress = progress
        self.count = _Count()
        self.closest: Holding | None = None
        self.evaluate_paper: Callable[[], Evaluation | None] = lambda: None
        """Waits for the paper's placement, which is measured as the finalists are, beside them."""

    # -- the best goodput per GPU -------------------------------------------------------------------------------------

    def best_units(self, shapes: list[Shape], paper: Candidate | None) -> list[Evaluation]:
        """Finalists of every kind, measured with intervals."""
        problem = self._setting.problem
        kinds = self._kinds(shapes, problem.search.num_finalists)
        # The paper's placement is measured in any case, and may be the only one there is.
        units = [[u for single in kind for u in replications(problem, single) if u != paper] for kind, _ in kinds]
        races = [partial(self._race, rivals, wanted) for rivals, (_, wanted) in zip(units, kinds, strict=True)]
        raced = self._workers.side_by_side(races)
        for rivals, found in zip(units, raced, strict=True):
            self._tally(len(rivals), len(found))
        if paper is not None and (any(raced) or self._bounds.of_candidate(paper) > 0):
            self.evaluate_paper = self._begin(paper)
        finals = [partial(self._refine, found, wanted) for found, (_, wanted) in zip(raced, kinds, strict=True)]
        measured = [evaluation for of_kind in self._workers.side_by_side(finals) for evaluation in of_kind]
        if problem.search.hybrid:
            ordered = sorted(measured, key=_by_goodput)
            seeds = find_seeds(problem, shapes, [e.candidate for e in ordered if e.candidate is not None])
            # More than goodputs are told apart by, else it is not worth an interval.
            ahead = 1 + problem.search.tolerance
            beaten = ahead * max((evaluation.goodput_per_gpu for evaluation in measured), default=0.0)
            hybrids = [unit for unit in hybrid_units(problem, seeds) if unit != paper]
            found = self._race(hybrids, 1, beaten)
            self._tally(len(hybrids), len(found))
            measured += self._refine(found, problem.search.num_finalists, beaten)
        return measured

    def _race(self, units: Sequence[Candidate], num_wanted: int, beaten: float = 0.0) -> list[Ranked]:
        return race(self._setting, self._workers, self._bounds, units, num_wanted, self._progress, beaten)

    def _refine(self, found: Sequence[Ranked], wanted: int, beaten: float = 0.0) -> list[Evaluation]:
        """Measure a race's leaders with intervals, until none of the rest looked better than the best of them is.

        ``beaten`` requests/s and GPU are known to be served by others.
        """
        best = beaten
        waiting = [entry for entry in _cheap_first(found) if entry.per_gpu > best]
        measured: list[Evaluation] = []
        while waiting:
            leaders, waiting = waiting[:wanted], waiting[wanted:]
            self._progress("measuring the leaders with intervals", len(measured), len(measured) + len(leaders))
            floor = (1 - _TIE) * best
            measured += [entry for entry in self._measure(leaders, floor) if entry.goodput.estimate > 0]
            best = max([best, *(entry.goodput_per_gpu for entry in measured)])
            waiting = sorted((entry for entry in waiting if entry.per_gpu > best), key=lambda entry: -entry.per_gpu)
        return measured

    def _measure(self, leaders: Sequence[Ranked], floor: float) -> list[Evaluation]:
        """Goodputs with intervals; one below ``floor`` (requests/s and GPU) is only known to be."""
        tasks = [
            JointGoodput(
                entry.placement,
                self._bounds.of_candidate(entry.candidate),
                SHORT_RUNS_FLATTER * entry.goodput.interval.estimate,
                floor * entry.candidate.num_gpus,
                fine=True,
            )
            for entry in leaders
        ]
        goodputs: list[Goodput] = self._workers.run(tasks)
        return [
            evaluate(self._setting.problem, str(e.candidate), e.placement, goodput, None, e.candidate)
            for e, goodput in zip(leaders, goodputs, strict=True)
        ]

    # -- the fewest GPUs at a rate ----------------------------------------------------------------------------------

    def fewest(self, shapes: list[Shape], rate: float, paper: Candidate | None) -> list[Evaluation]:
        """Placements of every kind that hold at ``rate``, with their goodput."""
        problem = self._setting.problem
        holding: list[Holding] = []
        leaders: list[Candidate] = []
        for kind, wanted in self._kinds(shapes, problem.search.num_finalists):
            found = fewest_gpus(self._setting, self._workers, self._bounds, kind, rate, wanted, self._progress)
            self._tally(found.num_seen, found.num_simulated)
            holding += found.holding
            nearest = found.holding or ([found.best_failing] if found.best_failing is not None else [])
            leaders += [entry.candidate for entry in nearest]
            if self.closest is None or (found.best_failing is not None and not found.holding):
                self.closest = found.best_failing or self.closest
        if problem.search.hybrid:
            seeds = find_seeds(problem, shapes, leaders)
            num_known = min((entry.candidate.num_gpus for entry in holding), default=problem.cluster.num_gpus + 1)
            found = fewer_gpus(self._setting, self._workers, self._bounds, seeds, rate, num_known, self._progress)
            self._tally(found.num_seen, found.num_simulated)
            holding += found.holding
        if paper is not None and holding:
            self.evaluate_paper = self._begin(paper)
        tasks = [
            JointGoodput(
                entry.placement,
                max(self._bounds.of_candidate(entry.candidate), rate * 1.01),
                rate,
                fine=False,
            )
            for entry in holding
            if entry.candidate != paper
        ]
        self._progress("measuring the finalists", 0, len(tasks))
        goodputs: list[Goodput] = self._workers.run(tasks)
        kept = [entry for entry in holding if entry.candidate != paper]
        return [
            evaluate(problem, str(e.candidate), e.placement, goodput, e.measurement, e.candidate)
            for e, goodput in zip(kept, goodputs, strict=True)
        ]

    # -- shared -----------------------------------------------------------------------------------------------------

    def _begin(self, candidate: Candidate) -> Callable[[], Evaluation | None]:
        """Begin to measure one candidate; the answer is None where the cluster has no room for it."""
        problem = self._setting.problem
        placement = candidate.placement(problem)
        if placement is None:
            return lambda: None
        ceiling = self._bounds.of_candidate(candidate)
        if ceiling <= 0:
            ceiling = sum(self._bounds.of_shape(shape).capacity * count for shape, count in candidate.pools)
        goodput = self._workers.begin(JointGoodput(placement, ceiling, None, fine=True))
        rate = problem.rate
        at = self._workers.begin(JointPoint(placement, rate, fine=True)) if rate is not None else None
        return lambda: evaluate(problem, str(candidate), placement, goodput(), at and at(), candidate)

    def _kinds(self, shapes: list[Shape], num_wanted: int) -> list[tuple[list[Candidate], int]]:
        """Disaggregated candidates, then the colocated ones of each policy; how many finalists each may have."""
        kinds = [(list(pairs(self._setting.problem, shapes)), num_wanted)]
        for policy in self._setting.problem.search.policies:
            mixed = [shape for shape in shapes if shape.role is Role.MIXED and shape.policy is policy]
            kinds.append((list(colocated(mixed)), 1))
        return kinds

    def _tally(self, num_seen: int, num_simulated: int) -> None:
        self.count.candidates += num_seen
        self.count.simulated += num_simulated
        self.count.pruned += num_seen - num_simulated
