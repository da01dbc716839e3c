"""What a source of latencies answers: the step times of an instance of a given shape, one by one or in runs."""

from typing import Protocol, runtime_checkable

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


@runtime_checkable
class DecodeRunTime(Protocol):
    """A :class:`distserve.core.latency.StepTime` that knows a quick way through the steps of one decode batch."""

    def decode_ends(self, num_decodes: int, context: int, num_steps: int, start: float) -> list[float]:
        """When each of ``num_steps`` steps of ``num_decodes`` sequences ends, the first of which starts at ``start``.

        ``context`` is the first's. Seconds, to the last bit the sums of what :meth:`StepTime.seconds` says of each.
        """
        ...
