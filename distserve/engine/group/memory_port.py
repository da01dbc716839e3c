"""What a rank's process asks of the memory that holds its KV, where others are to read it: a port.

The engine knows nothing of transfers; whoever starts the ranks names a class that does.
"""

from collections.abc import Callable
from typing import Protocol

from torch import Tensor

from distserve.core.config import KvLayout
from distserve.engine.sharding.shard import Shard


class RankMemory(Protocol):
    """KV memory of one rank, told of the progress of its steps."""

    def __init__(
        self, layout: KvLayout, shard: Shard, local_rank: int, options: bytes, tell: Callable[[bytes], None]
    ) -> None:
        """Memory for ``layout`` of the ``local_rank``-th of the instance's ranks on this node.

        ``tell`` reaches rank 0, from any thread.
        """
        ...

    @property
    def pool(self) -> Tensor:
        """Flat uint8, ``layout.num_bytes`` long, on the device that the rank computes on."""
        ...

    @property
    def address(self) -> str:
        """Where others reach it."""
        ...

    def begin_step(self, step_id: int) -> None:
        """A step starts."""
        ...

    def layer_done(self, step_id: int, layer: int) -> None:
        """The step's KV of the rank's own layer ``layer`` is in memory."""
        ...

    def end_step(self, step_id: int) -> None:
        """The step's KV of all layers is in memory."""
        ...

    def ask(self, request: bytes) -> None:
        """Rank 0 wants something; an answer is told."""
        ...
