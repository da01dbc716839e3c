"""KV through the NCCL transport, with sockets in NCCL's place: its communicators, and the device's steps.

Pools are torch's memory. What every transport promises is in ``tests/transfer/test_transport.py``; faults are in
``test_nccl_faults.py``.
"""

import dataclasses

from distserve.transfer.nccl.device import CpuDevice
from distserve.transfer.nccl.room import Limits
from distserve.transfer.nccl.transport import staging_bytes
from tests.transfer.nccl.ranks import LATE, LIMITS, arrived, as_good_as_new, pull, untouched
from tests.transfer.pools import LAYOUT, Ended, eventually, migrate


def test_no_communicator_is_made_before_the_first_pull_and_one_serves_many(source, sink):
    assert source.transport.num_communicators == sink.transport.num_communicators == 0
    for pull_id in range(4):
        assert pull(sink, pull_id, (pull_id, pull_id + 1)).next().ok
    assert source.collectives.num_made == sink.collectives.num_made == 1


def test_blocks_are_ready_when_the_device_has_passed_the_step_not_when_the_host_has(source, sink):
    source.device.is_late = True
    source.transport.begin_step(7)
    ended = pull(sink, 1, (1, 2, 8, 9), ready=2, step=7)
    for layer in range(LAYOUT.num_layers):
        source.transport.layer_done(7, layer)
    source.transport.end_step(7)
    assert eventually(lambda: arrived(source, sink, (1, 2), (1, 2)))
    assert ended.none()
    assert untouched(sink, (8, 9))
    for layer in range(LAYOUT.num_layers):
        source.device.gates[layer].is_open = True
        assert eventually(lambda layer=layer: arrived(source, sink, (8, 9), (8, 9), slice(layer // 2 * 2 + layer % 2)))
        assert untouched(sink, (10, 11))
    assert ended.next().ok
    assert arrived(source, sink, (8, 9), (8, 9))


def test_a_later_step_on_the_device_means_the_earlier_is_complete(source, sink):
    source.device.is_late = True
    source.transport.begin_step(7)
    source.transport.layer_done(7, 0)
    source.transport.begin_step(8)
    ended = pull(sink, 1, (1, 2), ready=0, step=7)
    assert ended.none()
    source.device.gates[0].is_open = True
    assert ended.next().ok


def test_a_waiting_pull_does_not_hold_up_others_and_launches_nothing(source, sink):
    waiting = pull(sink, 1, (1,), ready=0, step=5)
    assert pull(sink, 2, (2,)).next().ok
    assert waiting.none()
    assert eventually(lambda: source.hub.outgoing.num_free == LIMITS.num_slots)
    source.transport.end_step(5)
    assert waiting.next().ok


def test_cancel_ends_a_pull_once(source, sink):
    ended = pull(sink, 1, (1,), ready=0, step=5)
    sink.transport.cancel(1)
    event = ended.next()
    assert (event.ok, event.reason, event.num_bytes) == (False, "cancelled", 0)
    source.transport.end_step(5)
    sink.transport.cancel(1)
    sink.transport.cancel(99)
    assert ended.none()
    assert untouched(sink, (1,))
    as_good_as_new(source, sink)


def test_the_deadline_ends_a_pull(source, sink):
    ended = pull(sink, 1, (1,), seconds=0.2, ready=0, step=5)
    assert "deadline passed" in ended.next(LATE).reason
    source.transport.end_step(5)
    as_good_as_new(source, sink)
    assert untouched(sink, (1,))


def test_close_fails_what_is_under_way(sink):
    ended = pull(sink, 1, (1,), ready=0, step=5)
    sink.transport.close()
    assert ended.next().reason == "transport closed"
    assert eventually(lambda: not sink.collectives.live)


def test_the_number_of_live_communicators_is_capped(start):
    sources = [start(seed=seed) for seed in range(4)]
    limits = dataclasses.replace(LIMITS, max_communicators=2, transfer_timeout=5.0, open_timeout=5.0)
    sink = start(limits=limits)
    for number, source in enumerate(sources):
        sink.transport.connect(f"s{number}", source.transport.address)
    ended = Ended()
    for pull_id in range(24):
        blocks = (pull_id,)
        sink.transport.pull(dataclasses.replace(migrate(pull_id, blocks, blocks), source_id=f"s{pull_id % 4}"), ended)
        assert sink.transport.num_communicators <= 2
    assert all(ended.next().ok for _ in range(24))
    assert sink.collectives.most_live <= 2
    assert sink.collectives.num_made >= 4
    assert all(arrived(sources[block % 4], sink, (block,), (block,)) for block in range(24))


def test_what_it_costs_beside_the_pool_is_known_beforehand():
    layout = dataclasses.replace(LAYOUT, num_layers=32, num_kv_heads=8, head_dim=128)
    assert staging_bytes(layout) == 2 * 4 * 3 * (16 << 20)
    assert staging_bytes(layout, Limits(min_piece_bytes=1, num_slots=1)) == 2 * 2 * layout.block_bytes
    assert CpuDevice().record().query()
