"""The transport within one process: pools are ordinary memory, peers meet in a :class:`LocalNetwork`.

For tests of other packages and for clusters that live in one process; pulls run exactly as between processes.
"""

import itertools
import mmap
import threading
from collections.abc import Callable
from dataclasses import replace

import numpy as np

from distserve.core.commands import Migrate
from distserve.core.config import KvLayout
from distserve.core.errors import TransferError
from distserve.core.events import Migrated
from distserve.transfer import progress
from distserve.transfer.copy import Bytes
from distserve.transfer.mapped_pulls import Source
from distserve.transfer.mover import Mover
from distserve.transfer.plan import Part, layout_difference, whole
from distserve.transfer.source import SourceSide
from distserve.transfer.transport import Clock


class LocalNetwork:
    """The transports that can reach each other."""

    def __init__(self) -> None:
        self._numbers = itertools.count()
        self._lock = threading.Lock()
        self._sources: dict[str, Source[Bytes]] = {}

    def publish(self, source: Source[Bytes]) -> str:
        """Make ``source`` reachable and return its address."""
        with self._lock:
            address = f"local-{next(self._numbers)}"
            self._sources[address] = source
        return address

    def withdraw(self, address: str) -> None:
        """Nobody finds the source any more."""
        with self._lock:
            self._sources.pop(address, None)

    def find(self, address: str) -> Source[Bytes]:
        """Return the source at ``address``; raises TransferError if there is none."""
        with self._lock:
            source = self._sources.get(address)
        if source is None:
            raise TransferError(f"nothing to connect to at {address!r}")
        return source


class LocalTransport(SourceSide):
    """Implements :class:`~distserve.transfer.transport.PartTransport` among the members of ``network``."""

    def __init__(self, layout: KvLayout, *, network: LocalNetwork, clock: Clock) -> None:
        self._layout = layout
        self._network = network
        self._pool = mmap.mmap(-1, layout.num_bytes)
        self._progress = progress.SourceProgress(memoryview(mmap.mmap(-1, progress.NUM_BYTES)))
        self._progress.open()
        memory = np.frombuffer(self._pool, dtype=np.uint8)
        self._mover = Mover(layout, memory, clock)
        self._address = network.publish(
            Source(layout, memory, self._progress, self._progress.generation, whole(layout))
        )

    def connect(self, instance_id: str, address: str, part: Part | None = None) -> None:
        """Find the peer in the network."""
        part = part or whole(self._layout)
        source = self._network.find(address)
        if (difference := layout_difference(part.source_layout(self._layout), source.layout)) is not None:
            raise TransferError(f"cannot connect to instance {instance_id}: {difference}")
        self._mover.attach(instance_id, replace(source, part=part))

    def pull(self, migrate: Migrate, done: Callable[[Migrated], None]) -> None:
        """Queue a pull."""
        self._mover.pull(migrate, done)

    def cancel(self, pull_id: int) -> None:
        """End a pull."""
        self._mover.cancel(pull_id)

    def forget(self, instance_id: str) -> None:
        """Drop a peer."""
        self._mover.detach(instance_id, f"instance {instance_id} is gone")

    def close(self) -> None:
        """Leave the network, fail peers' pulls and one's own."""
        self._network.withdraw(self._address)
        self._progress.retire()
        self._mover.close()
