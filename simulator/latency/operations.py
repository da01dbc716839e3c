"""One operation of a step, as ``distserve plan --explain-latency`` shows it."""

from dataclasses import dataclass

from simulator.latency.gpus import GpuSpec


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
    def of(cls, name: str, count: int, seconds: float, flops: float, num_bytes: float, gpu: GpuSpec) -> "Operation":
        """With the bound that its shape implies: the larger of arithmetic and traffic at the data sheet's peaks."""
        compute, memory = flops / gpu.flops, num_bytes / gpu.memory_bandwidth
        if name == "all-reduce":
            bound = "link"
        elif max(compute, memory) < 0.3 * seconds:
            bound = "latency"
        else:
            bound = "compute" if compute > memory else "memory"
        return cls(name, count, seconds, flops, num_bytes, bound)
