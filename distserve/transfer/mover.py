"""Pulls out of mapped host memory: the thread copies itself, one batch at a time."""

from distserve.core.config import KvLayout
from distserve.transfer.copy import Bytes, copy_pieces
from distserve.transfer.mapped_pulls import MappedPulls, Source
from distserve.transfer.plan import plane_bytes
from distserve.transfer.pulls import Pull
from distserve.transfer.stream import Batch
from distserve.transfer.transport import Clock

_BATCH_BYTES = 4 << 20
"""Bytes copied between two looks at orders and deadlines: about a millisecond."""


class Mover(MappedPulls[Bytes]):
    """Pulls into ``memory`` of ``layout`` on one thread."""

    def __init__(self, layout: KvLayout, memory: Bytes, clock: Clock) -> None:
        super().__init__(layout, clock)
        self._memory = memory
        self._thread.start()

    def _batch_bytes(self, source: Source[Bytes]) -> int:  # noqa: ARG002 - the same for all
        return _BATCH_BYTES

    def _advance(self, pull: Pull[Source[Bytes]]) -> bool:
        batch = None
        if not pull.failure:
            assert pull.source is not None
            assert pull.stream is not None
            if not pull.stream.is_done and (batch := pull.stream.next(self._layers_passed(pull, pull.source))):
                self._copy(batch, pull.source)
        # Bytes count only if deadline and source still stood after they were read: look after the batch, not before.
        failure = self._invalidity(pull)
        if failure or (pull.stream is not None and pull.stream.is_done):
            self._end(pull, failure)
            return True
        return batch is not None

    def _copy(self, batch: Batch, source: Source[Bytes]) -> None:
        src_stride, dst_stride = plane_bytes(source.layout), plane_bytes(self._layout)
        copy_pieces(
            source.memory[2 * source.part.src_layers.start * src_stride :],
            self._memory[2 * source.part.dst_layers.start * dst_stride :],
            batch.pieces,
            batch.planes,
            src_stride,
            dst_stride,
        )
