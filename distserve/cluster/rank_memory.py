"""KV memory of an instance: each rank moves its own layers and heads, rank 0 speaks for all.

:class:`RankMemory` is in every other rank's process, :class:`InstanceTransport` in rank 0's. They talk through the
engine's sockets, in msgpack that can only become the messages below.
"""

import logging
from collections.abc import Callable
from functools import partial
from threading import Lock

import msgspec

from distserve.cluster.clock import cluster_time
from distserve.core.commands import Migrate
from distserve.core.config import KvLayout, ParallelConfig
from distserve.core.errors import TransferError
from distserve.core.events import Migrated
from distserve.engine.group.driver import RankGroup
from distserve.engine.sharding.shard import Shard
from distserve.transfer import reshard
from distserve.transfer.joint import InstancePuller
from distserve.transfer.sharded import ShardedTransport, instance_address
from distserve.transfer.shm import ShmTransport

logger = logging.getLogger(__name__)


class Connect(msgspec.Struct, tag=True, frozen=True):
    """To a rank: make a peer's memory readable."""

    instance_id: str
    address: str


class Forget(msgspec.Struct, tag=True, frozen=True):
    """To a rank: a peer is gone."""

    instance_id: str


class Pull(msgspec.Struct, tag=True, frozen=True):
    """To a rank: pull your part."""

    migrate: Migrate


class Cancel(msgspec.Struct, tag=True, frozen=True):
    """To a rank: give a pull up."""

    pull_id: int


Request = Connect | Forget | Pull | Cancel
_encoder = msgspec.msgpack.Encoder()
_requests: msgspec.msgpack.Decoder[Request] = msgspec.msgpack.Decoder(Request)
_outcomes = msgspec.msgpack.Decoder(Migrated)

MEMORY = "distserve.cluster.rank_memory:RankMemory"
"""The class below, as the engine is told of it."""


def rank_transport(layout: KvLayout, shard: Shard, secret: bytes) -> ShardedTransport:
    """The transport of one rank on this host; ``secret`` is the launch's."""
    transport = ShmTransport(layout, secret=secret, clock=cluster_time)
    part = reshard.Shard(shard.parallel, shard.rank, shard.num_layers, shard.num_kv_heads)
    return ShardedTransport(transport, part)


class RankMemory:
    """Implements :class:`distserve.engine.group.memory_port.RankMemory`; ``options`` are the launch's secret."""

    def __init__(self, layout: KvLayout, shard: Shard, options: bytes, tell: Callable[[bytes], None]) -> None:
        self._transport = rank_transport(layout, shard, options)
        self._tell = tell
        self.buffer = self._transport.buffer
        self.address = self._transport.address
        self.begin_step = self._transport.begin_step
        self.layer_done = self._transport.layer_done
        self.end_step = self._transport.end_step

    def ask(self, request: bytes) -> None:
        """Do what rank 0 wants; the outcome of a pull is told when it ends."""
        match _requests.decode(request):
            case Connect(instance_id, address):
                try:
                    self._transport.connect(instance_id, address)
                except TransferError as error:
                    logger.warning("%s", error)  # pulls from it fail, and say so
            case Forget(instance_id):
                self._transport.forget(instance_id)
            case Pull(migrate):
                self._transport.pull(migrate, self._ended)
            case Cancel(pull_id):
                self._transport.cancel(pull_id)

    def _ended(self, event: Migrated) -> None:
        self._tell(_encoder.encode(event))


class _RemoteRank:
    """Implements :class:`distserve.transfer.joint.Puller` for a rank in another process."""

    def __init__(self, ask: Callable[[bytes], None]) -> None:
        self._ask = ask
        self._lock = Lock()
        self._waiting: dict[int, Callable[[Migrated], None]] = {}

    def request(self, request: Request) -> None:
        self._ask(_encoder.encode(request))

    def pull(self, migrate: Migrate, done: Callable[[Migrated], None]) -> None:
        with self._lock:
            self._waiting[migrate.pull_id] = done
        self.request(Pull(migrate))

    def cancel(self, pull_id: int) -> None:
        self.request(Cancel(pull_id))

    def told(self, event: Migrated) -> None:
        with self._lock:
            done = self._waiting.pop(event.pull_id)
        done(event)


class InstanceTransport:
    """An instance's :class:`distserve.transfer.transport.Transport`: rank 0's memory, and all ranks' pulls.

    Until :meth:`attach`, only rank 0's memory is there.
    """

    def __init__(self, own: ShardedTransport, parallel: ParallelConfig, secret: bytes) -> None:
        self._own = own
        self.secret = secret
        self._parallel = parallel
        self._remote: dict[int, _RemoteRank] = {}
        self._addresses = [own.address]
        self._puller = InstancePuller([own])
        self.layout = own.layout
        self.buffer = own.buffer
        self.begin_step = own.begin_step
        self.layer_done = own.layer_done
        self.end_step = own.end_step

    def attach(self, group: RankGroup) -> None:
        """The other ranks are there."""
        ranks = range(1, self._parallel.num_ranks)
        self._remote = {rank: _RemoteRank(partial(group.ask, rank)) for rank in ranks}
        self._addresses = [self._own.address, *(group.addresses[rank] for rank in ranks)]
        self._puller = InstancePuller([self._own, *self._remote.values()])

    def told(self, rank: int, answer: bytes) -> None:
        """What rank ``rank`` says of a pull."""
        self._remote[rank].told(_outcomes.decode(answer))

    @property
    def address(self) -> str:
        """All ranks' addresses, with the instance's shape."""
        return instance_address(self._parallel, self._addresses)

    def connect(self, instance_id: str, address: str) -> None:
        """Connect rank 0, and have the others connect."""
        self._own.connect(instance_id, address)
        for rank in self._remote.values():
            rank.request(Connect(instance_id, address))

    def pull(self, migrate: Migrate, done: Callable[[Migrated], None]) -> None:
        """All ranks pull their parts; ``done`` is called once."""
        self._puller.pull(migrate, done)

    def cancel(self, pull_id: int) -> None:
        """All ranks give it up."""
        self._puller.cancel(pull_id)

    def forget(self, instance_id: str) -> None:
        """All ranks let go of the peer."""
        self._own.forget(instance_id)
        for rank in self._remote.values():
            rank.request(Forget(instance_id))

    def close(self) -> None:
        """Close rank 0's; the others' end with their processes."""
        self._own.close()
