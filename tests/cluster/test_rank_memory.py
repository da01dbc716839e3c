"""KV memory of whole instances: every rank moves its part over the transport that the launch chose, or says why not."""

import queue
import socket
import time
from collections.abc import Callable, Iterator
from typing import Any, cast

import msgspec
import numpy as np
import pytest

from distserve.cluster.clock import cluster_time
from distserve.cluster.instance import Instance
from distserve.cluster.network import create_key
from distserve.cluster.parts import EnginePlan, InstanceConfig, KvAccess
from distserve.cluster.rank_memory import InstanceTransport, MemoryOptions, RankMemory, open_memory, rank_transport
from distserve.core.commands import Migrate
from distserve.core.config import InstanceSpec, KvConfig, ParallelConfig, Role
from distserve.core.errors import ConfigError, TransferError
from distserve.core.events import Migrated
from distserve.demo import model_dir
from distserve.engine.group.driver import RankGroup
from distserve.engine.sharding.shard import Shard
from distserve.transfer.choose import TransportKind

KV = KvConfig(num_blocks=8)
LAYERS, HEADS, HEAD_DIM = 4, 2, 8
TCP = MemoryOptions(b"secret", TransportKind.TCP, "127.0.0.1")
SHM = MemoryOptions(b"secret")
CARD = MemoryOptions(b"secret", TransportKind.AUTO, None, "tests.cluster.rehearsed_cards:open_card_alone")
CARDS_APART = msgspec.structs.replace(CARD, kind=TransportKind.TCP, host="127.0.0.1")
KEY = create_key()


class Group:
    """Ranks other than 0 in this process, reached as those of an instance are: by bytes."""

    def __init__(self, parallel: ParallelConfig, options: MemoryOptions, kv: KvConfig = KV) -> None:
        own, self.pool = open_memory(layout_of(parallel, 0, kv), shard_of(parallel, 0), 0, options)
        self.transport = InstanceTransport(own, parallel, options)
        self.memories = {
            rank: RankMemory(
                layout_of(parallel, rank, kv), shard_of(parallel, rank), rank, options.encode(), self._told(rank)
            )
            for rank in range(1, parallel.num_ranks)
        }
        self.addresses = {rank: memory.address for rank, memory in self.memories.items()}
        self.transport.attach(cast("RankGroup", self))

    def ask(self, rank: int, request: bytes) -> None:
        self.memories[rank].ask(request)

    def _told(self, rank: int) -> Callable[[bytes], None]:
        return lambda answer: self.transport.told(rank, answer)

    def buffers(self) -> list[np.ndarray]:
        """Each rank's memory as ``[L, 2, N, P, K, D]`` of 4-byte numbers."""
        pools = [self.pool, *(memory.pool for memory in self.memories.values())]
        layouts = [layout_of(self.transport._parallel, rank) for rank in range(len(pools))]
        return [
            pool.numpy().view(np.float32).reshape(layout.shape) for pool, layout in zip(pools, layouts, strict=True)
        ]


def shard_of(parallel: ParallelConfig, rank: int) -> Shard:
    return Shard(parallel, rank, LAYERS, 4, HEADS, HEAD_DIM)


def layout_of(parallel: ParallelConfig, rank: int, kv: KvConfig = KV) -> Any:
    return shard_of(parallel, rank).layout(kv, "float32")


def make_rank(parallel: ParallelConfig, rank: int, options: MemoryOptions, kv: KvConfig = KV) -> Any:
    return rank_transport(layout_of(parallel, rank, kv), shard_of(parallel, rank), options)


def pulled(group: Group) -> Migrated:
    """The outcome of a pull of two blocks."""
    ended: queue.SimpleQueue[Migrated] = queue.SimpleQueue()
    group.transport.pull(Migrate(1, ("r", 0), "prefill-0", (3, 1), (0, 5), 2, 0, cluster_time() + 10), ended.put)
    return ended.get(timeout=20)


@pytest.mark.parametrize("options", [TCP, SHM, CARD, CARDS_APART], ids=["tcp", "shm", "card", "cards apart"])
@pytest.mark.parametrize(("src", "dst"), [((1, 1), (1, 1)), ((2, 1), (1, 1)), ((1, 2), (2, 1)), ((2, 2), (1, 2))])
def test_all_ranks_pull_their_parts(options: MemoryOptions, src: tuple[int, int], dst: tuple[int, int]) -> None:
    source, target = Group(ParallelConfig(*src), options), Group(ParallelConfig(*dst), options)
    whole = np.random.default_rng(0).normal(size=(LAYERS, 2, 8, 16, HEADS, HEAD_DIM)).astype(np.float32)
    for rank, buffer in enumerate(source.buffers()):
        shard = shard_of(ParallelConfig(*src), rank)
        buffer[:] = whole[shard.layers.start : shard.layers.stop, ..., shard.kv_heads.start : shard.kv_heads.stop, :]
    target.transport.connect("prefill-0", source.transport.address)
    event = pulled(target)
    assert event.ok, event.reason
    for rank, buffer in enumerate(target.buffers()):
        shard = shard_of(ParallelConfig(*dst), rank)
        mine = whole[shard.layers.start : shard.layers.stop, ..., shard.kv_heads.start : shard.kv_heads.stop, :]
        assert np.array_equal(buffer[:, :, [0, 5]], mine[:, :, [3, 1]])
    for group in (source, target):
        group.transport.close()


@pytest.mark.parametrize("options", [TCP, SHM])
@pytest.mark.parametrize("dst", [(1, 1), (2, 2)])
def test_instances_that_differ_are_refused_with_both_values(options: MemoryOptions, dst: tuple[int, int]) -> None:
    source = Group(ParallelConfig(2, 1), options, KvConfig(num_blocks=4, block_size=32))
    target = Group(ParallelConfig(*dst), options)
    with pytest.raises(TransferError, match="block_size 32 there, 16 here"):
        target.transport.connect("prefill-0", source.transport.address)
    # Not half of its ranks are connected: pulls say that none is.
    assert "not connected to instance prefill-0" in pulled(target).reason
    for group in (source, target):
        group.transport.close()


def test_a_rank_that_nobody_hears_from_is_given_up_in_seconds() -> None:
    """A port that takes connections and says nothing, as some firewalls do."""
    target = Group(ParallelConfig(2, 1), TCP)
    source = Group(ParallelConfig(1, 1), TCP)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        port = source.transport._own.address.rpartition(":")[2].partition("/")[0]
        address = source.transport.address.replace(f":{port}/", f":{silent.getsockname()[1]}/")
        began = time.monotonic()
        with pytest.raises(TransferError, match="timed out"):
            target.transport.connect("prefill-0", address)
        assert time.monotonic() - began < 15
    target.transport.connect("prefill-0", source.transport.address)
    assert pulled(target).ok
    for group in (source, target):
        group.transport.close()


@pytest.fixture
def make_instance() -> Iterator[Callable[..., Instance]]:
    made: list[Instance] = []

    def make(role: Role, dtype: str, access: KvAccess) -> Instance:
        spec = InstanceSpec(f"{role}-0", role, KV)
        plan = EnginePlan(model_dir(), dtype, 1)
        # More CPUs wanted than any machine has: the test's process stays where it is.
        config = InstanceConfig(spec, plan, KEY, "127.0.0.1", 0, 10**6, kv_access=access)
        made.append(Instance(config))
        return made[-1]

    yield make
    for instance in made:
        instance._mailbox.close()
        instance._peers.close()
        instance._transport.close()


@pytest.mark.parametrize("access", [KvAccess(), KvAccess("tcp", "lo", opens_port=True)])
def test_an_instance_says_why_it_cannot_pull_from_another(
    make_instance: Callable[..., Instance], access: KvAccess
) -> None:
    prefill = make_instance(Role.PREFILL, "bfloat16", access)
    decode = make_instance(Role.DECODE, "float32", access)
    (problem,) = decode.meet([prefill.card, decode.card])
    assert problem.startswith("decode-0 cannot pull KV from prefill-0: ")
    assert "dtype bfloat16 there, float32 here" in problem
    assert prefill.meet([decode.card]) == ()


def test_no_port_is_opened_unless_wanted(make_instance: Callable[..., Instance]) -> None:
    assert "tcp://" not in make_instance(Role.PREFILL, "float32", KvAccess()).card.kv_address
    assert "tcp://127.0.0.1:" in make_instance(Role.PREFILL, "float32", KvAccess(opens_port=True)).card.kv_address


def test_an_interface_that_is_not_there_is_refused(make_instance: Callable[..., Instance]) -> None:
    with pytest.raises(ConfigError, match="has no network interface nope0"):
        make_instance(Role.PREFILL, "float32", KvAccess("tcp", "nope0", opens_port=True))
