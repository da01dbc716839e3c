"""What an onlooker of a simulated run may see: every step on every pipeline stage, every KV pull."""

from typing import Protocol

from distserve.core.latency import StepShape


class Recorder(Protocol):
    """Told of everything that takes time, when its end is known. Times in seconds of the run."""

    def on_step(self, instance_id: str, stage: int, start: float, end: float, shape: StepShape) -> None:
        """A step occupied a pipeline stage of an instance."""

    def on_pull(
        self, request_id: str, source_id: str, puller_id: str, start: float, end: float, num_bytes: int
    ) -> None:
        """An instance had all of a request's KV cache from another; ``num_bytes`` 0 where no network is modelled."""
