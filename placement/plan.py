"""The planner's answer, with everything a reader needs to judge it. Facts only; how it is shown is the report's."""

from dataclasses import dataclass

from distserve.core.config import ParallelConfig, PrefillPolicy, Role
from distserve.core.errors import ConfigError
from distserve.core.topology import Gpu, Placement
from placement.candidates import Candidate, Kind
from placement.problem import Problem


@dataclass(frozen=True, slots=True)
class Interval:
    """An estimate within a 95% confidence interval."""

    estimate: float
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class Percentiles:
    """Seconds, over the answered requests of the measured windows; of TPOT over those with two tokens or more.

    NaN where there are none.
    """

    mean: float
    p50: float
    p90: float
    p99: float


@dataclass(frozen=True, slots=True)
class InstanceUse:
    """One instance over the measured runs: ``busy`` share of the time its first stage worked, KV blocks at their peak.

    ``kv_bytes`` is the instance's whole KV memory over all its ranks. ``kv_sent`` and ``kv_received`` are bytes/s of KV
    that other instances pulled from it, and it from others.
    """

    instance_id: str
    role: Role
    parallel: ParallelConfig
    gpus: tuple[Gpu, ...]
    busy: float
    mean_batch: float
    peak_kv_blocks: int
    num_kv_blocks: int
    kv_bytes: int
    num_preempted: int
    kv_sent: float = 0.0
    kv_received: float = 0.0

    @property
    def kv_share(self) -> float:
        """Share of the KV memory in use at its peak."""
        return self.peak_kv_blocks / self.num_kv_blocks if self.num_kv_blocks else 0.0


@dataclass(frozen=True, slots=True)
class LinkUse:
    """One link over the measured runs; ``busy`` is the share of time any flow was on it, ``load`` bytes/s."""

    name: str
    capacity: float
    load: float
    busy: float

    @property
    def share(self) -> float:
        """Share of its capacity in use on average."""
        return self.load / self.capacity if self.capacity else 0.0


@dataclass(frozen=True, slots=True)
class RatePoint:
    """One placement at one rate (requests/s): ``attainment`` of both bounds jointly; the phases' own shares beside it.

    ``instability`` says why the system counts as overloaded, and is empty for a steady state.
    """

    rate: float
    attainment: Interval
    ttft_attainment: float
    tpot_attainment: float
    ttft: Percentiles
    tpot: Percentiles
    num_requests: int
    num_runs: int
    instability: str = ""

    @property
    def is_stable(self) -> bool:
        """No growth of the backlog was seen."""
        return not self.instability

    def holds(self, target: float) -> bool:
        """The estimate is at the target, in a steady state."""
        return self.is_stable and self.attainment.estimate >= target

    def surely_holds(self, target: float) -> bool:
        """The whole interval is at the target, in a steady state."""
        return self.is_stable and self.attainment.low >= target

    def surely_fails(self, target: float) -> bool:
        """No part of the interval is at the target, or the backlog grows."""
        return not self.is_stable or self.attainment.high < target


@dataclass(frozen=True, slots=True)
class Evaluation:
    """A placement measured in its own joint simulation.

    ``goodput`` is requests/s of the whole placement (largest rate with attainment at the target); ``curve`` is every
    rate tried, ascending. ``point`` is at the planned rate, or at the goodput if none was planned; ``instances`` and
    ``links`` are of that point. ``label`` says the shapes in words; ``policy`` counts on mixed instances. ``binding``
    is the constraint that keeps the goodput from being larger, in words.
    """

    label: str
    placement: Placement
    policy: PrefillPolicy
    goodput: Interval
    point: RatePoint
    curve: tuple[RatePoint, ...]
    instances: tuple[InstanceUse, ...]
    links: tuple[LinkUse, ...]
    binding: str
    candidate: Candidate | None = None
    """What it was laid out from; None for a placement given by hand."""

    @property
    def num_gpus(self) -> int:
        """GPUs in use."""
        return self.placement.num_gpus

    @property
    def goodput_per_gpu(self) -> float:
        """Requests/s and GPU."""
        return self.goodput.estimate / self.num_gpus

    def overlaps(self, other: "Evaluation") -> bool:
        """Whether the intervals of their goodputs per GPU have a value in common."""
        lows = [found.goodput.low / found.num_gpus for found in (self, other)]
        highs = [found.goodput.high / found.num_gpus for found in (self, other)]
        return max(lows) <= min(highs)

    @property
    def kind(self) -> Kind:
        """How it divides the phases."""
        return Kind.of(instance.spec.role for instance in self.placement.instances)


@dataclass(frozen=True, slots=True)
class SearchStats:
    """What the search did. ``num_simulated`` candidates were simulated as a whole, ``num_pruned`` dropped before that.

    ``num_requests`` were simulated in all, in ``seconds``.
    """

    num_candidates: int
    num_pruned: int
    num_simulated: int
    num_requests: int
    seconds: float


@dataclass(frozen=True)
class Plan:
    """The chosen placement and its rivals.

    ``finalists`` are the leading candidates with intervals, best first, the chosen one included. ``disaggregated``,
    ``colocated`` and ``hybrid`` are the best of their kind (None: none is feasible; of hybrids, which have to do better
    than both, none was found that does). ``paper`` is a placement asked for by hand.
    ``holds`` says whether the chosen placement's attainment at the planned rate is at the target with its whole
    interval. ``notes`` are remarks a reader must know, in words.
    """

    problem: Problem
    chosen: Evaluation
    runner_up: Evaluation | None
    finalists: tuple[Evaluation, ...]
    disaggregated: Evaluation | None
    colocated: Evaluation | None
    hybrid: Evaluation | None
    paper: Evaluation | None
    stats: SearchStats
    notes: tuple[str, ...] = ()

    @property
    def holds(self) -> bool:
        """The promise holds in its own simulation, the interval counted in."""
        return self.chosen.point.surely_holds(self.problem.slo.attainment)


class UnreachableError(ConfigError):
    """No placement on the cluster reaches the objective.

    ``constraint`` names what stands in the way (``shape``, ``batch``, ``memory``, ``ttft``, ``tpot``, ``rate``);
    ``best`` says the best reachable value, ``advice`` what would help; the message holds all three.
    """

    def __init__(self, constraint: str, best: str, advice: str) -> None:
        advised = advice[0].upper() + advice[1:]
        super().__init__(f"no placement reaches the objective ({constraint}): {best}. {advised}.")
        self.constraint = constraint
        self.best = best
        self.advice = advice
