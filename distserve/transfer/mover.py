"""Pulls out of memory that can be mapped: copies, in the order given, as their sources get ahead.

Knows sources only as memory with a progress word, so every transport whose peers' memory can be mapped shares it.
"""

import time
from dataclasses import dataclass

from distserve.core.config import KvLayout
from distserve.transfer.copy import Bytes, copy_pieces
from distserve.transfer.plan import Part, plane_bytes, plane_pieces
from distserve.transfer.progress import SourceProgress
from distserve.transfer.pulls import Pull, PullThread
from distserve.transfer.stream import Batch, Stream, pause
from distserve.transfer.transport import Clock

_BATCH_BYTES = 4 << 20
"""Bytes copied between two looks at orders and deadlines: about a millisecond."""


@dataclass(frozen=True, slots=True, eq=False)
class Source:
    """Memory of one life of a peer, and the part of it to pull. Its bytes outlive the peer's process.

    Mapped as long as referred to.
    """

    layout: KvLayout
    memory: Bytes
    progress: SourceProgress
    generation: int
    part: Part


class Mover(PullThread[Source]):
    """Pulls into ``memory`` of ``layout`` on one thread."""

    def __init__(self, layout: KvLayout, memory: Bytes, clock: Clock) -> None:
        super().__init__("kv-mover", clock)
        self._layout = layout
        self._memory = memory
        self._last_moved = 0.0
        self._timeout: float | None = None
        self._thread.start()

    def _turn(self) -> None:
        self._take_orders(self._timeout)
        # The oldest pull that can go on does, one batch.
        if any(self._advance(pull) for pull in tuple(self._pulls.values())):
            self._last_moved = time.monotonic()
            self._timeout = 0.0
        elif self._pulls:
            fewest = min(self._num_layers_missing(pull) for pull in self._pulls.values())
            self._timeout = pause(fewest, time.monotonic() - self._last_moved)
        else:
            self._timeout = None

    def _open(self, pull: Pull[Source], source: Source) -> None:
        migrate, part = pull.migrate, source.part
        num_ready = migrate.num_ready_blocks
        ready, late = (
            plane_pieces(migrate.src_blocks[blocks], migrate.dst_blocks[blocks], source.layout, self._layout, part)
            for blocks in (slice(num_ready), slice(num_ready, None))
        )
        pull.stream = Stream(ready, late, part.num_layers, _BATCH_BYTES)

    def _is_serving(self, source: Source) -> bool:
        return source.progress.generation == source.generation

    def _advance(self, pull: Pull[Source]) -> bool:
        """Take the pull one batch further, or to its end; False if all it can do is wait."""
        batch = None
        if not pull.failure:
            assert pull.source is not None
            assert pull.stream is not None
            if not pull.stream.is_done and (batch := pull.stream.next(_layers_passed(pull, pull.source))):
                self._copy(batch, pull.source)
        # Bytes count only if lease and source still stood after they were read: look after the batch, not before.
        failure = self._invalidity(pull)
        if failure or (pull.stream is not None and pull.stream.is_done):
            self._end(pull, failure)
            return True
        return batch is not None

    def _copy(self, batch: Batch, source: Source) -> None:
        src_stride, dst_stride = plane_bytes(source.layout), plane_bytes(self._layout)
        copy_pieces(
            source.memory[2 * source.part.src_layers.start * src_stride :],
            self._memory[2 * source.part.dst_layers.start * dst_stride :],
            batch.pieces,
            batch.planes,
            src_stride,
            dst_stride,
        )

    @staticmethod
    def _num_layers_missing(pull: Pull[Source]) -> int:
        assert pull.source is not None
        return pull.source.part.num_layers - _layers_passed(pull, pull.source)


def _layers_passed(pull: Pull[Source], source: Source) -> int:
    """How many of the layers to pull the source has passed in the pull's step."""
    passed = source.progress.layers_passed(pull.migrate.ready_step, source.layout.num_layers)
    return min(max(passed - source.part.src_layers.start, 0), source.part.num_layers)
