"""What the map of :mod:`benchmarks.goodput.when_it_pays` is over, and the fleet at every point of it."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

from benchmarks.goodput.fleet import MODES, Fleet, Mode, OneShape, Pace
from distserve.bench.arrivals import Gamma
from distserve.bench.lengths import Lognormal
from distserve.bench.workload import WorkloadSpec
from distserve.core.config import SLO, ParallelConfig, PrefillPolicy
from distserve.core.latency import StepShape
from distserve.core.topology import ClusterSpec
from placement.problem import EngineLimits, Problem, SearchLimits
from simulator.latency.analytic import AnalyticModel
from simulator.latency.shape import ModelShape

NUM_INSTANCES = 8
CV = 0.6
SIGMA = 0.555
"""Of a lognormal distribution with that coefficient of variation: sqrt(ln(1 + CV^2))."""
_LONGEST = 8
"""Times the mean: longer draws are drawn again."""
_NODE = 8
_NVLINK = 450e9
_PACE = Pace()


@dataclass(frozen=True, slots=True)
class Served:
    """A model and the shape of its instances."""

    model: ModelShape
    tp: int


@dataclass(frozen=True, slots=True)
class Objective:
    """TTFT is ``ttft_base`` seconds and ``ttft_factor`` times the mean prompt's alone, TPOT ``tpot_factor`` steps.

    Multiples, so that every cell can be served and none is trivial; the seconds are what nobody before a screen minds.
    """

    name: str
    ttft_base: float
    ttft_factor: float
    tpot_factor: float


@dataclass(frozen=True, slots=True)
class Point:
    """Where on the map, links aside: ``prompt`` and ``output`` are mean lengths in tokens."""

    served: Served
    objective: Objective
    prompt: int
    output: int

    @property
    def key(self) -> tuple[str, str, int, int]:
        """What its rows begin with."""
        return self.served.model.name, self.objective.name, self.prompt, self.output


@dataclass(frozen=True, slots=True)
class Grid:
    """``bandwidths``: bytes/s, each way, of every GPU to other nodes, fastest first; ``pace``: how long runs are."""

    models: tuple[Served, ...]
    objectives: tuple[Objective, ...]
    prompts: tuple[int, ...]
    outputs: tuple[int, ...]
    bandwidths: tuple[float, ...]
    pace: Pace = _PACE
    modes: tuple[Mode, ...] = MODES

    def points(self) -> Iterator[Point]:
        """All of them, in an order in which an unfinished map shows something of every panel."""
        for output in self.outputs:
            for prompt in self.prompts:
                for objective in self.objectives:
                    for served in self.models:
                        yield Point(served, objective, prompt, output)


LLAMA_8B = Served(
    ModelShape("Llama-3.1-8B", 32, 4096, num_heads=32, num_kv_heads=8, head_dim=128, intermediate=14336, vocab=128256),
    1,
)
LLAMA_70B = Served(
    ModelShape("Llama-3.1-70B", 80, 8192, num_heads=64, num_kv_heads=8, head_dim=128, intermediate=28672, vocab=128256),
    4,
)
TIGHT_TPOT = Objective("tight TPOT, loose TTFT", 1.0, 8, 2)
BOTH_LOOSE = Objective("both loose", 1.0, 8, 6)
TIGHT_TTFT = Objective("tight TTFT, loose TPOT", 0.2, 3, 6)
WHOLE = Grid(
    models=(LLAMA_8B, LLAMA_70B),
    objectives=(TIGHT_TPOT, BOTH_LOOSE, TIGHT_TTFT),
    prompts=(500, 1500, 5000, 15000),
    outputs=(32, 128, 512),
    bandwidths=(50e9, 6.25e9, 1.5625e9),
)
QUICK = Grid(
    models=(LLAMA_8B,),
    objectives=(TIGHT_TPOT, TIGHT_TTFT),
    prompts=(250, 4000),
    outputs=(32, 128),
    bandwidths=(50e9, 1.5625e9),
    pace=Pace(residences=1.0, patiences=2.0, least=120, most=400),
)


def fleet_at(point: Point, pace: Pace, seed: int = 0) -> Fleet:
    """The fleet with its workload and objective, where pools are joined by NVLink."""
    served, parallel = point.served, ParallelConfig(point.served.tp)
    # Two pools, each on nodes of its own, take at most one node more than one pool.
    num_nodes = -(-NUM_INSTANCES * served.tp // _NODE) + 1
    cluster = ClusterSpec("h100-sxm", num_nodes, _NODE, _NVLINK, _NVLINK, nics_per_node=_NODE)
    latency = OneShape(AnalyticModel(served.model, cluster), parallel)
    problem = Problem(
        model=served.model,
        slo=slo_at(point, latency),
        workload=WorkloadSpec(
            arrivals=Gamma(),
            prompt=Lognormal(point.prompt, SIGMA, _LONGEST * point.prompt),
            output=Lognormal(point.output, SIGMA, _LONGEST * point.output),
        ),
        rate=None,
        cluster=cluster,
        latency=latency,
        limits=EngineLimits(max_batch_size=512),
        search=SearchLimits(policies=(PrefillPolicy.SPLITFUSE, PrefillPolicy.WHOLE_PROMPT), max_pp=1, seed=seed),
    )
    # Runs are as long whatever the TTFT: shorter ones would flatter the tighter limit.
    patience = max(slo_at(replace(point, objective=objective), latency).ttft for objective in WHOLE.objectives)
    return Fleet(problem, parallel, NUM_INSTANCES, patience, pace)


def slo_at(point: Point, latency: OneShape) -> SLO:
    """The objective in seconds."""
    objective, prompt = point.objective, point.prompt
    step_time = latency.step_time(ParallelConfig(point.served.tp))
    alone = step_time.seconds(StepShape(prompt, prompt * (prompt + 1) // 2, num_prefills=1))
    step = step_time.seconds(StepShape(num_decodes=1, decode_context=1000))
    return SLO(
        ttft=round(objective.ttft_base + objective.ttft_factor * alone, 2),
        tpot=round(objective.tpot_factor * step, 3),
    )


def with_bandwidth(fleet: Fleet, bandwidth: float) -> Fleet:
    """The same fleet where every GPU sends, and receives, ``bandwidth`` bytes/s to and from other nodes."""
    cluster = replace(fleet.problem.cluster, inter_node_bandwidth=bandwidth)
    return replace(fleet, problem=replace(fleet.problem, cluster=cluster))
