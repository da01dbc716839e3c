"""Pulls out of memory that is mapped: in the order given, as their sources get ahead. What copies, subclasses say.

Knows sources only as memory with progress words.
"""

import time
from abc import abstractmethod
from dataclasses import dataclass
from typing import Generic, TypeVar

from distserve.core.config import KvLayout
from distserve.transfer.plan import Part, plane_pieces
from distserve.transfer.progress import SourceProgress
from distserve.transfer.pulls import Pull, PullThread
from distserve.transfer.stream import Stream, pause
from distserve.transfer.transport import Clock

MemoryT = TypeVar("MemoryT")
"""Memory as it can be copied from."""


@dataclass(frozen=True, slots=True, eq=False)
class Source(Generic[MemoryT]):
    """Memory of one life of a peer, and the part of it to pull. Its bytes outlive the peer's process.

    Mapped as long as referred to.
    """

    layout: KvLayout
    memory: MemoryT
    progress: SourceProgress
    generation: int
    part: Part


class MappedPulls(PullThread[Source[MemoryT]]):
    """Pulls into memory of ``layout`` on one thread, which a subclass starts."""

    def __init__(self, layout: KvLayout, clock: Clock) -> None:
        super().__init__("kv-mover", clock)
        self._layout = layout
        self._last_moved = 0.0
        self._timeout: float | None = None

    @abstractmethod
    def _advance(self, pull: Pull[Source[MemoryT]]) -> bool:
        """Take the pull one batch further, or to its end; False if all it can do is wait."""

    @abstractmethod
    def _batch_bytes(self, source: Source[MemoryT]) -> int:
        """Most bytes to copy between two looks at orders and deadlines."""

    def _patience(self, waited: float) -> float:
        """Seconds until something may have changed; called with pulls under way, ``waited`` since anything moved."""
        return pause(min(self._num_layers_missing(pull) for pull in self._pulls.values()), waited)

    def _turn(self) -> None:
        self._take_orders(self._timeout)
        # What ended meanwhile ends now, not behind what is copied.
        for pull in tuple(self._pulls.values()):
            if self._invalidity(pull):
                self._advance(pull)
        # The oldest pull that can go on does, one batch.
        if any(self._advance(pull) for pull in tuple(self._pulls.values())):
            self._last_moved = time.monotonic()
            self._timeout = 0.0
        elif self._pulls:
            self._timeout = self._patience(time.monotonic() - self._last_moved)
        else:
            self._timeout = None

    def _open(self, pull: Pull[Source[MemoryT]], source: Source[MemoryT]) -> None:
        migrate, part = pull.migrate, source.part
        num_ready = migrate.num_ready_blocks
        ready, late = (
            plane_pieces(migrate.src_blocks[blocks], migrate.dst_blocks[blocks], source.layout, self._layout, part)
            for blocks in (slice(num_ready), slice(num_ready, None))
        )
        pull.stream = Stream(ready, late, part.num_layers, self._batch_bytes(source))

    def _is_serving(self, source: Source[MemoryT]) -> bool:
        return source.progress.generation == source.generation

    def _layers_passed(self, pull: Pull[Source[MemoryT]], source: Source[MemoryT]) -> int:
        """How many of the layers to pull the source has passed in the pull's step."""
        passed = source.progress.layers_passed(pull.migrate.ready_step, source.layout.num_layers)
        return min(max(passed - source.part.src_layers.start, 0), source.part.num_layers)

    def _num_layers_missing(self, pull: Pull[Source[MemoryT]]) -> int:
        if pull.source is None:
            return 0
        return pull.source.part.num_layers - self._layers_passed(pull, pull.source)
