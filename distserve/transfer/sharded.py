"""Transfers between instances of any two shapes, as one rank does them: its peers are instances, not ranks.

Each rank of the destination pulls its own layers and heads out of all ranks of the source that have any of them
(:mod:`~distserve.transfer.reshard` says which). How bytes move between two ranks is another transport's business.
"""

import itertools
import json
import threading
from collections.abc import Callable, Sequence
from dataclasses import replace

from distserve.core.commands import Migrate
from distserve.core.config import KvLayout, ParallelConfig
from distserve.core.errors import ConfigError, TransferError
from distserve.core.events import Migrated
from distserve.transfer.joint import pull_jointly
from distserve.transfer.reshard import KvShard, parts
from distserve.transfer.transport import PartTransport


def instance_address(parallel: ParallelConfig, addresses: Sequence[str]) -> str:
    """What peers hand to :meth:`ShardedTransport.connect`: an instance's shape and the addresses of its ranks."""
    assert len(addresses) == parallel.num_ranks
    return json.dumps({"tp": parallel.tp, "pp": parallel.pp, "ranks": list(addresses)})


class ShardedTransport:
    """Implements :class:`~distserve.transfer.transport.Transport` for the rank that has ``shard`` of the model.

    ``transport`` is the rank's, with the layout of its shard; it is closed with this one. :attr:`address` is the
    rank's own: :func:`instance_address` of all ranks is what :meth:`connect` takes. Every rank of a destination pulls;
    :class:`~distserve.transfer.joint.InstancePuller` makes one of their outcomes.
    """

    def __init__(self, transport: PartTransport, shard: KvShard) -> None:
        layout = transport.layout
        assert (layout.num_layers, layout.num_kv_heads) == (len(shard.layers), len(shard.heads))
        self._transport = transport
        self._shard = shard
        self._ids = itertools.count()
        # One instance is connected to at a time; a peer that does not answer must hold up nothing else.
        self._connecting = threading.Lock()
        # Guards the two below; held for no longer than it takes to look.
        self._lock = threading.Lock()
        self._peers: dict[str, list[str]] = {}
        self._parts: dict[int, list[int]] = {}

    @property
    def layout(self) -> KvLayout:
        """See :class:`~distserve.transfer.transport.Transport`, here and below."""
        return self._transport.layout

    @property
    def buffer(self) -> memoryview:
        """The rank's KV memory."""
        return self._transport.buffer

    @property
    def address(self) -> str:
        """The rank's address."""
        return self._transport.address

    def begin_step(self, step_id: int) -> None:
        """Publish that a step starts."""
        self._transport.begin_step(step_id)

    def layer_done(self, step_id: int, layer: int) -> None:
        """Publish that a layer is complete, counted within the rank's own."""
        self._transport.layer_done(step_id, layer)

    def end_step(self, step_id: int) -> None:
        """Publish that a step is complete."""
        self._transport.end_step(step_id)

    def connect(self, instance_id: str, address: str) -> None:
        """Connect to the ranks of an instance that have layers and heads of this one.

        Raises TransferError if one of them cannot be connected to; then none is.
        """
        parallel, addresses = _parse(address)
        try:
            wanted = parts(parallel, self._shard)
        except ConfigError as error:
            raise TransferError(f"cannot connect to instance {instance_id}: {error}") from error
        connected: list[str] = []
        with self._connecting:
            try:
                for rank, part in wanted.items():
                    peer = f"{instance_id} rank {rank}"
                    self._transport.connect(peer, addresses[rank], part)
                    connected.append(peer)
            except BaseException:
                self.forget(instance_id)
                for peer in connected:
                    self._transport.forget(peer)
                raise
            with self._lock:
                former = self._peers.get(instance_id, [])
                self._peers[instance_id] = connected
            for peer in set(former) - set(connected):
                self._transport.forget(peer)

    def pull(self, migrate: Migrate, done: Callable[[Migrated], None]) -> None:
        """Pull this rank's layers and heads; ``done`` is called once, when the pulls from all ranks have ended."""
        with self._lock:
            # An instance that is not connected is the transport's to report, on a thread of its own.
            peers = self._peers.get(migrate.source_id) or [migrate.source_id]
            ids = [next(self._ids) for _ in peers]
            self._parts[migrate.pull_id] = ids
        pulls = [
            (self._transport, replace(migrate, pull_id=part_id, source_id=peer))
            for part_id, peer in zip(ids, peers, strict=True)
        ]

        def ended(event: Migrated) -> None:
            with self._lock:
                del self._parts[migrate.pull_id]
            done(event)

        pull_jointly(migrate.pull_id, pulls, ended)

    def cancel(self, pull_id: int) -> None:
        """End a pull."""
        with self._lock:
            ids = self._parts.get(pull_id, [])
        for part_id in ids:
            self._transport.cancel(part_id)

    def forget(self, instance_id: str) -> None:
        """Drop all ranks of an instance."""
        with self._lock:
            peers = self._peers.pop(instance_id, [])
        for peer in peers:
            self._transport.forget(peer)

    def close(self) -> None:
        """Close the rank's transport."""
        self._transport.close()


def _parse(address: str) -> tuple[ParallelConfig, list[str]]:
    try:
        packed = json.loads(address)
        parallel, ranks = ParallelConfig(packed["tp"], packed["pp"]), packed["ranks"]
    except (ValueError, TypeError, KeyError) as error:
        raise TransferError(f"{address!r} is not the address of an instance") from error
    if not isinstance(ranks, list) or len(ranks) != parallel.num_ranks:
        raise TransferError(f"{address!r} is not the address of an instance: it has {parallel.num_ranks} ranks")
    return parallel, [str(rank) for rank in ranks]
