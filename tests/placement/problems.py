"""Small problems the planner can solve in a second: a toy model whose steps are affine in their work."""

from dataclasses import dataclass
from typing import Any

from distserve.bench.arrivals import Gamma
from distserve.bench.lengths import LengthDistribution, Lognormal
from distserve.bench.workload import WorkloadSpec
from distserve.core.config import SLO, ParallelConfig
from distserve.core.latency import LinearStepTime
from distserve.core.topology import ClusterSpec
from placement.problem import EngineLimits, Problem, SearchLimits
from simulator.latency.shape import ModelShape

TOY = ModelShape("toy", 8, 256, 8, 8, 32, 1024, 1000, dtype_bytes=2)


@dataclass(frozen=True)
class ToyLatency:
    """Affine steps; ``tp`` shards are ``tp ** efficiency`` times as fast, ``pp`` stages share the work evenly."""

    base: float = 0.004
    per_token: float = 1e-4
    per_context: float = 2e-6
    per_pair: float = 0.0
    efficiency: float = 0.8

    @property
    def source(self) -> str:
        return "a toy"

    def step_time(self, parallel: ParallelConfig, *, stages_share_node: bool = True) -> LinearStepTime:
        speed = parallel.tp**self.efficiency * parallel.pp
        return LinearStepTime(
            self.base / speed, self.per_token / speed, self.per_pair / speed, self.per_context / speed
        )


def toy_problem(
    rate: float | None = None,
    *,
    slo: SLO = SLO(0.1, 0.02),
    gpus_per_node: int = 3,
    num_nodes: int = 1,
    prompt: LengthDistribution = Lognormal(300, 0.3, 1000),
    output: LengthDistribution = Lognormal(8, 0.3, 30),
    latency: ToyLatency = ToyLatency(),
    kv_tokens: int = 40_000,
    bandwidth: float = 1e9,
    **search: Any,
) -> Problem:
    limits = {"num_workers": 1, "num_requests": 120, "max_requests": 500, "tolerance": 0.06, "max_pp": 2} | search
    return Problem(
        model=TOY,
        slo=slo,
        workload=WorkloadSpec(Gamma(1.0), prompt, output),
        rate=rate,
        cluster=ClusterSpec("a10", num_nodes, gpus_per_node, 32e9, bandwidth),
        latency=latency,
        limits=EngineLimits(kv_tokens=kv_tokens, max_batch_size=64),
        search=SearchLimits(**limits),
    )
