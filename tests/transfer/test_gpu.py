"""Ranks on GPUs map each other's memory where a card reaches it, and use the network elsewhere."""

import time
from dataclasses import replace

import pytest

from distserve.core.errors import TransferError
from distserve.transfer.choose import Whereabouts
from distserve.transfer.gpu import GpuTransport, is_near
from distserve.transfer.nccl.sockets import SocketCollectives
from distserve.transfer.nccl.transport import NcclTransport
from tests.transfer.fake_device import FakeDevice
from tests.transfer.pools import LAYOUT, SECRET, Ended, blocks_of, fill, migrate

HERE = Whereabouts("a", "cuda-ipc:card-0/x", "nccl://h:1/x")


def can_reach(address):
    return "card-0" in address


@pytest.mark.parametrize(
    ("theirs", "near"),
    [
        (Whereabouts("a", "cuda-ipc:card-0/y", "nccl://h:2/y"), True),
        (Whereabouts("a", "cuda-ipc:card-0/y"), True),
        (Whereabouts("a", "cuda-ipc:card-1/y", "nccl://h:2/y"), False),
        (Whereabouts("a", "", "nccl://h:2/y"), False),
        (Whereabouts("b", "cuda-ipc:card-0/y", "nccl://i:2/y"), False),
    ],
)
def test_one_host_and_access_of_the_card_decide(theirs, near):
    assert is_near(HERE, theirs, can_reach) is near


@pytest.mark.parametrize(
    ("ours", "theirs", "says"),
    [
        (HERE, Whereabouts("b", "cuda-ipc:card-0/y"), "not on this host, and the peer is not on the network"),
        (HERE, Whereabouts("a", "cuda-ipc:card-1/y"), "on a GPU that this one has no access to, and the peer"),
        (
            Whereabouts("a", "cuda-ipc:card-0/x"),
            Whereabouts("b", "", "nccl://i:2/y"),
            "this rank is not on the network",
        ),
    ],
)
def test_a_pair_without_a_way_is_told_what_to_do(ours, theirs, says):
    with pytest.raises(TransferError, match=says):
        is_near(ours, theirs, can_reach)


class Network:
    """A transport to other hosts that notes what it is asked."""

    address = "nccl://h:1/x"

    def __init__(self, pool):
        self.pool = pool
        self.calls = []

    def __getattr__(self, name):
        return lambda *arguments: self.calls.append((name, *arguments))


def test_one_pool_has_peers_near_and_far():
    networks, lost = [], []

    def network(pool):
        networks.append(Network(pool))
        return networks[-1]

    def make(machine="a"):
        return GpuTransport(
            LAYOUT,
            device=FakeDevice("card-0"),
            secret=SECRET,
            clock=time.time,
            on_lost=lost.append,
            far=network,
            machine=machine,
        )

    sink, near, far = make(), make(), make("b")
    try:
        assert networks[0].pool is sink.pool
        fill(near.buffer, LAYOUT, 1)
        ended = Ended()
        sink.connect("near", near.address)
        sink.connect("far", far.address)
        assert networks[0].calls == [("connect", "far", Network.address, None)]
        pull = migrate(1, (3,), (4,), ready=0, step=2)
        for name in ("near", "far"):
            sink.pull(replace(pull, source_id=name), ended)
        assert [call[0] for call in networks[0].calls] == ["connect", "pull"]
        near.begin_step(2)
        near.layer_done(2, 0)
        near.end_step(2)
        assert [call[0] for call in networks[1].calls] == ["begin_step", "layer_done", "end_step"]
        assert ended.next().ok
        assert (blocks_of(sink.buffer, LAYOUT)[:, :, 4] == blocks_of(near.buffer, LAYOUT)[:, :, 3]).all()
        # A peer that moved to another host is let go of where it was.
        sink.connect("near", far.address)
        sink.pull(migrate(9, (1,), (1,)), ended)
        assert "not connected" in ended.next().reason
        sink.forget("far")
        assert networks[0].calls[-1] == ("forget", "far")
    finally:
        for transport in (sink, near, far):
            transport.close()
    assert [network.calls[-1] for network in networks] == [("close",)] * 3
    assert not lost


def test_kv_in_gpu_memory_comes_from_the_same_card_and_over_nccl():
    """One pool, a peer that is mapped and one that sends: fake cards, and sockets in NCCL's place."""
    collectives, lost = [], []

    def over_nccl(pool):
        collectives.append(SocketCollectives())
        return NcclTransport(
            LAYOUT, pool, host="127.0.0.1", secret=SECRET, clock=time.time, collectives=collectives[-1]
        )

    def make(machine):
        return GpuTransport(
            LAYOUT,
            device=FakeDevice("card-0"),
            secret=SECRET,
            clock=time.time,
            on_lost=lost.append,
            far=over_nccl,
            machine=machine,
        )

    sink, near, far = make("a"), make("a"), make("b")
    try:
        ended = Ended()
        for seed, source in ((1, near), (2, far)):
            fill(source.buffer, LAYOUT, seed)
        for source, block in ((near, 3), (far, 4)):
            sink.connect("source", source.address)
            pull = migrate(block, (block,), (block,), ready=0, step=6, deadline=time.time() + 60)
            sink.pull(pull, ended)
            assert ended.none()
            source.begin_step(6)
            for layer in range(LAYOUT.num_layers):
                source.layer_done(6, layer)
            source.end_step(6)
            event = ended.next()
            assert event.ok, event.reason
            theirs = blocks_of(source.buffer, LAYOUT)[:, :, block]
            assert (blocks_of(sink.buffer, LAYOUT)[:, :, block] == theirs).all()
    finally:
        for transport in (sink, near, far):
            transport.close()
        for each in collectives:
            each.close()
    assert not lost
