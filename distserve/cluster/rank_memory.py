"""KV memory of an instance: each rank moves its own layers and heads, rank 0 speaks for all.

:class:`RankMemory` is in every other rank's process, :class:`InstanceTransport` in rank 0's. They talk through the
engine's sockets, in msgpack that can only become the messages below.
"""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pkgutil import resolve_name
from threading import Lock

import msgspec
import torch
from torch import Tensor

from distserve.cluster.clock import cluster_time
from distserve.cluster.gpu import Hardware, gpu_transport
from distserve.core.commands import Migrate
from distserve.core.config import KvLayout, ParallelConfig
from distserve.core.errors import TransferError
from distserve.core.events import Migrated
from distserve.engine.group.driver import RankGroup
from distserve.engine.sharding.shard import Shard
from distserve.transfer import reshard
from distserve.transfer.choose import HostTransport, TransportKind
from distserve.transfer.joint import InstancePuller
from distserve.transfer.sharded import ShardedTransport, instance_address

_CONNECT_PATIENCE = 60.0
"""Seconds for a rank to say whether it has connected to a peer, far beyond its own deadline: a bug if it has not."""


class MemoryOptions(msgspec.Struct, frozen=True):
    """What a rank's memory is made with: the launch's ``secret``, the transport, where it listens (None: nowhere)."""

    secret: bytes
    kind: TransportKind = TransportKind.AUTO
    host: str | None = None
    hardware: str = ""
    """Names what opens the cards, as in :class:`distserve.cluster.parts.EnginePlan`: a rank's memory is on the card of
    its local rank, of those that the instance sees there. Empty: memory of the host."""

    def encode(self) -> bytes:
        """For ranks in other processes."""
        return _encoder.encode(self)


class Connect(msgspec.Struct, tag=True, frozen=True):
    """To a rank: make a peer's memory readable. Answered by Connected."""

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


class Connected(msgspec.Struct, tag=True, frozen=True):
    """From a rank: a peer's memory is readable, or why it is not."""

    instance_id: str
    problem: str = ""


class Ended(msgspec.Struct, tag=True, frozen=True):
    """From a rank: its part of a pull has ended."""

    event: Migrated


Request = Connect | Forget | Pull | Cancel
Answer = Connected | Ended
_encoder = msgspec.msgpack.Encoder()
_requests: msgspec.msgpack.Decoder[Request] = msgspec.msgpack.Decoder(Request)
_answers: msgspec.msgpack.Decoder[Answer] = msgspec.msgpack.Decoder(Answer)
_options = msgspec.msgpack.Decoder(MemoryOptions)

MEMORY = "distserve.cluster.rank_memory:RankMemory"
"""The class below, as the engine is told of it."""


def rank_transport(layout: KvLayout, shard: Shard, options: MemoryOptions) -> ShardedTransport:
    """The transport of one rank, which suits each peer by where that is.

    Raises TransferError if there is no memory for ``layout``, or no such address to listen on.
    """
    transport = HostTransport(layout, secret=options.secret, clock=cluster_time, host=options.host, kind=options.kind)
    part = reshard.KvShard(shard.parallel, shard.rank, shard.num_layers, shard.num_kv_heads)
    return ShardedTransport(transport, part)


def open_memory(
    layout: KvLayout, shard: Shard, local_rank: int, options: MemoryOptions
) -> tuple[ShardedTransport, Tensor]:
    """The transport of a rank, where ``options`` have its memory, and that memory, flat uint8.

    Raises what :func:`rank_transport` and :func:`distserve.cluster.gpu.gpu_transport` do.
    """
    if not options.hardware:
        transport = rank_transport(layout, shard, options)
        return transport, torch.frombuffer(transport.buffer, dtype=torch.uint8)
    open_hardware: Callable[[str], Hardware] = resolve_name(options.hardware)
    hardware = open_hardware(f"cuda:{local_rank}")
    return gpu_transport(layout, shard, options.secret, hardware, options.kind, options.host)


class RankMemory:
    """Implements :class:`distserve.engine.group.memory_port.RankMemory`; ``options`` are MemoryOptions, encoded."""

    def __init__(
        self, layout: KvLayout, shard: Shard, local_rank: int, options: bytes, tell: Callable[[bytes], None]
    ) -> None:
        self._transport, self.pool = open_memory(layout, shard, local_rank, _options.decode(options))
        self._tell = tell
        # A peer that does not answer must not hold up the rank's steps.
        self._connector = ThreadPoolExecutor(1, thread_name_prefix="kv-connect")
        self.address = self._transport.address
        self.begin_step = self._transport.begin_step
        self.layer_done = self._transport.layer_done
        self.end_step = self._transport.end_step

    def ask(self, request: bytes) -> None:
        """Do what rank 0 wants; the outcome of a pull is told when it ends."""
        match _requests.decode(request):
            case Connect(instance_id, address):
                self._connector.submit(self._connect, instance_id, address)
            case Forget(instance_id):
                self._transport.forget(instance_id)
                # Again once it is connected, if that is under way.
                self._connector.submit(self._transport.forget, instance_id)
            case Pull(migrate):
                self._transport.pull(migrate, self._ended)
            case Cancel(pull_id):
                self._transport.cancel(pull_id)

    def _connect(self, instance_id: str, address: str) -> None:
        try:
            self._transport.connect(instance_id, address)
        except TransferError as error:
            self._answer(Connected(instance_id, str(error)))
        else:
            self._answer(Connected(instance_id))

    def _ended(self, event: Migrated) -> None:
        self._answer(Ended(event))

    def _answer(self, answer: Answer) -> None:
        self._tell(_encoder.encode(answer))


class _RemoteRank:
    """Implements :class:`distserve.transfer.joint.Puller` for a rank in another process."""

    def __init__(self, ask: Callable[[bytes], None]) -> None:
        self._ask = ask
        self._lock = Lock()
        self._waiting: dict[int, Callable[[Migrated], None]] = {}
        self._connecting: dict[str, Future[str]] = {}

    def request(self, request: Request) -> None:
        self._ask(_encoder.encode(request))

    def connect(self, instance_id: str, address: str) -> "Future[str]":
        """Have the rank connect; the future is why it could not, empty if it could."""
        with self._lock:
            connecting = self._connecting[instance_id] = Future()
        self.request(Connect(instance_id, address))
        return connecting

    def pull(self, migrate: Migrate, done: Callable[[Migrated], None]) -> None:
        with self._lock:
            self._waiting[migrate.pull_id] = done
        self.request(Pull(migrate))

    def cancel(self, pull_id: int) -> None:
        self.request(Cancel(pull_id))

    def told(self, answer: Answer) -> None:
        match answer:
            case Connected(instance_id, problem):
                with self._lock:
                    connecting = self._connecting.pop(instance_id)
                connecting.set_result(problem)
            case Ended(event):
                with self._lock:
                    done = self._waiting.pop(event.pull_id)
                done(event)


class InstanceTransport:
    """An instance's :class:`distserve.transfer.transport.Transport`: rank 0's memory, and all ranks' pulls.

    Until :meth:`attach`, only rank 0's memory is there. ``pool`` is that memory where it is a GPU's.
    """

    def __init__(
        self, own: ShardedTransport, parallel: ParallelConfig, options: MemoryOptions, pool: Tensor | None = None
    ) -> None:
        self.pool = pool
        self._own = own
        self.options = options
        self._parallel = parallel
        self._remote: dict[int, _RemoteRank] = {}
        self._addresses = [own.address]
        self._puller = InstancePuller([own])
        self.layout = own.layout
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
        self._remote[rank].told(_answers.decode(answer))

    @property
    def buffer(self) -> memoryview:
        """Rank 0's memory; raises TransferError if it is a GPU's."""
        return self._own.buffer

    @property
    def address(self) -> str:
        """All ranks' addresses, with the instance's shape."""
        return instance_address(self._parallel, self._addresses)

    def connect(self, instance_id: str, address: str) -> None:
        """Connect all ranks, or none of them. One call at a time for each peer."""
        others = [(number, rank.connect(instance_id, address)) for number, rank in self._remote.items()]
        failure: TransferError | None = None
        try:
            self._own.connect(instance_id, address)
        except TransferError as error:
            failure = error
        # All have to have said something: an answer that comes later would be taken for that to the next attempt.
        for number, connecting in others:
            if problem := connecting.result(_CONNECT_PATIENCE):
                failure = failure or TransferError(f"rank {number}: {problem}")
        if failure is not None:
            self.forget(instance_id)
            raise failure

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
