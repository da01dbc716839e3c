"""Ways of serving one workload on a fixed fleet, each with its knobs where its goodput is best.

All knobs point the same way: turned up they favour TTFT, turned down TPOT. With a pool of prefill instances one is how
many of the fleet are in that pool, with Dynamic SplitFuse one is the tokens of a step; a hybrid has both, whole prompts
have none. The best setting is climbed to from an estimate, first in the direction of what was missed.

Knows nothing of maps and how they are drawn. Rates, steady states, goodput and bounds are the planner's.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from distserve.core.config import ParallelConfig, PrefillPolicy, Role
from distserve.core.errors import ConfigError
from distserve.core.latency import StepShape, StepTime
from distserve.core.topology import Gpu, PlacedInstance, Placement
from placement.bounds import ShapeBound, bound_shape, network_capacity
from placement.deployment import Whole
from placement.evaluation import binding_constraint
from placement.goodput import Goodput, find_goodput
from placement.measure import Effort, Runs, measure, one_by_one
from placement.offered import Offered
from placement.plan import Interval
from placement.problem import Problem
from placement.shapes import Shape, find_shapes
from simulator.latency.interface import LatencyModel

BUDGETS = (64, 128, 256, 512, 1024, 2048, 4096, 8192)
TOLERANCE, BETTER = 0.08, 1.03
"""See :class:`Fleet`."""

_SLACK = 1.02
"""On capacities, which are of mean lengths: a run may have seen shorter requests."""
_LIKELY = 0.75
"""Of a capacity: where a goodput is looked for first."""
_CROWDED = 0.85
"""Share of its capacity at which a prefill pool is expected to meet its TTFT."""


@dataclass(frozen=True, slots=True)
class Mode:
    """A way of serving: the ``roles`` of its pools, ``letter`` for short."""

    name: str
    letter: str
    roles: tuple[Role, ...]
    policy: PrefillPolicy = PrefillPolicy.SPLITFUSE

    @property
    def moves_kv(self) -> bool:
        """Whether KV goes over the network: only then its bandwidth matters."""
        return Role.PREFILL in self.roles

    @property
    def is_hybrid(self) -> bool:
        """Whether prompts are computed on either of its pools."""
        return self.moves_kv and Role.MIXED in self.roles


MODES = (
    Mode("SplitFuse", "S", (Role.MIXED,)),
    Mode("whole prompts", "W", (Role.MIXED,), PrefillPolicy.WHOLE_PROMPT),
    Mode("disaggregated", "D", (Role.PREFILL, Role.DECODE)),
    Mode("hybrid", "H", (Role.PREFILL, Role.MIXED)),
)


@dataclass(frozen=True, slots=True)
class Knob:
    """A setting: ``num_prefill`` instances (0: the mode has no such pool), and tokens of a mixed instance's step.

    ``budget`` is 0 where no instance is mixed.
    """

    num_prefill: int = 0
    budget: int = 0


class OneShape:
    """The step times of one shape alone, built once. ``latency`` is where they are from."""

    def __init__(self, latency: LatencyModel, parallel: ParallelConfig) -> None:
        self.source = latency.source
        self._parallel = parallel
        self._step_time = latency.step_time(parallel)

    def step_time(self, parallel: ParallelConfig, *, stages_share_node: bool = True) -> StepTime:  # noqa: ARG002 -- the protocol's
        """See LatencyModel."""
        if parallel != self._parallel:
            raise ConfigError(f"the fleet's instances are TP{self._parallel.tp} PP{self._parallel.pp}")
        return self._step_time


@dataclass(frozen=True, slots=True)
class Pace:
    """How long runs are: so many residences of a request and so many times its patience, within bounds in requests."""

    residences: float = 8.0
    patiences: float = 16.0
    least: int = 800
    most: int = 6000


@dataclass(frozen=True)
class Found:
    """The goodput of a mode, the setting of its knobs, also in words, and what limits it."""

    mode: Mode
    knob: Knob
    setting: str
    goodput: Goodput
    binding: str
    num_simulated: int


@dataclass(frozen=True)
class Fleet:
    """``num_instances`` equal instances of ``parallel`` that serve ``problem``'s workload within its objective.

    ``patience`` (seconds) is at least the TTFT limit: a queue that grows must have the time to become too long.
    ``tolerance`` is how far apart the rate that held and the one that failed may stay, as a share of the latter. A
    setting that is not ``better`` than the best one by this factor is not looked at closely.
    """

    problem: Problem
    parallel: ParallelConfig
    num_instances: int
    patience: float
    pace: Pace = Pace()
    tolerance: float = TOLERANCE
    better: float = BETTER

    @property
    def num_gpus(self) -> int:
        """GPUs of all instances."""
        return self.num_instances * self.parallel.num_ranks

    @cached_property
    def offered(self) -> Offered:
        """The same requests for every mode, at every rate."""
        return Offered(self.problem.workload, self.problem.search.seed)

    @cached_property
    def shapes(self) -> dict[tuple[Role, PrefillPolicy], Shape]:
        """The kinds of instances, as the planner would start them."""
        shapes, refused = find_shapes(self.problem, self.offered)
        if not shapes:
            raise ConfigError(f"no instance can be: {refused[0].reason if refused else 'the cluster is too small'}")
        return {(shape.role, shape.policy): shape for shape in shapes}

    @cached_property
    def step_time(self) -> StepTime:
        """Of every instance."""
        return self.problem.latency.step_time(self.parallel)

    # -- knobs --------------------------------------------------------------------------------------------------------

    def knobs(self, mode: Mode, beside: Knob | None = None) -> Sequence[Knob]:
        """The settings of a mode's knob, ascending; of a hybrid, with the budget of ``beside`` (None: a likely one)."""
        budget = beside.budget if beside is not None else self._likely_budget(mode)
        if mode.moves_kv:
            return [Knob(count, budget) for count in range(1, self.num_instances)]
        if mode.policy is PrefillPolicy.SPLITFUSE:
            return [Knob(budget=tokens) for tokens in BUDGETS]
        return [Knob(budget=budget)]

    def likely_knob(self, mode: Mode) -> Knob:
        """Where to look first: pools whose capacities within the objective are alike; the planner's token budget."""
        if not mode.moves_kv:
            return Knob(budget=self._likely_budget(mode))
        prefill = _CROWDED * self._bound(self._apart(Role.PREFILL)).capacity
        decode = self._decode_rate()

        def rate(knob: Knob) -> float:
            return min(knob.num_prefill * prefill, (self.num_instances - knob.num_prefill) * decode)

        return max(self.knobs(mode), key=rate)

    def _likely_budget(self, mode: Mode) -> int:
        return self.shapes[Role.MIXED, mode.policy].max_batch_tokens if Role.MIXED in mode.roles else 0

    def setting(self, mode: Mode, knob: Knob) -> str:
        """The instances of a mode at one setting of its knobs, in words."""
        pools = " + ".join(f"{count}{shape.role[0].upper()}" for shape, count in self.pools(mode, knob))
        return f"{pools}, {knob.budget} tokens" if knob.budget else pools

    def pools(self, mode: Mode, knob: Knob) -> list[tuple[Shape, int]]:
        """The instances of a mode at one setting of its knobs."""
        counts = (knob.num_prefill, self.num_instances - knob.num_prefill) if mode.moves_kv else (self.num_instances,)
        shapes = [self._mixed(mode, knob) if role is Role.MIXED else self._apart(role) for role in mode.roles]
        return list(zip(shapes, counts, strict=True))

    def _apart(self, role: Role) -> Shape:
        return self.shapes[role, PrefillPolicy.SPLITFUSE]

    def _mixed(self, mode: Mode, knob: Knob) -> Shape:
        shape = self.shapes[Role.MIXED, mode.policy]
        most = self.problem.limits.max_batch_size
        kv = self.problem.kv(self.parallel, max(knob.budget, most))
        # A step that prompts share has room for a token of every sequence.
        size = min(most, knob.budget) if mode.policy is PrefillPolicy.SPLITFUSE else most
        return replace(shape, max_batch_tokens=knob.budget, max_batch_size=size, kv=kv or shape.kv)

    def placement(self, mode: Mode, knob: Knob) -> Placement:
        """Every pool on nodes of its own: whatever KV is moved crosses the network cards of both nodes."""
        cluster, tp = self.problem.cluster, self.parallel.tp
        per_node = cluster.gpus_per_node // tp
        instances: list[PlacedInstance] = []
        node = 0
        for shape, count in self.pools(mode, knob):
            for number in range(count):
                first = number % per_node * tp
                gpus = tuple(Gpu(node + number // per_node, first + shard) for shard in range(tp))
                instances.append(PlacedInstance(shape.spec(self.problem, f"{shape.role}-{number}"), gpus))
            node += -(-count // per_node)
        placement = Placement(cluster, tuple(instances))
        placement.check()
        return placement

    # -- goodput ------------------------------------------------------------------------------------------------------

    def best(self, mode: Mode, floor: float = 0.0, first: Knob | None = None) -> Found:
        """``mode`` with its knobs at their best; ``first`` is where to look first.

        A goodput below ``floor`` (requests/s) is of no interest: its ``low`` is 0.
        """
        tried: dict[Knob, Goodput] = {}
        at = self._along(self.knobs(mode, first), mode, first or self.likely_knob(mode), floor, tried)
        if mode.is_hybrid and tried[at].low > 0:
            steps = [replace(at, budget=budget) for budget in BUDGETS]
            better = self._along(steps, mode, at, floor, tried)
            at = better if better == at else self._along(self.knobs(mode, better), mode, better, floor, tried)
        return self._found(mode, at, tried[at], sum(goodput.num_simulated for goodput in tried.values()))

    def _along(self, knobs: Sequence[Knob], mode: Mode, first: Knob, floor: float, tried: dict[Knob, Goodput]) -> Knob:
        """The best of ``knobs``, from ``first`` on; what is looked at is added to what was ``tried``.

        The search climbs. A hybrid may have two peaks, little and much of it prefill, and while nothing holds ``floor``
        there is no slope: then every other setting is asked whether it is better.
        """
        if first not in tried:
            tried[first] = self.goodput(mode, first, floor)
        at = self._climb(knobs, mode, first, floor, tried)
        start = knobs.index(at)
        for knob in sorted(knobs, key=lambda knob: abs(knobs.index(knob) - start)):
            if (
                knob not in tried
                and (mode.is_hybrid or tried[at].low == 0)
                and self._is_better(knob, mode, at, floor, tried)
            ):
                at = self._climb(knobs, mode, knob, floor, tried)
        return at

    def _climb(self, knobs: Sequence[Knob], mode: Mode, at: Knob, floor: float, tried: dict[Knob, Goodput]) -> Knob:
        """Where going to a better neighbour leads, from ``at`` on."""
        while True:
            place = knobs.index(at)
            direction = 1 if _misses_ttft(tried[at]) else -1
            for near in (place + direction, place - direction):
                if not 0 <= near < len(knobs) or knobs[near] in tried:
                    continue
                if self._is_better(knobs[near], mode, at, floor, tried):
                    at = knobs[near]
                    break
            else:
                return at

    def _is_better(self, knob: Knob, mode: Mode, best: Knob, floor: float, tried: dict[Knob, Goodput]) -> bool:
        """Whether ``knob`` is better than the ``best`` of those ``tried``; looked at no closer than it takes to see."""
        reached = tried[best].interval.estimate
        tried[knob] = self.goodput(mode, knob, max(floor, self.better * reached), reached)
        return _rank(tried[knob]) > _rank(tried[best])

    def unless_slower(self, found: Found, floor: float = 0.0) -> Found:
        """What was found on a faster network, if it holds on this one; else the best there is here."""
        goodput = found.goodput
        if goodput.low <= 0:
            return found  # a slower network makes nothing better
        problem = self.problem
        runs = self._runs(self.placement(found.mode, found.knob))
        point = measure(runs, goodput.low, problem.slo, self.offered.cv, self._effort(goodput.low))
        if point.point.holds(problem.slo.attainment):
            return replace(found, num_simulated=point.num_simulated)
        return self.best(found.mode, floor, found.knob)

    def _found(self, mode: Mode, knob: Knob, goodput: Goodput, num_simulated: int) -> Found:
        if goodput.measured:
            binding = binding_constraint(self.problem, self.placement(mode, knob), goodput)
        else:
            binding = "capacities allow no more" if goodput.high else "an idle instance is too slow"
        return Found(mode, knob, self.setting(mode, knob), goodput, binding, num_simulated)

    def goodput(self, mode: Mode, knob: Knob, floor: float, likely: float = 0.0) -> Goodput:
        """Of one setting; one below ``floor`` is of no interest. ``likely`` is where to look first."""
        placement = self.placement(mode, knob)
        ceiling = self._ceiling(mode, knob, placement)
        if ceiling <= floor or ceiling == 0:
            most = min(ceiling, floor)
            return Goodput(Interval(0.0, 0.0, most), 0.0, most, ())
        return find_goodput(
            self._runs(placement),
            self.problem.slo,
            self.offered.cv,
            ceiling,
            self._effort,
            tolerance=self.tolerance,
            start=likely or _LIKELY * ceiling,
            floor=floor,
        )

    def _runs(self, placement: Placement) -> Runs:
        return one_by_one(Whole(placement).run(self.problem, self.offered))

    def _ceiling(self, mode: Mode, knob: Knob, placement: Placement) -> float:
        """Requests/s that bounds without a simulation allow; 0 if even an idle instance misses the objective."""
        target = self.problem.slo.attainment
        pools = self.pools(mode, knob)
        if mode.is_hybrid:
            # Every instance may take prompts, as a prefill instance at best; only the mixed ones decode.
            counts = (self.num_instances, pools[-1][1])
            pools = list(zip(map(self._apart, (Role.PREFILL, Role.DECODE)), counts, strict=True))
        bounds = [(self._bound(shape), count) for shape, count in pools]
        if any(bound.attainment < target for bound, _ in bounds):
            return 0.0
        capacity = min(bound.capacity * count for bound, count in bounds)
        if placement.of(Role.DECODE):
            capacity = min(capacity, network_capacity(self.problem, self.offered, placement))
        return _SLACK * capacity

    def _bound(self, shape: Shape) -> ShapeBound:
        if shape not in self._bounds:
            self._bounds[shape] = bound_shape(self.problem, self.offered, shape)
        return self._bounds[shape]

    @cached_property
    def _bounds(self) -> dict[Shape, ShapeBound]:
        return {}

    def _decode_rate(self) -> float:
        """Requests/s of one decode instance whose batch is as large as TPOT and memory allow."""
        prompts, outputs = self.offered.sample
        context = float((prompts + outputs / 2).mean())
        kv = self._apart(Role.DECODE).kv
        most = max(min(self.problem.limits.max_batch_size, int(kv.num_tokens / context)), 1)

        def seconds(batch: int) -> float:
            return self.step_time.seconds(StepShape(num_decodes=batch, decode_context=int(batch * context)))

        fitting = [batch for batch in range(1, most + 1) if seconds(batch) <= self.problem.slo.tpot]
        batch = max(fitting, default=1)
        return batch / seconds(batch) / max(float(outputs.mean()) - 1, 1.0)

    def _effort(self, rate: float) -> Effort:
        slo, pace = self.problem.slo, self.pace
        _, outputs = self.offered.sample
        alone = self.step_time.seconds(StepShape(num_decodes=1, decode_context=1))
        residence = float(outputs.mean()) * min(slo.tpot, 4 * alone)
        span = pace.residences * residence + pace.patiences * self.patience
        num = min(max(int(rate * span), pace.least), pace.most)
        return Effort(num, num)


def _misses_ttft(goodput: Goodput) -> bool:
    """Whether TTFT is what is missed more where the objective is missed first."""
    failing = [measured.point for measured in goodput.measured if measured.point.rate >= goodput.high]
    return bool(failing) and failing[0].ttft_attainment <= failing[0].tpot_attainment


def _rank(goodput: Goodput) -> tuple[float, float]:
    """By goodput; of those that have none, by how near the target they come at the lowest rate tried."""
    lowest = goodput.measured[0].point.attainment.estimate if goodput.measured else 0.0
    return goodput.interval.estimate, lowest if goodput.interval.estimate == 0 else 0.0
