"""The transport between processes of one host: peers map each other's KV memory read-only and copy out of it.

See :mod:`distserve.transfer.mapped` for how peers meet and part, :mod:`~distserve.transfer.segment` for the memory.
"""

import os

import numpy as np

from distserve.core.config import KvLayout
from distserve.transfer import handshake, progress, segment
from distserve.transfer.copy import Bytes
from distserve.transfer.mapped import MappedTransport
from distserve.transfer.mapped_pulls import Source
from distserve.transfer.mover import Mover
from distserve.transfer.plan import Part
from distserve.transfer.pool import Pool
from distserve.transfer.source import SourceSide
from distserve.transfer.transport import Clock


class ShmTransport(SourceSide, MappedTransport[Source[Bytes]]):
    """Implements :class:`~distserve.transfer.transport.PartTransport`.

    ``secret`` is shared by all ranks of a cluster. ``pool`` is the memory to offer and to pull into (default: a new
    one); it is closed with the transport. Raises :class:`~distserve.core.errors.TransferError` if memory for
    ``layout`` cannot be had. Linux only.
    """

    def __init__(self, layout: KvLayout, *, secret: bytes, clock: Clock, pool: Pool | None = None) -> None:
        offered = pool or Pool(layout)
        self._pool, self._progress = offered.memory, offered.progress
        super().__init__(layout, offered=offered, mover=Mover(layout, offered.bytes, clock), secret=secret)
        self._address = self.name

    def _locate(self, address: str) -> str:
        return address

    def _map(self, address: str, offered: handshake.Offered, part: Part) -> Source[Bytes]:  # noqa: ARG002
        try:
            pool = segment.attach(offered.pool_fd, offered.layout.num_bytes)
            words = segment.attach(offered.progress_fd, progress.NUM_BYTES)
        finally:
            os.close(offered.pool_fd)
            os.close(offered.progress_fd)
        return Source(
            offered.layout,
            np.frombuffer(pool, dtype=np.uint8),
            progress.SourceProgress(memoryview(words)),
            offered.generation,
            part,
        )
