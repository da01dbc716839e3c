"""Several transports over one pool, and for each peer the one that suits it."""

import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence

from distserve.core.commands import Migrate
from distserve.core.errors import TransferError
from distserve.core.events import Migrated
from distserve.transfer.plan import Part
from distserve.transfer.transport import PartTransport


class PairwiseTransport(ABC):
    """The pulls of :class:`~distserve.transfer.transport.PartTransport`, each by the transport that has its peer.

    There is at least one of ``transports``, which are closed with this one.
    """

    def __init__(self, transports: Sequence[PartTransport]) -> None:
        assert transports
        self._transports = tuple(transports)
        # Which transport has a peer.
        self._lock = threading.Lock()
        self._chosen: dict[str, PartTransport] = {}

    @abstractmethod
    def _choose(self, address: str) -> tuple[PartTransport, str]:
        """The transport for a peer, and the peer's address on it; raises TransferError if there is no way."""

    def connect(self, instance_id: str, address: str, part: Part | None = None) -> None:
        """Connect by the transport that suits the peer."""
        try:
            chosen, theirs = self._choose(address)
        except TransferError as error:
            raise TransferError(f"cannot connect to instance {instance_id}: {error}") from error
        chosen.connect(instance_id, theirs, part)
        with self._lock:
            former, self._chosen[instance_id] = self._chosen.get(instance_id), chosen
        if former is not None and former is not chosen:
            former.forget(instance_id)

    def pull(self, migrate: Migrate, done: Callable[[Migrated], None]) -> None:
        """Queue a pull."""
        with self._lock:
            # Any transport can say of a peer that it is not connected.
            chosen = self._chosen.get(migrate.source_id, self._transports[0])
        chosen.pull(migrate, done)

    def cancel(self, pull_id: int) -> None:
        """End a pull."""
        for transport in self._transports:
            transport.cancel(pull_id)

    def forget(self, instance_id: str) -> None:
        """Drop a peer."""
        with self._lock:
            chosen = self._chosen.pop(instance_id, None)
        if chosen is not None:
            chosen.forget(instance_id)

    def close(self) -> None:
        """Close all transports."""
        for transport in self._transports:
            transport.close()
