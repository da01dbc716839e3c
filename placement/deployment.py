"""From a candidate to what the simulator runs: the whole deployment with its network, or one phase alone.

One phase alone is DistServe's first step: its instances serve while the other phase is instant, has room for everything
and KV takes no time. The real deployment can only be slower, so it bounds as it ranks.
"""

from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np

from distserve.bench.workload import Workload
from distserve.core.config import InstanceSpec, KvConfig, Role, SchedulerConfig
from distserve.core.latency import StepShape
from distserve.core.router import RouterConfig
from distserve.core.topology import Placement
from placement.measure import Run
from placement.offered import Offered, ScaledOffered
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


class Deployed(Protocol):
    """What is simulated; a value, so that another process can be told of it."""

    def __hash__(self) -> int: ...

    def run(self, problem: Problem, offered: Offered) -> Run:
        """How it serves what is offered."""
        ...


@dataclass(frozen=True)
class Whole:
    """All of ``placement``, with its network; the lengths of what is offered are multiplied by the factors."""

    placement: Placement
    prompt_factor: float = 1.0
    output_factor: float = 1.0

    def run(self, problem: Problem, offered: Offered) -> Run:
        """See :class:`Deployed`."""
        model = joint_model(problem, self.placement)
        if (self.prompt_factor, self.output_factor) != (1.0, 1.0):
            offered = ScaledOffered(
                offered.spec, offered.seed, prompt_factor=self.prompt_factor, output_factor=self.output_factor
            )
        return lambda rate, number, num_requests: _until_missed(problem, model, offered.at(rate, number, num_requests))


@dataclass(frozen=True)
class Alone:
    """``count`` instances of one phase, without the other. Prefill sees outputs of the one token that it yields."""

    shape: Shape
    count: int

    def run(self, problem: Problem, offered: Offered) -> Run:
        """See :class:`Deployed`."""
        model = phase_model(problem, self.shape, self.count)

        def run(rate: float, number: int, num_requests: int) -> Simulation:
            workload = offered.at(rate, number, num_requests)
            if self.shape.role is Role.PREFILL:
                workload = replace(workload, output_lens=np.ones_like(workload.output_lens))
            return _until_missed(problem, model, workload)

        return run


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


def _until_missed(problem: Problem, model: ClusterModel, workload: Workload) -> Simulation:
    """Simulate until whatever is still under way has missed the objective: an overloaded run ends soon."""
    assert workload.arrivals is not None, "offered load is open"
    longest = problem.slo.ttft + problem.slo.tpot * int(workload.output_lens.max())
    return simulate(model, workload, until=float(workload.arrivals[-1]) + longest)
