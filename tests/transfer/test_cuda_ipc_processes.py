"""Device memory between real processes (the device is fake, all else is not), and what is left when they are killed."""

import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from distserve.core.errors import TransferError
from tests.transfer.fake_device import LOST_STATUS, FakeGpuTransport
from tests.transfer.pools import LAYOUT, SECRET, Ended, blocks_of, eventually, fill, migrate


@pytest.fixture
def sink():
    transport = FakeGpuTransport(LAYOUT, secret=SECRET, clock=time.time)
    yield transport
    transport.device.copies.go_on()
    transport.close()


@pytest.fixture
def source(start, sink):
    peer = start(transport="cuda_ipc", seed=3)
    sink.connect("source", peer.address)
    return peer


def expected(blocks):
    pool = bytearray(LAYOUT.num_bytes)
    fill(memoryview(pool), LAYOUT, 3)
    return blocks_of(memoryview(pool), LAYOUT)[:, :, list(blocks)]


def mappings():
    lines = Path("/proc/self/maps").read_text().splitlines()
    return Counter(line.split()[4] for line in lines if "distserve-gpu" in line)


def test_a_pull_follows_what_the_other_process_has_computed(source, sink):
    ended, ours, want = Ended(), blocks_of(sink.buffer, LAYOUT), expected((4, 5, 9))
    source.call("begin_step", 1)
    sink.pull(migrate(1, (4, 5, 9), (0, 1, 2), ready=1, step=1), ended)
    assert eventually(lambda: np.array_equal(ours[:, :, 0], want[:, :, 0]))
    source.call("hold", "computation")
    source.call("layer_done", 1, 1)
    assert ended.none()
    assert not ours[:, :, 1:].any(), "read before it was computed"
    source.call("go_on", "computation")
    assert eventually(lambda: np.array_equal(ours[:2, :, :3], want[:2]))
    assert not ours[2:, :, 1:].any()
    source.call("end_step", 1)
    event = ended.next()
    assert event.ok
    assert event.num_bytes == 3 * LAYOUT.block_size * LAYOUT.token_bytes
    assert np.array_equal(ours[:, :, :3], want)


def test_a_source_killed_while_it_computes_and_while_it_is_copied_from(start, source, sink):
    """Its pulls fail at once, a copy under way ends without harm, nothing more is read, and a new source serves."""
    ended, copying = Ended(), Ended()
    before = mappings()
    sink.hold("copies")
    sink.pull(migrate(1, (1,), (1,)), copying)
    assert eventually(lambda: sink.device.num_launched == 1)
    sink.pull(migrate(2, (2,), (2,), ready=0, step=9), ended)
    source.kill()
    assert "closed its connection" in ended.next().reason
    sink.pull(migrate(3, (3,), (3,)), ended)
    assert "not connected" in ended.next().reason
    assert copying.none()
    assert sink.device.num_launched == 1
    sink.go_on("copies")
    assert "closed its connection" in copying.next().reason
    assert eventually(lambda: sum(mappings().values()) == sum(before.values()) - 1), "a dead peer's memory stays mapped"
    with pytest.raises(TransferError, match="cannot connect to instance source: no KV memory to be reached"):
        sink.connect("source", source.address)
    heir = start(transport="cuda_ipc", seed=3)
    assert heir.address != source.address
    sink.connect("source", heir.address)
    sink.pull(migrate(4, (7,), (8,)), ended)
    assert ended.next().ok
    assert np.array_equal(blocks_of(sink.buffer, LAYOUT)[:, :, 8], expected((7,))[:, :, 0])


def test_a_destination_whose_copies_hang_ends_and_the_source_goes_on(start, sink):
    """Its device cannot be trusted any more, so the process ends, in less than the pulls' deadline of a minute."""
    fill(sink.buffer, LAYOUT, seed=3)
    victim = start(transport="cuda_ipc", patience=0.2)
    victim.call("connect", "source", sink.address)
    victim.call("hold", "copies")
    began = time.monotonic()
    victim.send("pull", 1, [1, 2], [1, 2], 2, 0)
    victim.process.join(30)
    assert victim.process.exitcode == LOST_STATUS
    assert time.monotonic() - began < 30
    heir, ended = FakeGpuTransport(LAYOUT, secret=SECRET, clock=time.time), Ended()
    try:
        heir.connect("source", sink.address)
        heir.pull(migrate(2, (1, 2), (1, 2), ready=1, step=5), ended)
        sink.end_step(5)
        assert ended.next().ok
        assert np.array_equal(blocks_of(heir.buffer, LAYOUT)[:, :, 1:3], expected((1, 2)))
    finally:
        heir.close()


def test_a_different_layout_is_refused_on_both_sides(start, sink):
    stranger = start(transport="cuda_ipc", layout={"num_kv_heads": 4})
    with pytest.raises(TransferError, match="num_kv_heads 4 there, 2 here"):
        sink.connect("source", stranger.address)
    assert "num_kv_heads 2 there, 4 here" in stranger.call("connect", "source", sink.address)["error"]
