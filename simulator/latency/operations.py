"""One operation of a step, as ``distserve plan --explain-latency`` shows it."""

from dataclasses import dataclass

from simulator.latency.gpus import GpuSpec
from simulator.latency.step_kernels import Launches


@dataclass(frozen=True, slots=True)
class Operation:
    """``count`` launches of one kernel on one rank, ``seconds``, ``flops`` and ``bytes`` of each.

    ``bound`` is what its time is made of: ``compute``, ``memory``, ``link``, ``latency`` (launch and synchronisation)
    or ``host``.
    """

    name: str
    count: int
    seconds: float
    flops: float
    bytes: float
    bound: str

    @property
    def total_seconds(self) -> float:
        """Seconds of all its launches."""
        return self.count * self.seconds

    @classmethod
    def of(cls, launches: Launches, gpu: GpuSpec) -> "Operation":
        """With the bound that its shape implies: the larger of arithmetic and traffic at the data sheet's peaks."""
        name, cost = launches.name, launches.cost
        seconds, flops, num_bytes = float(cost.seconds[0]), float(cost.flops[0]), float(cost.bytes[0])
        compute, memory = flops / gpu.flops, num_bytes / gpu.memory_bandwidth
        if name == "all-reduce":
            bound = "link"
        elif max(compute, memory) < 0.3 * seconds:
            bound = "latency"
        else:
            bound = "compute" if compute > memory else "memory"
        return cls(name, launches.count, seconds, flops, num_bytes, bound)
