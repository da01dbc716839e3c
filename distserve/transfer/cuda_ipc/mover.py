"""Pulls out of a peer's memory on a device: copies are launched, and looked after until they have ended.

A pull whose copies are under way cannot be stopped, only waited for, so that it never ends while its destination may
still be written; copies are short. A copy that does not end means a device that is lost.
"""

import logging
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from distserve.core.config import KvLayout
from distserve.core.errors import TransferError
from distserve.transfer.cuda_ipc.device import Device, Event, RowCopy
from distserve.transfer.mapped_pulls import MappedPulls, Source
from distserve.transfer.plan import plane_bytes, row_bytes
from distserve.transfer.pulls import Pull
from distserve.transfer.stream import Batch
from distserve.transfer.transport import Clock

logger = logging.getLogger(__name__)

DeviceSource = Source[Tensor]

_BATCH_BYTES = 256 << 20
"""Bytes of one launch: a tenth of a millisecond within a card, ten over PCIe."""
_MAX_UNDER_WAY = 2
"""Copies of one pull launched and not ended: the device goes from one to the next without this thread."""
_LOOK = 50e-6
"""Seconds between looks at copies under way."""
COPY_PATIENCE = 10.0
"""Seconds after which a copy that was launched counts as hung: it may have waited for other work on the device."""


@dataclass(frozen=True, slots=True)
class _Flight:
    """A copy under way. Referring to ``memory`` keeps it mapped."""

    event: Event
    memory: Tensor
    launched: float


class DeviceMover(MappedPulls[Tensor]):
    """Pulls into ``memory`` of ``layout`` on ``device``.

    ``on_lost`` is called at most once, on the mover's thread, when a copy has not ended ``patience`` seconds after its
    launch, or the device has failed: nothing that is in its memory can be relied on, and the process should end. Pulls
    that have such a copy are reported only if it ends after all.
    """

    def __init__(
        self,
        layout: KvLayout,
        memory: Tensor,
        device: Device,
        clock: Clock,
        on_lost: Callable[[TransferError], None],
        patience: float = COPY_PATIENCE,
    ) -> None:
        super().__init__(layout, clock)
        self._memory = memory
        self._device = device
        self._on_lost = on_lost
        self._copy_patience = patience
        self._is_lost = False
        self._flights: dict[int, deque[_Flight]] = {}
        self._thread.start()

    def _batch_bytes(self, source: DeviceSource) -> int:
        # Pieces are cut at multiples of it only, so rows stay whole.
        row = row_bytes(source.layout, self._layout, source.part)
        return max(_BATCH_BYTES // row, 1) * row

    def _patience(self, waited: float) -> float:
        return _LOOK if self._flights else super()._patience(waited)

    def _advance(self, pull: Pull[DeviceSource]) -> bool:
        landed = self._land(pull)
        # Bytes count only if deadline and source still stood after they had arrived: look at the copies first.
        failure = self._invalidity(pull)
        if not failure:
            assert pull.source is not None
            assert pull.stream is not None
            flights = self._flights.get(pull.migrate.pull_id, ())
            if len(flights) < _MAX_UNDER_WAY and not pull.stream.is_done:
                batch = pull.stream.next(self._layers_passed(pull, pull.source))
                if batch is not None:
                    self._launch(pull, batch, pull.source)
                    return True
        is_done = pull.stream is not None and pull.stream.is_done
        if (failure or is_done) and pull.migrate.pull_id not in self._flights:
            self._end(pull, failure)
            return True
        return landed

    def _launch(self, pull: Pull[DeviceSource], batch: Batch, source: DeviceSource) -> None:
        try:
            event = self._device.copy(source.memory, self._memory, self._rows(batch, source))
        except TransferError as error:
            pull.failure = str(error)
            return
        flight = _Flight(event, source.memory, time.monotonic())
        self._flights.setdefault(pull.migrate.pull_id, deque()).append(flight)

    def _rows(self, batch: Batch, source: DeviceSource) -> RowCopy:
        size = row_bytes(source.layout, self._layout, source.part)
        strides = plane_bytes(source.layout), plane_bytes(self._layout)
        layers = source.part.src_layers.start, source.part.dst_layers.start
        src_first, dst_first = (
            (2 * layer + batch.planes.start) * stride for layer, stride in zip(layers, strides, strict=True)
        )
        num_rows = batch.pieces[:, 2] // size
        within = np.arange(num_rows.sum()) - np.repeat(np.cumsum(num_rows) - num_rows, num_rows)
        return RowCopy(
            src_starts=np.repeat(batch.pieces[:, 0], num_rows) + within * size + src_first,
            dst_starts=np.repeat(batch.pieces[:, 1], num_rows) + within * size + dst_first,
            row_bytes=size,
            num_planes=len(batch.planes),
            src_stride=strides[0],
            dst_stride=strides[1],
        )

    def _land(self, pull: Pull[DeviceSource]) -> bool:
        """Let go of the pull's copies that have ended; whether there were any."""
        flights = self._flights.get(pull.migrate.pull_id)
        if not flights:
            return False
        num_before = len(flights)
        try:
            while flights and flights[0].event.has_passed():
                flights.popleft()
        except TransferError as error:
            # Nothing of this process runs on a device that has failed: the copies have ended, somehow.
            flights.clear()
            pull.failure = pull.failure or str(error)
            self._lose(error)
        if not flights:
            del self._flights[pull.migrate.pull_id]
        elif time.monotonic() - flights[0].launched > self._copy_patience:
            self._lose(TransferError(f"a copy between GPU memories did not end within {self._copy_patience:g} s"))
        return len(flights) < num_before

    def _lose(self, error: TransferError) -> None:
        if not self._is_lost:
            self._is_lost = True
            logger.critical("%s", error)
            self._on_lost(error)

    def _ended(self, pull: Pull[DeviceSource], source: DeviceSource) -> None:  # noqa: ARG002
        # Pulls have landed by now, but for those under way when the transport is closed.
        while pull.migrate.pull_id in self._flights and not self._is_lost:
            if not self._land(pull):
                time.sleep(_LOOK)
