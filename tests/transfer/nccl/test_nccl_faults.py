"""Faults of communicators and peers, ordered from the library (``ranks.Faults``).

Each must end the pull by its deadline, give every slot and block back, and leave the pair able to pull again, in a
later generation.
"""

import dataclasses
import socket
import threading
import time

import pytest
import torch

from tests.transfer.nccl.ranks import LATE, arrived, as_good_as_new, pull
from tests.transfer.pools import Ended, eventually, migrate

IN_INIT = [("sink", ["fail_in_init"]), ("sink", ["hang_in_init"]), ("source", ["hang_in_init"])]
LATER = [
    ("source", ["hang_in_send"]),
    ("sink", ["hang_in_send"]),
    ("source", ["hang_on_stream"]),
    ("source", ["fail_in_send"]),
    ("sink", ["break_on_stream"]),
    ("source", ["hang_in_send", "hang_in_abort"]),
]
"""The side, and what its next operation does; a sink's is a receive."""
CASES = [(*fault, True) for fault in (*IN_INIT, *LATER)] + [(*fault, False) for fault in LATER]


@pytest.mark.parametrize(
    ("side", "faults", "is_first"),
    CASES,
    ids=[f"{side}-{'-and-'.join(faults)}-{'first' if new else 'later'}" for side, faults, new in CASES],
)
def test_a_fault_ends_the_pull_in_time_and_the_pair_goes_on(source, sink, side, faults, is_first):
    if not is_first:
        assert pull(sink, 0, (3,)).next().ok
    survives = faults == ["fail_in_init"]
    before = sink.generation
    for fault in faults:
        setattr((source if side == "source" else sink).faults, fault, 1)
    started = time.monotonic()
    ended = pull(sink, 1, (1, 2, 4, 5), seconds=0.8)
    event = ended.next(0.8 + LATE)
    assert event.ok is survives, event.reason
    if not survives:
        assert event.reason
        blocks = sink.pool.clone()
        # Nobody else waits for it: a pull from another source is served meanwhile.
        time.sleep(0.05)
        assert torch.equal(blocks, sink.pool), "written after its end"
    assert time.monotonic() - started < 0.8 + LATE
    source.faults.over.set()
    sink.faults.over.set()
    as_good_as_new(source, sink)
    assert sink.generation > before
    assert ended.none(0.01)
    assert eventually(lambda: len(sink.collectives.live) == len(source.collectives.live) == 1)


@pytest.mark.parametrize("side", ["source", "sink"])
def test_nothing_is_launched_behind_what_could_not_be(side, source, sink):
    """Operations meet in their order: the next would take the bytes of the one that failed for its own."""
    assert pull(sink, 0, (0,)).next().ok
    for pull_id in range(1, 12):
        sink.pool.zero_()
        (source if side == "source" else sink).faults.fail_in_send = 1
        blocks = (pull_id, pull_id + 1, pull_id + 2, pull_id + 3)
        others = tuple(block + 2 for block in blocks[:3])
        both = [pull(sink, pull_id, blocks), Ended()]
        sink.transport.pull(migrate(100 + pull_id, others, (16, 17, 18), deadline=time.time() + 20), both[1])
        first, second = (ended.next() for ended in both)
        assert not (first.ok and second.ok)
        assert not first.ok or arrived(source, sink, blocks, blocks)
        assert not second.ok or arrived(source, sink, others, (16, 17, 18))
        written = sink.blocks[:, :, list(blocks)]
        wanted = source.blocks[:, :, list(blocks)]
        assert ((written == wanted) | (written == 0)).all(), "bytes of another piece"


def test_a_slow_network_is_no_fault(source, sink):
    source.faults.delay = sink.faults.delay = 0.05
    assert pull(sink, 1, tuple(range(8))).next().ok
    assert arrived(source, sink, range(8), range(8))
    assert sink.generation == 1


def test_a_pair_that_hangs_does_not_hold_up_another(start, source, sink):
    other = start(seed=2)
    sink.transport.connect("other", other.transport.address)
    source.faults.hang_on_stream = 10
    hangs = pull(sink, 1, (1, 2), seconds=20)
    quick = Ended()
    sink.transport.pull(dataclasses.replace(migrate(2, (3,), (3,)), source_id="other"), quick)
    assert quick.next(timeout=0.45 + LATE / 4).ok
    assert "did not end within 0.5 s" in hangs.next().reason
    source.faults.hang_on_stream = 0
    as_good_as_new(source, sink)


def test_every_pull_ends_once_whatever_happens_around_it(source, sink):
    """Pulls, cancels, faults, steps and reconnections at once: one event per pull, the good ones right."""
    events, under_way = {}, threading.Semaphore(8)
    num_pulls = 120

    def done(event):
        events.setdefault(event.pull_id, []).append(event)
        under_way.release()

    def disturb():
        while len(events) < num_pulls:
            sink.transport.cancel(len(events))
            source.transport.begin_step(1 + len(events))
            if len(events) % 40 == 20:
                source.faults.fail_in_send = 1
            time.sleep(0.004)

    thread = threading.Thread(target=disturb)
    thread.start()
    for pull_id in range(num_pulls):
        under_way.acquire()
        blocks = (pull_id % 20,)
        deadline = time.time() + 2
        sink.transport.pull(migrate(pull_id, blocks, blocks, ready=pull_id % 2, step=pull_id, deadline=deadline), done)
        if pull_id % 50 == 49:
            sink.transport.connect("source", source.transport.address)
    assert eventually(lambda: len(events) == num_pulls)
    thread.join()
    assert all(len(ended) == 1 for ended in events.values())
    good = {pull_id % 20 for pull_id, (event,) in events.items() if event.ok}
    assert good
    assert arrived(source, sink, good, good)
    source.faults.fail_in_send = 0
    as_good_as_new(source, sink)


def test_strangers_and_nonsense_are_hung_up_on(source, sink):
    host, _, port = source.transport.address.removeprefix("nccl+tcp://").partition("/")[0].partition(":")
    with socket.create_connection((host, int(port)), timeout=20) as stranger:
        stranger.sendall(b"\x05\0\0\0hello")
        while stranger.recv(4096):
            pass
    ((_, control),) = sink.transport._driver._wires._open.values()
    control.connection.sendall(b"\xff" * 64)
    assert eventually(lambda: not source.hub.links)
    sink.transport.connect("source", source.transport.address)
    as_good_as_new(source, sink)
