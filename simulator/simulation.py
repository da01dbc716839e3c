"""Run a workload through a modelled deployment: the one entry point of the planner, the fidelity checks and the CLI."""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

from distserve.bench.workload import Workload
from simulator.model import ClusterModel
from simulator.results import Simulation


class FaultKind(StrEnum):
    """What befalls an instance: it is there from then on, dies, or takes nothing new."""

    START = "start"
    LOSS = "loss"
    DRAIN = "drain"


@dataclass(frozen=True, slots=True)
class Fault:
    """At ``time`` seconds, ``kind`` befalls ``instance_id``. An instance with a START is absent before it."""

    time: float
    kind: FaultKind
    instance_id: str


def simulate(
    model: ClusterModel,
    workload: Workload,
    *,
    until: float = float("inf"),
    faults: Sequence[Fault] = (),
    jump: bool = True,
) -> Simulation:
    """Offer ``workload`` (open loop: its arrivals must be given) to ``model`` until all is answered or ``until``.

    Deterministic: the same arguments give the same result, bit for bit. ``jump`` handles stretches of decode steps
    that nothing can change as one event; the timelines are the same without it, later.

    Raises ConfigError for a workload without arrivals, or a fault of an unknown instance.
    """
    raise NotImplementedError
