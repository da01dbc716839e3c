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
    """A :class:`distserve.core.latency.StepTime` that knows a quick way to the times of one decode batch's steps."""

    def decode_run(self, num_decodes: int, context: int, num_steps: int) -> list[float]:
        """Seconds of ``num_steps`` steps of ``num_decodes`` sequences, one after the other; ``context`` is the first's.

        To the last bit what :meth:`StepTime.seconds` says of each.
        """
        ...
