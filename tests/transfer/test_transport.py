"""What every transport promises, on each: pools of one process, shared and (faked) GPU memory, TCP, what chooses, NCCL.

Both ends are in this process.
"""

import dataclasses
import re
import threading
import time

import numpy as np
import pytest
import torch

from distserve.core.errors import TransferError
from distserve.transfer.choose import HostTransport
from distserve.transfer.cuda_ipc.transport import CudaIpcTransport
from distserve.transfer.local import LocalNetwork, LocalTransport
from distserve.transfer.nccl.room import Limits
from distserve.transfer.nccl.sockets import SocketCollectives
from distserve.transfer.nccl.transport import NcclTransport
from distserve.transfer.shm import ShmTransport
from distserve.transfer.tcp import TcpTransport
from tests.transfer.fake_device import FakeDevice
from tests.transfer.pools import LAYOUT, SECRET, Ended, blocks_of, eventually, fill, migrate


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture(params=["local", "shm", "cuda_ipc", "tcp", "near", "far", "nccl"])
def make(request, clock):
    """A factory of transports that can reach each other."""
    network, collectives = LocalNetwork(), SocketCollectives()
    made, lost = [], []

    def factory(layout=LAYOUT):
        if request.param == "local":
            transport = LocalTransport(layout, network=network, clock=clock)
        elif request.param == "shm":
            transport = ShmTransport(layout, secret=SECRET, clock=clock)
        elif request.param == "cuda_ipc":
            transport = CudaIpcTransport(layout, device=FakeDevice(), secret=SECRET, clock=clock, on_lost=lost.append)
        elif request.param == "tcp":
            transport = TcpTransport(layout, host="127.0.0.1", secret=SECRET, clock=clock)
        elif request.param == "nccl":
            pool, limits = torch.zeros(layout.num_bytes, dtype=torch.uint8), Limits(min_piece_bytes=1)
            options = {"clock": clock, "limits": limits, "collectives": collectives}
            transport = NcclTransport(layout, pool, host="127.0.0.1", secret=SECRET, **options)
        else:
            machine = "here" if request.param == "near" else f"host-{len(made)}"
            transport = HostTransport(layout, secret=SECRET, clock=clock, host="127.0.0.1", machine=machine)
        made.append(transport)
        return transport

    yield factory
    for transport in made:
        transport.close()
    collectives.close()
    assert not lost


@pytest.fixture
def source(make):
    transport = make()
    fill(transport.buffer, LAYOUT, seed=1)
    return transport


@pytest.fixture
def sink(make, source):
    transport = make(dataclasses.replace(LAYOUT, num_blocks=20))
    transport.connect("source", source.address)
    return transport


def arrived(source, sink, src_blocks, dst_blocks, layers=slice(None)) -> bool:
    theirs, ours = blocks_of(source.buffer, source.layout), blocks_of(sink.buffer, sink.layout)
    return np.array_equal(ours[layers][:, :, list(dst_blocks)], theirs[layers][:, :, list(src_blocks)])


def untouched(sink, blocks, layers=slice(None)) -> bool:
    return not blocks_of(sink.buffer, sink.layout)[layers][:, :, list(blocks)].any()


def test_ready_blocks_arrive_and_nothing_else_is_written(source, sink):
    ended = Ended()
    src_blocks, dst_blocks = (3, 4, 5, 31, 0, 9), (0, 1, 2, 3, 19, 7)
    sink.pull(migrate(1, src_blocks, dst_blocks), ended)
    event = ended.next()
    assert (event.pull_id, event.ok, event.reason) == (1, True, "")
    assert event.num_bytes == 6 * LAYOUT.token_bytes * LAYOUT.block_size
    assert arrived(source, sink, src_blocks, dst_blocks)
    assert untouched(sink, set(range(20)) - set(dst_blocks))
    assert ended.none()


def test_an_empty_pull_ends_well(sink):
    ended = Ended()
    sink.pull(migrate(1, (), ()), ended)
    assert ended.next().ok


def test_layers_follow_the_step(source, sink):
    ended = Ended()
    source.begin_step(6)
    sink.pull(migrate(1, (1, 2, 8, 9), (5, 6, 7, 8), ready=2, step=7), ended)
    assert eventually(lambda: arrived(source, sink, (1, 2), (5, 6)))
    source.end_step(6)
    assert ended.none()
    assert untouched(sink, (7, 8))
    source.begin_step(7)
    for layer in range(LAYOUT.num_layers - 1):
        source.layer_done(7, layer)
        assert eventually(lambda layer=layer: arrived(source, sink, (8, 9), (7, 8), slice(layer + 1)))
        assert untouched(sink, (7, 8), slice(layer + 1, None))
    assert ended.none()
    source.end_step(7)
    assert ended.next().ok
    assert arrived(source, sink, (1, 2, 8, 9), (5, 6, 7, 8))


def test_a_later_step_means_the_earlier_is_complete(source, sink):
    ended = Ended()
    source.begin_step(8)
    sink.pull(migrate(1, (1, 2), (1, 2), ready=0, step=7), ended)
    assert ended.next().ok
    assert arrived(source, sink, (1, 2), (1, 2))


def test_a_waiting_pull_does_not_hold_up_others(source, sink):
    waiting, quick = Ended(), Ended()
    sink.pull(migrate(1, (1,), (1,), ready=0, step=5), waiting)
    sink.pull(migrate(2, (2,), (2,)), quick)
    assert quick.next().ok
    assert waiting.none()
    source.end_step(5)
    assert waiting.next().ok


def test_cancel_ends_a_pull_once(source, sink):
    ended = Ended()
    sink.pull(migrate(1, (1,), (1,), ready=0, step=5), ended)
    sink.cancel(1)
    event = ended.next()
    assert (event.ok, event.reason, event.num_bytes) == (False, "cancelled", 0)
    source.end_step(5)
    sink.cancel(1)
    sink.cancel(99)
    assert ended.none()
    assert untouched(sink, (1,))


def test_the_deadline_ends_a_pull(sink, clock):
    ended = Ended()
    sink.pull(migrate(1, (1,), (1,), ready=0, step=5, deadline=200.0), ended)
    assert ended.none()
    clock.now = 200.5
    event = ended.next()
    assert not event.ok
    assert "deadline" in event.reason


def test_bytes_read_past_the_deadline_do_not_count(sink, clock):
    ended = Ended()
    clock.now = 200.5
    sink.pull(migrate(1, (1,), (1,), deadline=200.0), ended)
    assert not ended.next().ok


def test_forgetting_a_peer_fails_its_pulls_only(make, source, sink):
    other = make()
    sink.connect("other", other.address)
    gone, stays, late = Ended(), Ended(), Ended()
    sink.pull(migrate(1, (1,), (1,), ready=0, step=5), gone)
    sink.pull(dataclasses.replace(migrate(2, (1,), (2,), ready=0, step=5), source_id="other"), stays)
    sink.forget("source")
    sink.forget("source")
    event = gone.next()
    assert not event.ok
    assert "source is gone" in event.reason
    sink.pull(migrate(3, (1,), (3,)), late)
    assert "not connected" in late.next().reason
    assert stays.none()
    other.end_step(5)
    assert stays.next().ok


def test_a_replaced_peer_is_not_mistaken_for_its_successor(make, source, sink):
    ended, later = Ended(), Ended()
    sink.pull(migrate(1, (1,), (1,), ready=0, step=5), ended)
    successor = make()
    fill(successor.buffer, LAYOUT, seed=2)
    sink.connect("source", successor.address)
    assert "replaced" in ended.next().reason
    source.close()
    sink.pull(migrate(2, (1,), (1,)), later)
    assert later.next().ok
    assert arrived(successor, sink, (1,), (1,))


def test_a_source_that_closes_fails_pulls_from_it(source, sink):
    ended = Ended()
    sink.pull(migrate(1, (1,), (1,), ready=0, step=5), ended)
    source.close()
    source.close()
    event = ended.next()
    assert not event.ok
    assert "closed" in event.reason


def test_close_fails_what_is_under_way(sink):
    ended = Ended()
    sink.pull(migrate(1, (1,), (1,), ready=0, step=5), ended)
    sink.close()
    assert ended.next().reason == "transport closed"


def test_blocks_out_of_range_fail_the_pull_and_read_nothing(sink):
    ended = Ended()
    sink.pull(migrate(1, (1, 32), (1, 2)), ended)
    assert "source blocks" in ended.next().reason
    assert untouched(sink, (1, 2))


def test_layouts_that_differ_are_refused_and_both_named(make, source):
    sink = make(dataclasses.replace(LAYOUT, num_layers=6, dtype="float32"))
    with pytest.raises(TransferError, match="num_layers 4 there, 6 here, dtype bfloat16 there, float32 here"):
        sink.connect("source", source.address)
    ended = Ended()
    sink.pull(migrate(1, (1,), (1,)), ended)
    assert "not connected" in ended.next().reason


def test_connecting_to_nothing_says_so(make, source):
    address = source.address
    source.close()
    with pytest.raises(TransferError, match=r"no KV memory to be reached at|nothing to connect to at") as caught:
        make().connect("source", address)
    assert any(name in str(caught.value) for name in re.split(r"[ /]", address))


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_pulls_end_even_if_the_transfer_thread_fails(sink):
    ended = Ended()

    def raises(event):
        raise RuntimeError("a bug")

    sink.pull(migrate(1, (1,), (1,), ready=0, step=5), ended)
    sink.pull(migrate(2, (2,), (2,)), raises)
    assert ended.next().reason == "the transfer thread failed"


def test_every_pull_ends_once_whatever_happens_around_it(make, source, sink):
    """Pulls, cancels, steps and reconnections from several threads: one event per pull, the good ones right."""
    events, under_way = {}, threading.Semaphore(10)
    num_pulls = 300

    def done(event):
        events.setdefault(event.pull_id, []).append(event)
        under_way.release()

    def cancel_some():
        while len(events) < num_pulls:
            # Not every one: on some transports a pull takes longer than that, and all would be cancelled.
            if len(events) % 3 == 0:
                sink.cancel(len(events))
            time.sleep(0.003)

    def step():
        for step_id in range(1, 100):
            source.begin_step(step_id)
            source.layer_done(step_id, 0)
            source.end_step(step_id)
            time.sleep(0.0005)

    threads = [threading.Thread(target=cancel_some), threading.Thread(target=step)]
    for thread in threads:
        thread.start()
    for pull_id in range(num_pulls):
        under_way.acquire()
        block = pull_id % 20
        sink.pull(migrate(pull_id, (block,), (block,), ready=pull_id % 2, step=pull_id % 90), done)
        if pull_id % 50 == 49:
            sink.connect("source", source.address)
    assert eventually(lambda: len(events) == num_pulls)
    for thread in threads:
        thread.join()
    assert all(len(ended) == 1 for ended in events.values())
    good = {pull_id % 20 for pull_id, (event,) in events.items() if event.ok}
    assert good
    assert arrived(source, sink, good, good)
