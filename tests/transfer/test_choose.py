import time

import pytest

from distserve.core.errors import ConfigError, TransferError
from distserve.transfer.choose import HostTransport, TransportKind, Whereabouts, choose, this_machine
from tests.transfer.pools import LAYOUT, SECRET, Ended, blocks_of, fill, migrate

AUTO, SHM, TCP = TransportKind.AUTO, TransportKind.SHM, TransportKind.TCP
HERE = Whereabouts("a", "distserve-kv-1", "tcp://h:1/x")
NEAR = Whereabouts("a", "distserve-kv-2", "tcp://h:2/x")
NEAR_TCP_ONLY = Whereabouts("a", "", "tcp://h:2/x")
FAR = Whereabouts("b", "distserve-kv-3", "tcp://i:1/x")
FAR_CLOSED = Whereabouts("b", "distserve-kv-3")


@pytest.mark.parametrize(
    ("kind", "theirs", "chosen"),
    [
        (AUTO, NEAR, SHM),
        (AUTO, NEAR_TCP_ONLY, TCP),
        (AUTO, FAR, TCP),
        (SHM, NEAR, SHM),
        (TCP, NEAR, TCP),
        (TCP, FAR, TCP),
    ],
)
def test_ranks_of_one_host_share_memory_and_others_use_tcp_unless_overruled(kind, theirs, chosen):
    assert choose(kind, HERE, theirs) is chosen


@pytest.mark.parametrize(
    ("kind", "ours", "theirs", "says"),
    [
        (SHM, HERE, FAR, "use the transport auto or tcp"),
        (SHM, HERE, NEAR_TCP_ONLY, "use the transport auto or tcp"),
        (AUTO, HERE, FAR_CLOSED, "the peer is not on TCP"),
        (AUTO, Whereabouts("a", "distserve-kv-1"), FAR, "this rank is not on TCP"),
    ],
)
def test_a_pair_without_a_way_is_told_what_to_do(kind, ours, theirs, says):
    with pytest.raises(TransferError, match=says):
        choose(kind, ours, theirs)


def test_this_machine_is_the_same_for_all_of_its_processes():
    assert this_machine() == this_machine()
    assert " " not in this_machine()


def test_tcp_without_an_interface_is_refused():
    with pytest.raises(ConfigError, match="needs a host"):
        HostTransport(LAYOUT, secret=SECRET, clock=time.time, kind=TCP)


def test_without_an_interface_no_port_is_opened():
    transport = HostTransport(LAYOUT, secret=SECRET, clock=time.time)
    assert Whereabouts.decode(transport.address).far == ""
    transport.close()


def test_one_pool_has_peers_near_and_far():
    def make(machine):
        return HostTransport(LAYOUT, secret=SECRET, clock=time.time, host="127.0.0.1", machine=machine)

    sink, near, far = make("a"), make("a"), make("b")
    try:
        for seed, source in ((1, near), (2, far)):
            fill(source.buffer, LAYOUT, seed)
        ended = Ended()
        for source, block in ((near, 3), (far, 4)):
            sink.connect("source", source.address)
            sink.pull(migrate(block, (block,), (block,)), ended)
            assert ended.next().ok
        ours = blocks_of(sink.buffer, LAYOUT)
        for source, block in ((near, 3), (far, 4)):
            assert (ours[:, :, block] == blocks_of(source.buffer, LAYOUT)[:, :, block]).all()
    finally:
        for transport in (sink, near, far):
            transport.close()


@pytest.mark.parametrize("text", ["", "tcp://h:1/x", "a b c d"])
def test_what_is_no_address_is_refused(text):
    with pytest.raises(TransferError, match="not the address of a rank"):
        Whereabouts.decode(text)
