"""Migration between instances of different shapes: the plan against a brute-force scatter, and real transports."""

import itertools
import math
import socket
import threading
from contextlib import ExitStack
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distserve.core.commands import Migrate
from distserve.core.config import KvConfig, KvLayout, ParallelConfig
from distserve.core.errors import ConfigError, TransferError
from distserve.transfer.choose import HostTransport
from distserve.transfer.joint import InstancePuller
from distserve.transfer.local import LocalNetwork, LocalTransport
from distserve.transfer.plan import plane_bytes, plane_pieces
from distserve.transfer.reshard import KvShard, parts
from distserve.transfer.sharded import ShardedTransport, instance_address
from distserve.transfer.shm import ShmTransport
from distserve.transfer.stream import Stream
from distserve.transfer.tcp import TcpTransport
from tests.transfer.pools import SECRET, Ended

KV = KvConfig(num_blocks=6, block_size=2)
HEAD_DIM = 2


def degrees(num_heads: int) -> list[int]:
    return [tp for tp in range(1, 9) if num_heads % tp == 0 or tp % num_heads == 0]


def shapes_of(num_heads: int, num_layers: int) -> list[ParallelConfig]:
    return [ParallelConfig(tp, pp) for tp in degrees(num_heads) for pp in range(1, 5) if pp <= num_layers]


@st.composite
def migrations(draw: st.DrawFn):
    num_heads, num_layers = draw(st.integers(1, 8)), draw(st.integers(1, 9))
    shape = st.sampled_from(shapes_of(num_heads, num_layers))
    src, dst = draw(shape), draw(shape)
    src_blocks = draw(st.permutations(range(KV.num_blocks)))
    dst_blocks = draw(st.permutations(range(KV.num_blocks)))
    count = draw(st.integers(0, KV.num_blocks))
    return num_heads, num_layers, src, dst, tuple(src_blocks[:count]), tuple(dst_blocks[:count])


def model_kv(num_layers: int, num_heads: int, seed: int = 0) -> np.ndarray:
    """A whole model's pool, ``[L, 2, N, P, K, D]``, no element zero and all of one pool different."""
    shape = (num_layers, 2, KV.num_blocks, KV.block_size, num_heads, HEAD_DIM)
    return (np.random.default_rng(seed).permutation(math.prod(shape)) + 1).astype(np.uint32).reshape(shape)


def ranks_of(parallel: ParallelConfig, num_layers: int, num_heads: int) -> list[KvShard]:
    return [KvShard(parallel, rank, num_layers, num_heads) for rank in range(parallel.num_ranks)]


def layout_of(shard: KvShard, kv: KvConfig = KV) -> KvLayout:
    return shard.layout(kv, HEAD_DIM, "float32")


def shard_of(kv: np.ndarray, shard: KvShard) -> np.ndarray:
    """What a rank has of a model's pool."""
    return np.ascontiguousarray(
        kv[shard.layers.start : shard.layers.stop][..., shard.heads.start : shard.heads.stop, :]
    )


def check_plan(num_heads, num_layers, src, dst, src_blocks, dst_blocks) -> None:
    whole = model_kv(num_layers, num_heads)
    scattered = np.zeros_like(whole)
    scattered[:, :, list(dst_blocks)] = whole[:, :, list(src_blocks)]
    pools = [shard_of(whole, shard).view(np.uint8).ravel() for shard in ranks_of(src, num_layers, num_heads)]
    layouts = [layout_of(shard) for shard in ranks_of(src, num_layers, num_heads)]
    num_ready = len(src_blocks) // 2
    for shard in ranks_of(dst, num_layers, num_heads):
        ours = layout_of(shard)
        got, writes = np.zeros(ours.num_bytes, np.uint8), np.zeros(ours.num_bytes, np.uint8)
        for rank, part in parts(src, shard).items():
            theirs = replace(part.source_layout(ours), num_blocks=KV.num_blocks)
            assert theirs == layouts[rank]
            pieces = [
                plane_pieces(src_blocks[some], dst_blocks[some], theirs, ours, part)
                for some in (slice(num_ready), slice(num_ready, None))
            ]
            stream = Stream(*pieces, part.num_layers, max_bytes=100)
            src_first, dst_first = 2 * part.src_layers.start, 2 * part.dst_layers.start
            while not stream.is_done:
                batch = stream.next(part.num_layers)
                for plane, (offset, to, length) in itertools.product(batch.planes, batch.pieces.tolist()):
                    start = (src_first + plane) * plane_bytes(theirs) + offset
                    end = (dst_first + plane) * plane_bytes(ours) + to
                    got[end : end + length] = pools[rank][start : start + length]
                    writes[end : end + length] += 1
        want = shard_of(scattered, shard)
        assert np.array_equal(got, want.view(np.uint8).ravel())
        assert np.array_equal(writes, np.repeat((want != 0).ravel(), 4)), "not each byte once"


@given(migrations())
@settings(max_examples=400)
def test_every_rank_gets_its_layers_and_heads_of_the_blocks_each_byte_once(migration) -> None:
    check_plan(*migration)


@pytest.mark.slow
@pytest.mark.parametrize("num_heads", range(1, 9))
def test_every_pair_of_shapes(num_heads: int) -> None:
    for num_layers in range(1, 10):
        for src, dst in itertools.product(shapes_of(num_heads, num_layers), repeat=2):
            check_plan(num_heads, num_layers, src, dst, (4, 1, 2), (0, 1, 2))


class Instances:
    """Instances of ranks with real transports, all in this process."""

    def __init__(self, kind: str, stack: ExitStack) -> None:
        self._kind = kind
        self._stack = stack
        self._network = LocalNetwork()

    def _transport(self, layout: KvLayout, node: int):
        def clock() -> float:
            return 0.0

        if self._kind == "local":
            return LocalTransport(layout, network=self._network, clock=clock)
        if self._kind == "shm":
            return ShmTransport(layout, secret=SECRET, clock=clock)
        if self._kind == "tcp":
            return TcpTransport(layout, host="127.0.0.1", secret=SECRET, clock=clock)
        return HostTransport(layout, secret=SECRET, clock=clock, host="127.0.0.1", machine=f"node-{node}")

    def start(self, parallel: ParallelConfig, num_layers: int, num_heads: int, kv: KvConfig = KV):
        started = []
        for shard in ranks_of(parallel, num_layers, num_heads):
            transport = ShardedTransport(self._transport(layout_of(shard, kv), shard.rank % 2), shard)
            self._stack.callback(transport.close)
            started.append(transport)
        return started


@pytest.fixture(params=["local", "shm", "tcp", "mixed"])
def instances(request):
    with ExitStack() as stack:
        yield Instances(request.param, stack)


def fill_ranks(ranks, parallel, whole) -> None:
    num_layers, num_heads = whole.shape[0], whole.shape[4]
    for transport, shard in zip(ranks, ranks_of(parallel, num_layers, num_heads), strict=True):
        np.frombuffer(transport.buffer, np.uint32)[:] = shard_of(whole, shard).ravel()


def address_of(ranks, parallel) -> str:
    return instance_address(parallel, [rank.address for rank in ranks])


def migrate(src_blocks, dst_blocks, *, ready=None, pull_id=7, step=1) -> Migrate:
    num_ready = len(src_blocks) if ready is None else ready
    return Migrate(pull_id, ("r", 0), "prefill", src_blocks, dst_blocks, num_ready, step, math.inf)


def holds(ranks, parallel, expected) -> bool:
    shards = ranks_of(parallel, expected.shape[0], expected.shape[4])
    return all(
        np.array_equal(np.frombuffer(rank.buffer, np.uint32), shard_of(expected, shard).ravel())
        for rank, shard in zip(ranks, shards, strict=True)
    )


SHAPES = [
    ((1, 1), (1, 1)),
    ((2, 2), (1, 2)),
    ((1, 2), (2, 1)),
    ((2, 1), (4, 3)),
    ((4, 3), (2, 2)),
    ((8, 1), (4, 2)),
    ((2, 2), (8, 1)),
]


@pytest.mark.parametrize(("src", "dst"), SHAPES)
def test_an_instance_pulls_from_one_of_another_shape(instances, src, dst):
    """Half of the blocks are ready, half follow the step, which every source rank runs at its own pace."""
    src, dst = ParallelConfig(*src), ParallelConfig(*dst)
    num_layers, num_heads = 5, 4
    whole = model_kv(num_layers, num_heads)
    sources, sinks = instances.start(src, num_layers, num_heads), instances.start(dst, num_layers, num_heads)
    fill_ranks(sources, src, whole)
    for sink in sinks:
        sink.connect("prefill", address_of(sources, src))
    ended = Ended()
    InstancePuller(sinks).pull(migrate((5, 0, 1, 3), (1, 2, 3, 0), ready=2), ended)
    for source in sources[:-1]:
        source.begin_step(1)
        for layer in range(source.layout.num_layers):
            source.layer_done(1, layer)
        source.end_step(1)
    assert ended.none()
    sources[-1].end_step(1)
    event = ended.next()
    assert (event.pull_id, event.ok) == (7, True), event.reason
    expected = np.zeros_like(whole)
    expected[:, :, [1, 2, 3, 0]] = whole[:, :, [5, 0, 1, 3]]
    assert holds(sinks, dst, expected)
    assert event.num_bytes == 4 * KV.block_size * sum(sink.layout.token_bytes for sink in sinks)
    assert ended.none(0.01)


def test_pulls_longer_than_a_frame(instances):
    """Whole blocks at the sources, single heads of tokens at the destination; more than a frame of each."""
    kv = KvConfig(num_blocks=600, block_size=256)
    src, dst = ParallelConfig(2, 1), ParallelConfig(1, 1)
    sources, sinks = instances.start(src, 1, 2, kv), instances.start(dst, 1, 2, kv)
    for source in sources:
        values = np.frombuffer(source.buffer, np.uint32)
        values[:] = np.random.default_rng(len(source.address)).integers(1, 2**32, values.shape, np.uint32)
    sinks[0].connect("prefill", address_of(sources, src))
    src_blocks = tuple(range(20, 580))
    dst_blocks = tuple(range(560))
    ended = Ended()
    InstancePuller(sinks).pull(migrate(src_blocks, dst_blocks), ended)
    assert ended.next().ok
    got = np.frombuffer(sinks[0].buffer, np.uint32).reshape(2, 600, 256, 2, HEAD_DIM)
    for head, source in enumerate(sources):
        theirs = np.frombuffer(source.buffer, np.uint32).reshape(2, 600, 256, HEAD_DIM)
        assert np.array_equal(got[:, :560, :, head], theirs[:, 20:580])


def test_one_rank_that_closes_fails_the_pull_once_and_ends_the_other_parts(instances):
    src, dst = ParallelConfig(2, 2), ParallelConfig(1, 2)
    sources, sinks = instances.start(src, 4, 2), instances.start(dst, 4, 2)
    for sink in sinks:
        sink.connect("prefill", address_of(sources, src))
    ended = Ended()
    InstancePuller(sinks).pull(migrate((1,), (1,), ready=0), ended)
    assert ended.none()
    sources[3].close()
    event = ended.next()
    assert not event.ok
    assert "rank 3 closed" in event.reason
    assert event.num_bytes == 0
    assert ended.none(0.01)


def test_cancel_ends_all_parts(instances):
    src, dst = ParallelConfig(2, 1), ParallelConfig(1, 1)
    sources, sinks = instances.start(src, 4, 2), instances.start(dst, 4, 2)
    sinks[0].connect("prefill", address_of(sources, src))
    ended = Ended()
    instance = InstancePuller(sinks)
    instance.pull(migrate((1,), (1,), ready=0), ended)
    instance.cancel(7)
    assert ended.next().reason == "cancelled"
    instance.cancel(7)
    for source in sources:
        source.end_step(1)
    assert ended.none()
    assert not np.frombuffer(sinks[0].buffer, np.uint8).any()


def test_an_instance_that_is_not_connected_or_forgotten(instances):
    src, dst = ParallelConfig(2, 1), ParallelConfig(1, 1)
    sources, sinks = instances.start(src, 4, 2), instances.start(dst, 4, 2)
    never, forgotten = Ended(), Ended()
    sinks[0].pull(migrate((1,), (1,)), never)
    assert "not connected to instance prefill" in never.next().reason
    sinks[0].connect("prefill", address_of(sources, src))
    sinks[0].pull(migrate((1,), (1,), ready=0), forgotten)
    sinks[0].forget("prefill")
    assert "is gone" in forgotten.next().reason


def test_an_instance_comes_back_with_another_shape(instances):
    whole = model_kv(4, 2)
    sinks = instances.start(ParallelConfig(2, 1), 4, 2)
    for shape in ((2, 2), (1, 1), (1, 2)):
        src = ParallelConfig(*shape)
        sources = instances.start(src, 4, 2)
        fill_ranks(sources, src, whole)
        for sink in sinks:
            np.frombuffer(sink.buffer, np.uint8)[:] = 0
            sink.connect("prefill", address_of(sources, src))
        ended = Ended()
        InstancePuller(sinks).pull(migrate(tuple(range(6)), tuple(range(6))), ended)
        assert ended.next().ok
        assert holds(sinks, ParallelConfig(2, 1), whole)


def test_a_peer_that_does_not_answer_holds_up_no_pull():
    """Connecting waits for it; pulls from others begin, end and are cancelled meanwhile."""
    one = ParallelConfig()
    with ExitStack() as stack:
        instances = Instances("tcp", stack)
        (source,), (sink,) = instances.start(one, 2, 2), instances.start(one, 2, 2)
        sink.connect("prefill", address_of([source], one))
        silent = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
        address = instance_address(one, [f"tcp://127.0.0.1:{silent.getsockname()[1]}/x"])

        def connect() -> None:
            with pytest.raises(TransferError, match="timed out"):
                sink.connect("silent", address)

        thread = threading.Thread(target=connect)
        thread.start()
        connection, _ = silent.accept()
        with connection:
            ended = Ended()
            sink.pull(migrate((1,), (1,)), ended)
            assert ended.next(timeout=4).ok
            sink.pull(migrate((1,), (1,), ready=0), ended)
            sink.cancel(7)
            assert ended.next(timeout=4).reason == "cancelled"
            sink.forget("prefill")
            assert thread.is_alive()
            thread.join()


def test_models_that_differ_are_refused_with_both_values(instances):
    (sink,) = instances.start(ParallelConfig(1, 1), 4, 2)
    sources = instances.start(ParallelConfig(2, 1), 4, 4)
    with pytest.raises(TransferError, match=r"instance prefill rank 0: .*num_kv_heads 2 there, 1 here"):
        sink.connect("prefill", address_of(sources, ParallelConfig(2, 1)))
    ended = Ended()
    sink.pull(migrate((1,), (1,)), ended)
    assert "not connected" in ended.next().reason


def test_block_sizes_that_differ_are_refused_with_both_values(instances):
    (sink,) = instances.start(ParallelConfig(1, 1), 4, 2)
    sources = instances.start(ParallelConfig(2, 1), 4, 2, KvConfig(num_blocks=6, block_size=8))
    with pytest.raises(TransferError, match="block_size 8 there, 2 here"):
        sink.connect("prefill", address_of(sources, ParallelConfig(2, 1)))


@pytest.mark.parametrize(
    ("address", "says"),
    [
        ("tcp://h:1/x", "not the address of an instance"),
        ('{"tp": 2, "pp": 1, "ranks": ["a"]}', "it has 2 ranks"),
        ('{"tp": 3, "pp": 1, "ranks": ["a", "b", "c"]}', "tp 3 does not divide"),
    ],
)
def test_what_is_no_address_of_a_fitting_instance_is_refused(instances, address, says):
    (sink,) = instances.start(ParallelConfig(1, 1), 4, 2)
    with pytest.raises(TransferError, match=says):
        sink.connect("prefill", address)


def test_a_shape_that_the_model_cannot_be_cut_into_is_refused():
    with pytest.raises(ConfigError, match="tp 3 does not divide"):
        KvShard(ParallelConfig(3, 1), 0, 4, 4)
