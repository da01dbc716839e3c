"""From a candidate to what the simulator runs: the whole deployment with its network, or one phase alone.

One phase alone is DistServe's first step: its instances serve while the other phase is instant, has room for everything
and KV takes no time. The real deployment can only be slower, so it bounds as it ranks.
"""

from dataclasses import dataclass, replace

import numpy as np

from distserve.bench.workload import Workload
from distserve.core.config import InstanceSpec, KvConfig, Role, SchedulerConfig
from distserve.core.latency import StepShape
from distserve.core.router import RouterConfig
from distserve.core.topology import Placement
from placement.measure import Run
from placement.offered import Offered
from placement.problem import Problem
from placement.shapes import Shape
from simulator.model import ClusterModel, Delays, InstanceModel
from simulator.planfile import deployment, on_one_host
from simulator.results import Simulation
from simulator.simulation import simulate

_PLENTY = 1 << 26
"""Tokens of a step and sequences of an instance that is never short of them."""
_PLENTY_OF_BLOCKS = 1 << 17
"""Blocks of such an instance; more would only take time to set up."""
_PATIENT = RouterConfig(max_wait=float("inf"))


@dataclass(frozen=True, slots=True)
class Instant:
    """A step time of nothing: the phase that is left out."""

    def seconds(self, shape: StepShape) -> float:  # noqa: ARG002 -- the interface's
        """None."""
        return 0.0

    def handover(self, shape: StepShape) -> float:  # noqa: ARG002 -- the interface's
        """None."""
        return 0.0


def joint_model(problem: Problem, placement: Placement) -> ClusterModel:
    """The deployment of ``placement``, as ``distserve simulate`` would replay it."""
    model = deployment(placement, problem.latency, problem.model, problem.delays, problem.slo)
    return on_one_host(model, problem.latency, placement)


def phase_model(problem: Problem, shape: Shape, count: int) -> ClusterModel:
    """``count`` instances of one phase, the other phase instant."""
    step_time = problem.latency.step_time(shape.parallel, stages_share_node=shape.nodes == 1)
    instances = [InstanceModel(shape.spec(problem, f"{shape.role}-{number}"), step_time) for number in range(count)]
    other = Role.DECODE if shape.role is Role.PREFILL else Role.PREFILL
    block_size = problem.limits.block_size
    scheduler = SchedulerConfig(
        max_batch_tokens=_PLENTY, max_batch_size=_PLENTY, max_model_len=problem.limits.max_model_len, lease=1e9
    )
    ideal = InstanceSpec(f"ideal-{other}", other, KvConfig(_PLENTY_OF_BLOCKS, block_size), scheduler)
    return ClusterModel(
        instances=(*instances, InstanceModel(ideal, Instant())),
        delays=Delays(message=problem.delays.message, pull_latency=0.0, seconds_per_block=0.0),
        router=_PATIENT,
    )


def joint_run(problem: Problem, offered: Offered, placement: Placement) -> Run:
    """Runs of the whole deployment."""
    model = joint_model(problem, placement)
    return lambda rate, run, num_requests: _until_missed(problem, model, offered.at(rate, run, num_requests))


def phase_run(problem: Problem, offered: Offered, shape: Shape, count: int) -> Run:
    """Runs of one phase alone. Prefill sees outputs of the one token that prefill yields."""
    model = phase_model(problem, shape, count)

    def run(rate: float, number: int, num_requests: int) -> Simulation:
        workload = offered.at(rate, number, num_requests)
        if shape.role is Role.PREFILL:
            workload = replace(workload, output_lens=np.ones_like(workload.output_lens))
        return _until_missed(problem, model, workload)

    return run


def _until_missed(problem: Problem, model: ClusterModel, workload: Workload) -> Simulation:
    """Simulate until whatever is still under way has missed the objective: an overloaded run ends soon."""
    assert workload.arrivals is not None, "offered load is open"
    longest = problem.slo.ttft + problem.slo.tpot * int(workload.output_lens.max())
    return simulate(model, workload, until=float(workload.arrivals[-1]) + longest)
