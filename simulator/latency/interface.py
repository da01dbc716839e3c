"""What a source of latencies answers: the step times of an instance of a given shape."""

from typing import Protocol

from distserve.core.config import ParallelConfig
from distserve.core.latency import StepTime


class LatencyModel(Protocol):
    """Step times of one model on one kind of GPU.

    ``source`` names where the figures come from, in words fit for a report.
    """

    @property
    def source(self) -> str:
        """Where the figures come from."""
        ...

    def step_time(self, parallel: ParallelConfig, *, stages_share_node: bool = True) -> StepTime:
        """The step times of an instance of shape ``parallel``, its tensor-parallel shards within one node.

        ``stages_share_node`` False: activations between pipeline stages cross the network.

        Raises ConfigError if this source knows nothing of the shape; it says which shapes it knows.
        """
        ...
