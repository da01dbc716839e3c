"""What instances on GPUs move their KV with: mapped memory, NCCL, or TCP where NCCL is missing. Cards are fake."""

import logging

import pytest
import torch

from distserve.cluster.clock import cluster_time
from distserve.cluster.gpu import Hardware, gpu_transport
from distserve.core.commands import Migrate
from distserve.core.config import KvConfig, ParallelConfig
from distserve.core.errors import ConfigError, TransferError
from distserve.engine.sharding.shard import Shard
from distserve.transfer.choose import TransportKind
from distserve.transfer.nccl.sockets import SocketCollectives
from distserve.transfer.sharded import instance_address
from tests.transfer.fake_device import FakeDevice
from tests.transfer.pools import Ended

SHARD = Shard(ParallelConfig(), 0, 2, 4, 2, 8)
LAYOUT = SHARD.layout(KvConfig(num_blocks=4), "float32")
AUTO, TCP, NCCL = TransportKind.AUTO, TransportKind.TCP, TransportKind.NCCL


class Nccl(SocketCollectives):
    """In NCCL's place."""

    version = "2.28.3"


def with_nccl(name):
    return Hardware(FakeDevice(name), open_nccl=lambda _: Nccl())


def without_nccl(name):
    def open_nccl(_):
        raise ConfigError("CuPy is not installed: pip install -e '.[cuda]'")

    return Hardware(FakeDevice(name), open_nccl=open_nccl)


def make(hardware, kind, host="127.0.0.1"):
    return gpu_transport(LAYOUT, SHARD, b"secret", hardware, kind, host)


def pulls(source, sink) -> bool:
    """Whether a block gets from one pool to the other."""
    (transport, theirs), (puller, ours) = source, sink
    puller.connect("prefill-0", instance_address(ParallelConfig(), [transport.address]))
    ended = Ended()
    theirs.fill_(7)
    puller.pull(Migrate(1, ("r", 0), "prefill-0", (3,), (1,), 1, 0, cluster_time() + 20), ended)
    event = ended.next()
    assert event.ok, event.reason
    num_bytes = torch.count_nonzero(ours).item()
    return num_bytes == event.num_bytes == LAYOUT.num_bytes // LAYOUT.num_blocks


@pytest.mark.parametrize(
    ("hardware", "kind"), [(with_nccl, NCCL), (with_nccl, AUTO), (without_nccl, AUTO), (without_nccl, TCP)]
)
def test_cards_that_do_not_reach_each_other_use_the_network(hardware, kind, caplog):
    with caplog.at_level(logging.WARNING):
        source, sink = (make(hardware(name), kind) for name in ("fake-0", "fake-1"))
    assert ("cuda-ipc:" in source[0].address) == (kind is AUTO)
    said = [record.message for record in caplog.records]
    assert len(said) == (2 if hardware is without_nccl and kind is AUTO else 0)
    assert all("over TCP" in text and ".[cuda]" in text for text in said)
    try:
        assert pulls(source, sink)
    finally:
        for transport, _ in (source, sink):
            transport.close()


def test_one_card_maps_its_memory_and_needs_no_network():
    source, sink = (make(with_nccl("fake-0"), AUTO, host=None) for _ in range(2))
    assert "nccl" not in source[0].address
    try:
        assert pulls(source, sink)
    finally:
        for transport, _ in (source, sink):
            transport.close()


def test_nccl_that_was_asked_for_and_is_missing_is_an_error_that_names_the_extra(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "cupy", None)
    monkeypatch.setitem(__import__("sys").modules, "cupy.cuda", None)
    with pytest.raises(ConfigError, match=r"CuPy, which is not installed: .*\.\[cuda\]"):
        make(Hardware(FakeDevice()), NCCL)


def test_a_peer_without_nccl_is_refused_with_both_values():
    source, sink = make(without_nccl("fake-0"), AUTO), make(with_nccl("fake-1"), AUTO)
    try:
        with pytest.raises(TransferError, match=r"NCCL none but TCP there, 2\.28\.3 here"):
            pulls(source, sink)
    finally:
        for transport, _ in (source, sink):
            transport.close()
