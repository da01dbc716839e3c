"""Pulls between memories of a device, a fake one that is slow, hangs, refuses or fails. Both ends are in this process.

What every transport promises is in ``test_transport.py``, for this one too.
"""

import dataclasses
import gc
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from distserve.core.errors import TransferError
from distserve.transfer.cuda_ipc import mover
from distserve.transfer.cuda_ipc.transport import CudaIpcTransport
from distserve.transfer.plan import Part, plane_pieces
from distserve.transfer.shm import ShmTransport
from tests.transfer.fake_device import FakeDevice
from tests.transfer.pools import LAYOUT, SECRET, Ended, blocks_of, eventually, fill, migrate


class Clock:
    now = 100.0

    def __call__(self):
        return self.now


class End:
    """One rank with a device of its own."""

    def __init__(self, layout=LAYOUT, card="fake-0", patience=20.0, reachable=()):
        self.device = FakeDevice(card, reachable)
        self.clock = Clock()
        self.lost = []
        self.transport = CudaIpcTransport(
            layout,
            device=self.device,
            secret=SECRET,
            clock=self.clock,
            on_lost=self.lost.append,
            patience=patience,
        )
        self.layout = layout

    @property
    def blocks(self):
        return blocks_of(self.transport.buffer, self.layout)


@pytest.fixture
def end():
    made = []

    def factory(**options):
        made.append(End(**options))
        return made[-1]

    yield factory
    for each in made:
        each.device.copies.go_on()
        each.device.computation.go_on()
        each.transport.close()


@pytest.fixture
def source(end):
    made = end()
    fill(made.transport.buffer, LAYOUT, seed=1)
    return made


@pytest.fixture
def sink(end, source):
    made = end()
    made.transport.connect("source", source.transport.address)
    return made


def mappings():
    """Device memory that is mapped here: how often, by inode."""
    lines = Path("/proc/self/maps").read_text().splitlines()
    return Counter(line.split()[4] for line in lines if "distserve-gpu" in line)


def test_a_layer_is_ready_when_the_device_has_computed_it_not_when_it_was_launched(source, sink):
    ended = Ended()
    source.device.computation.hold()
    sink.transport.pull(migrate(1, (1, 2), (3, 4), ready=0, step=5), ended)
    source.transport.begin_step(5)
    for layer in range(LAYOUT.num_layers):
        source.transport.layer_done(5, layer)
    source.transport.end_step(5)
    assert ended.none()
    assert not sink.blocks.any()
    source.device.computation.go_on()
    assert ended.next().ok
    assert np.array_equal(sink.blocks[:, :, (3, 4)], source.blocks[:, :, (1, 2)])


def test_steps_are_announced_in_order_while_the_device_works_them_off(source, sink):
    """A step that begins is not announced before the one before it has been computed."""
    ended = Ended()
    source.device.computation.hold()
    source.transport.begin_step(4)
    source.transport.end_step(4)
    source.transport.begin_step(5)
    sink.transport.pull(migrate(1, (1,), (1,), ready=0, step=4), ended)
    assert ended.none()
    source.device.computation.go_on()
    assert ended.next().ok


@pytest.mark.parametrize("how", ["deadline", "cancel", "forget", "source closes"])
def test_a_pull_that_fails_while_copying_ends_when_the_copy_has(source, sink, how):
    ended = Ended()
    sink.device.copies.hold()
    sink.transport.pull(migrate(1, (1, 2), (3, 4), deadline=200.0), ended)
    assert eventually(lambda: sink.device.num_launched == 1)
    match how:
        case "deadline":
            sink.clock.now = 200.5
        case "cancel":
            sink.transport.cancel(1)
        case "forget":
            sink.transport.forget("source")
        case "source closes":
            source.transport.close()
    assert ended.none(), "its blocks may still be written"
    sink.device.copies.go_on()
    event = ended.next()
    assert not event.ok
    assert event.num_bytes == 0
    sink.blocks[:] = 0
    assert ended.none()
    assert not sink.blocks.any(), "written after its end"
    assert not sink.lost


def test_a_slow_device_is_waited_for(source, sink):
    ended = Ended()
    sink.device.copies.delay = 0.05
    for pull_id in range(3):
        sink.transport.pull(migrate(pull_id, (pull_id,), (pull_id,)), ended)
    assert [ended.next().ok for _ in range(3)] == [True] * 3
    assert np.array_equal(sink.blocks[:, :, :3], source.blocks[:, :, :3])


def test_a_copy_that_hangs_condemns_the_device_and_its_blocks_stay_taken(end, source):
    sink, ended = end(patience=0.2), Ended()
    sink.transport.connect("source", source.transport.address)
    sink.device.copies.hold()
    sink.transport.pull(migrate(1, (1,), (1,), deadline=200.0), ended)
    sink.transport.pull(migrate(2, (2,), (2,), deadline=200.0), ended)
    assert eventually(lambda: sink.device.num_launched == 2)
    sink.clock.now = 200.5
    assert eventually(lambda: sink.lost)
    assert "did not end within 0.2 s" in str(sink.lost[0])
    assert ended.none()
    sink.device.copies.go_on()
    assert not ended.next().ok
    assert not ended.next().ok
    assert len(sink.lost) == 1


def test_a_device_that_fails_fails_its_pulls_and_says_so(source, sink):
    ended = Ended()
    sink.device.copies.hold()
    sink.transport.pull(migrate(1, (1,), (1,)), ended)
    assert eventually(lambda: sink.device.num_launched == 1)
    sink.device.copies.broken = True
    assert "the GPU has failed" in ended.next().reason
    assert [str(error) for error in sink.lost] == ["the GPU has failed: illegal address"]


def test_a_source_whose_device_fails_has_nothing_to_offer(source, sink):
    ended = Ended()
    sink.transport.pull(migrate(1, (1,), (1,), ready=0, step=5), ended)
    source.transport.begin_step(5)
    source.device.computation.hold()
    source.transport.end_step(5)
    source.device.computation.broken = True
    assert "closed" in ended.next().reason
    assert not sink.blocks.any()


def test_a_copy_that_cannot_be_launched_fails_its_pull_only(source, sink):
    ended = Ended()
    sink.device.num_to_refuse = 1
    sink.transport.pull(migrate(1, (1,), (1,)), ended)
    assert "not launched" in ended.next().reason
    sink.transport.pull(migrate(2, (2,), (2,)), ended)
    assert ended.next().ok
    assert not sink.lost


def test_memory_of_a_peer_stays_mapped_until_the_copy_out_of_it_has_ended(end, source):
    sink, ended = end(), Ended()
    gc.collect()
    before = mappings()
    sink.transport.connect("source", source.transport.address)
    (peers,) = mappings() - before
    sink.device.copies.hold()
    sink.transport.pull(migrate(1, (1,), (1,)), ended)
    assert eventually(lambda: sink.device.num_launched == 1)
    sink.transport.forget("source")
    source.transport.close()
    time.sleep(0.05)
    assert mappings()[peers] == before[peers] + 1
    sink.device.copies.go_on()
    assert not ended.next().ok
    assert eventually(lambda: mappings()[peers] == before[peers])


def test_closing_waits_for_copies(source, sink):
    ended = Ended()
    sink.device.copies.delay = 0.1
    sink.transport.pull(migrate(1, (1,), (1,)), ended)
    assert eventually(lambda: sink.device.num_launched == 1)
    sink.transport.close()
    assert sink.device.copies.num_done == 1
    assert ended.next().reason in {"transport closed", ""}


def test_a_card_that_cannot_be_reached_is_refused_and_both_are_named(end, source):
    far = end(card="fake-1")
    with pytest.raises(TransferError, match="is on GPU fake-0, to which GPU fake-1 has no access: use the transport"):
        far.transport.connect("source", source.transport.address)
    near, ended = end(card="fake-1", reachable=("fake-0",)), Ended()
    near.transport.connect("source", source.transport.address)
    near.transport.pull(migrate(1, (1,), (1,)), ended)
    assert ended.next().ok


def test_addresses_of_other_transports_are_refused(sink):
    shm = ShmTransport(LAYOUT, secret=SECRET, clock=time.time)
    try:
        with pytest.raises(TransferError, match="not an address of KV in GPU memory"):
            sink.transport.connect("other", shm.address)
        with pytest.raises(TransferError, match="not an address of shared KV memory"):
            shm.connect("other", sink.transport.address)
    finally:
        shm.close()


@pytest.mark.parametrize("batch_bytes", [1, 3000, 20_000])
def test_two_copies_of_a_pull_are_under_way_at_most(monkeypatch, end, source, batch_bytes):
    monkeypatch.setattr(mover, "_BATCH_BYTES", batch_bytes)
    sink, ended = end(), Ended()
    sink.transport.connect("source", source.transport.address)
    sink.device.copies.hold()
    sink.transport.pull(migrate(1, range(20), range(20)), ended)
    assert eventually(lambda: sink.device.num_launched == 2)
    time.sleep(0.02)
    assert sink.device.num_launched == 2
    sink.device.copies.go_on()
    assert ended.next().ok
    assert sink.device.num_launched > 2
    assert np.array_equal(sink.blocks[:, :, :20], source.blocks[:, :, :20])


@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_layers_heads_and_blocks_arrive(monkeypatch, data):
    """Against a scatter, byte by byte of what the plan says, in batches of any size."""
    src_heads, dst_heads = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 4))
    num_heads = data.draw(st.integers(1, min(src_heads, dst_heads)))
    num_layers = data.draw(st.integers(1, 3))
    src_layout = dataclasses.replace(LAYOUT, num_kv_heads=src_heads, num_blocks=9, block_size=4)
    dst_layout = dataclasses.replace(LAYOUT, num_kv_heads=dst_heads, num_layers=3, num_blocks=7, block_size=4)

    def span(num, total):
        first = data.draw(st.integers(0, total - num))
        return range(first, first + num)

    part = Part(
        4,
        src_heads,
        src_layers=span(num_layers, 4),
        src_heads=span(num_heads, src_heads),
        dst_layers=span(num_layers, 3),
        dst_heads=span(num_heads, dst_heads),
    )
    blocks = data.draw(st.integers(0, 7))
    src_blocks = data.draw(st.lists(st.integers(0, 8), min_size=blocks, max_size=blocks))
    dst_blocks = data.draw(st.permutations(range(7)))[:blocks]
    monkeypatch.setattr(mover, "_BATCH_BYTES", data.draw(st.sampled_from([1, 100, 1000, 10**6])))
    source, sink, ended = End(layout=src_layout), End(layout=dst_layout), Ended()
    try:
        fill(source.transport.buffer, src_layout, seed=3)
        sink.transport.connect("source", source.transport.address, part)
        sink.transport.pull(migrate(1, src_blocks, dst_blocks, ready=data.draw(st.integers(0, blocks)), step=0), ended)
        source.transport.end_step(0)
        assert ended.next().ok
        expected = np.zeros_like(sink.blocks).reshape(3, 2, -1)
        theirs = source.blocks.reshape(4, 2, -1)
        for src_layer, dst_layer in zip(part.src_layers, part.dst_layers, strict=True):
            for start, target, length in plane_pieces(src_blocks, dst_blocks, src_layout, dst_layout, part).tolist():
                expected[dst_layer, :, target : target + length] = theirs[src_layer, :, start : start + length]
        assert np.array_equal(sink.blocks.reshape(3, 2, -1), expected)
    finally:
        for each in (source, sink):
            each.transport.close()
