"""What a plan's promise depends on: other rates and lengths, a lost instance, an instance more.

Every variant is the chosen placement changed in one thing and simulated like the plan itself, with the same seeds: a
difference is the change's. The rate is the planned one, or the goodput where none was asked for.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from distserve.core.config import ParallelConfig, Role
from distserve.core.topology import PlacedInstance, Placement
from placement.deployment import Whole
from placement.evaluation import binding_constraint
from placement.goodput import Goodput
from placement.layout import Seat, lay_out
from placement.measure import Effort, Measurement, measure
from placement.offered import Offered
from placement.outlook import Change, Curve, KvFlow, Outlook, Phases, Sample, Variant, rivals
from placement.plan import Evaluation, Plan
from placement.steady import measure_window
from placement.tasks import JointGoodput, Setting
from placement.workers import Workers
from simulator.results import Simulation

Progress = Callable[[int, int], None]
"""Told how many of how many simulations are done."""

T = TypeVar("T")

_STEP = 0.2
_ABOVE = (1.15, 1.4)
"""How far above its goodput a placement is watched breaking: as near as it is seen, for the sake of what is first."""
_CEILING = 1.6
"""Goodput of a placement with an instance more or less is looked for up to so many times what its GPUs suggest."""
_MAX_SAMPLES = 3
_MAX_CURVES = 4
_CURVE = (0.4, 0.6, 0.8, 0.9, 1.0, 1.1, 1.25, 1.5)
"""Rates of a curve, as shares of the goodput."""
_MIN_RUNS = 2


@dataclass(frozen=True)
class ScaledPoint:
    """A whole placement at one rate, the workload's lengths multiplied."""

    placement: Placement
    rate: float
    prompt_factor: float = 1.0
    output_factor: float = 1.0

    def __call__(self, setting: Setting) -> Measurement:
        """Simulate."""
        kinds = [(placed.spec.role, placed.spec.parallel) for placed in self.placement.instances]
        return measure(
            setting.runs(Whole(self.placement, self.prompt_factor, self.output_factor)),
            self.rate,
            setting.problem.slo,
            setting.offered.cv,
            _effort(setting, kinds, self.rate),
        )


def _effort(setting: Setting, kinds: Sequence[tuple[Role, ParallelConfig]], rate: float) -> Effort:
    """The same number of runs for everything, so that two variants saw the same requests."""
    effort = setting.effort(kinds, rate, fine=True)
    num, num_runs = effort.num_requests, min(_MIN_RUNS, effort.min_runs)
    return Effort(num, num_runs * num, min_runs=num_runs, half_width=1.0, until_decided=False)


@dataclass(frozen=True)
class _Planned:
    """A variant to be measured, or one that cannot be built and why."""

    change: Change
    label: str
    num_gpus: int
    placement: Placement | None
    rate: float
    prompt_factor: float = 1.0
    output_factor: float = 1.0
    reason: str = ""

    def task(self) -> ScaledPoint:
        """What measures it."""
        assert self.placement is not None
        return ScaledPoint(self.placement, self.rate, self.prompt_factor, self.output_factor)


def look_around(plan: Plan, progress: Progress | None = None, *, with_curves: bool = False) -> Outlook:
    """The outlook of ``plan``, by its problem's own search limits: deterministic, whatever the number of workers.

    ``with_curves`` measures the leading candidates over a range of rates too, which takes as long again.
    """
    chosen, problem = plan.chosen, plan.problem
    rate = chosen.point.rate
    planned = list(_variants(plan))
    above = [ScaledPoint(chosen.placement, factor * (chosen.goodput.estimate or rate)) for factor in _ABOVE]
    beside = [(name, rival, ScaledPoint(rival.placement, _fair_rate(plan, rival))) for name, rival in _beside(plan)]
    curves = [
        (name, found, [ScaledPoint(found.placement, share * found.goodput.estimate) for share in _CURVE])
        for name, found in (rivals(plan)[:_MAX_CURVES] if with_curves else [])
        if found.goodput.estimate > 0
    ]
    points = [*above, *(task for _, _, task in beside), *(task for _, _, tasks in curves for task in tasks)]
    points += [variant.task() for variant in planned if variant.placement is not None]
    resized = [v for v in planned if v.placement is not None and v.change in {Change.LOSS, Change.SIZE}]
    setting = Setting(problem, Offered(problem.workload, problem.search.seed))
    measured, goodputs = _run(setting, points, [_search(chosen, variant) for variant in resized], progress)
    base = measured[planned[0].task()]
    failing = next(
        (measured[task] for task in above if not measured[task].point.holds(problem.slo.attainment)),
        measured[above[-1]],
    )
    limits = {variant.label: found.interval.estimate for variant, found in zip(resized, goodputs, strict=True)}
    return Outlook(
        variants=tuple(
            Variant(
                variant.change,
                variant.label,
                variant.num_gpus,
                None if variant.placement is None else measured[variant.task()].point,
                limits.get(variant.label),
                variant.reason,
            )
            for variant in planned
        ),
        goodput_tolerance=max(((found.high - found.low) / found.high for found in goodputs), default=0.0),
        above=tuple(measured[task].point for task in above),
        breaks=binding_constraint(
            problem, chosen.placement, Goodput(chosen.goodput, 0.0, failing.point.rate, (failing,))
        ),
        phases=(_phases(base), _phases(failing)),
        samples=(
            _sample("chosen: " + chosen.label, base, setting),
            *(_sample(f"{name}: {rival.label}", measured[task], setting) for name, rival, task in beside),
        ),
        flows=_flows(chosen.placement, base.last, problem.model.kv.bytes_per_token),
        curves=tuple(
            Curve(name, found, tuple(measured[task].point for task in tasks)) for name, found, tasks in curves
        ),
    )


def _run(
    setting: Setting, points: Sequence[ScaledPoint], searches: Sequence[JointGoodput], progress: Progress | None
) -> tuple[dict[ScaledPoint, Measurement], list[Goodput]]:
    """Every point once, however often it is asked for, and the searches in their order."""
    unique = list(dict.fromkeys(points))
    total = len(unique) + len(searches)
    with Workers(setting, setting.problem.search.num_workers) as workers:
        # In small lots, so that the caller can show how far it is; each keeps all workers busy.
        measured: dict[ScaledPoint, Measurement] = {}
        for lot in _lots(unique):
            measured |= zip(lot, workers.run(lot), strict=True)
            _tell(progress, len(measured), total)
        goodputs: list[Goodput] = []
        for lots in _lots(searches):
            goodputs += workers.run(lots)
            _tell(progress, len(measured) + len(goodputs), total)
    return measured, goodputs


def _lots(tasks: Sequence[T], size: int = 4) -> Iterator[Sequence[T]]:
    for start in range(0, len(tasks), size):
        yield tasks[start : start + size]


def _tell(progress: Progress | None, done: int, total: int) -> None:
    if progress is not None:
        progress(done, total)


def _search(chosen: Evaluation, variant: _Planned) -> JointGoodput:
    """From what the variant's GPUs would serve if they served as much as the chosen placement's."""
    assert variant.placement is not None
    near = chosen.goodput.estimate * variant.num_gpus / chosen.num_gpus or variant.rate
    return JointGoodput(variant.placement, _CEILING * max(near, chosen.goodput.estimate), near)


def _beside(plan: Plan) -> list[tuple[str, Evaluation]]:
    """Whose latencies are drawn beside the chosen placement's: the best of other kinds first."""
    others = [(name, rival) for name, rival in rivals(plan) if rival is not plan.chosen and name != "finalist"]
    return sorted(others, key=lambda other: other[1].kind is plan.chosen.kind)[: _MAX_SAMPLES - 1]


def _fair_rate(plan: Plan, rival: Evaluation) -> float:
    """A rate that was asked for is asked of everyone; else each serves as much per GPU as the chosen placement."""
    rate = plan.chosen.point.rate
    return rate if plan.problem.rate is not None else rate * rival.num_gpus / plan.chosen.num_gpus


def _variants(plan: Plan) -> Iterator[_Planned]:
    """What is asked of the chosen placement, in the order of the report."""
    placement, rate, num_gpus = plan.chosen.placement, plan.chosen.point.rate, plan.chosen.num_gpus
    yield _Planned(Change.LOAD, "as planned", num_gpus, placement, rate)
    for sign, word in ((1, "+"), (-1, "-")):
        factor = 1 + sign * _STEP
        yield _Planned(Change.LOAD, f"rate {word}{_STEP:.0%}", num_gpus, placement, factor * rate)
    for sign, word in ((1, "+"), (-1, "-")):
        factor = 1 + sign * _STEP
        yield _Planned(Change.LENGTHS, f"prompts {word}{_STEP:.0%}", num_gpus, placement, rate, prompt_factor=factor)
        yield _Planned(Change.LENGTHS, f"outputs {word}{_STEP:.0%}", num_gpus, placement, rate, output_factor=factor)
    roles = [role for role in Role if placement.of(role)]
    for role in roles:
        yield _without(placement, role, rate)
    for role in roles:
        yield _with_one_more(placement, role, rate)


def _without(placement: Placement, role: Role, rate: float) -> _Planned:
    """N+1: the instances of a role are equal, so the loss of the last one stands for any."""
    lost = placement.of(role)[-1]
    left = Placement(placement.cluster, tuple(kept for kept in placement.instances if kept is not lost))
    if not (left.of(Role.MIXED) or (left.of(Role.PREFILL) and left.of(Role.DECODE))):
        reason = f"no {role} instance is left"
        return _Planned(Change.LOSS, f"one {role} lost", left.num_gpus, None, rate, reason=reason)
    return _Planned(Change.LOSS, f"one {role} lost", left.num_gpus, left, rate)


def _with_one_more(placement: Placement, role: Role, rate: float) -> _Planned:
    """One instance more of a role, all instances seated anew."""
    pools = [list(placement.of(each)) for each in Role if placement.of(each)]
    grown = [[*pool, pool[-1]] if pool[0].spec.role is role else pool for pool in pools]
    seated = lay_out(placement.cluster, [Seat(pool[0].spec.parallel, len(pool), _span(pool)) for pool in grown])
    label = f"one {role} more"
    num_gpus = sum(len(placed.gpus) for pool in grown for placed in pool)
    if seated is None:
        return _Planned(Change.SIZE, label, num_gpus, None, rate, reason="the cluster has no room")
    instances = tuple(
        PlacedInstance(replace(placed.spec, instance_id=f"{placed.spec.role}-{number}"), gpus)
        for pool, seats in zip(grown, seated, strict=True)
        for number, (placed, gpus) in enumerate(zip(pool, seats, strict=True))
    )
    return _Planned(Change.SIZE, label, num_gpus, Placement(placement.cluster, instances), rate)


def _span(pool: Sequence[PlacedInstance]) -> int:
    """Nodes over which each instance of a pool is seated."""
    return len({gpu.node for gpu in pool[0].gpus})


# -- reading runs ----------------------------------------------------------------------------------------------------


def _sample(label: str, found: Measurement, setting: Setting) -> Sample:
    """Of the last run, its warm-up and drain cut as for the plan."""
    window = measure_window(found.last.timelines, setting.problem.slo, setting.offered.cv)
    return Sample(label, found.point.rate, window.ttft, window.tpot)


def _phases(found: Measurement) -> Phases:
    """Of the last run; a phase that did not happen (no pull on a mixed instance) took no time."""
    lines, point = found.last.timelines, found.point
    pulled = np.where(np.isfinite(lines.migration_end), lines.migration_end, lines.first_token)
    ready = np.maximum(lines.first_token, pulled)
    begun = np.maximum(np.where(np.isfinite(lines.decode_start), lines.decode_start, ready), ready)

    def mean(values: NDArray[np.float64]) -> float:
        answered = values[np.isfinite(values)]
        return float(answered.mean()) if len(answered) else float("nan")

    return Phases(
        rate=point.rate,
        queue=mean(lines.prefill_start - lines.arrival),
        prefill=mean(lines.first_token - lines.prefill_start),
        transfer=mean(ready - lines.first_token),
        wait=mean(begun - ready),
        decode=mean(lines.finish - begun),
        missed_ttft=1 - point.ttft_attainment,
        missed_tpot=1 - point.tpot_attainment,
    )


def _flows(placement: Placement, run: Simulation, bytes_per_token: int) -> tuple[KvFlow, ...]:
    """KV bytes/s between instances, of the prompts that were handed over."""
    lines = run.timelines
    moved = (lines.prefill_id >= 0) & (lines.decode_id >= 0) & (lines.prefill_id != lines.decode_id)
    positions = {placed.spec.instance_id: number for number, placed in enumerate(placement.instances)}
    totals = np.zeros((len(run.instances), len(run.instances)))
    np.add.at(totals, (lines.prefill_id[moved], lines.decode_id[moved]), lines.prompt_tokens[moved])
    return tuple(
        KvFlow(
            positions[run.instances[source].instance_id],
            positions[run.instances[target].instance_id],
            float(totals[source, target]) * bytes_per_token / run.duration,
        )
        for source, target in zip(*np.nonzero(totals), strict=True)
    )
