"""What an onlooker of a simulated run may see: steps on every pipeline stage, KV pulls, and what links carry."""

from collections.abc import Sequence
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

    def on_links(self, start: float, end: float, num_bytes: Sequence[float]) -> None:
        """Each link (:class:`simulator.routes.Links`, by index) carried so many bytes, at one rate all the while.

        Stretches follow one another without gaps from the first flow on, until the last flow has ended.
        """
