"""KV over TCP between processes that work, stop and die, and what is left of a transport when it is closed."""

import contextlib
import signal
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from tests.transfer.pools import LAYOUT, Ended, blocks_of, fill, migrate
from tests.transfer.tcp.ends import ALL, BIG, in_time, make


def whole(seed: int) -> np.ndarray:
    pool = bytearray(BIG.num_bytes)
    fill(memoryview(pool), BIG, seed)
    return blocks_of(memoryview(pool), BIG)


def big_peer(start, **options):
    return start(transport="tcp", layout={"num_blocks": BIG.num_blocks, "head_dim": BIG.head_dim}, **options)


@pytest.mark.parametrize("blocks", [ALL, ALL[::-1], tuple(np.random.default_rng(0).permutation(512).tolist())])
def test_many_frames_arrive_from_another_process(start, big_sink, blocks):
    source, ended = big_peer(start, seed=4), Ended()
    big_sink.connect("source", source.address)
    big_sink.pull(migrate(1, blocks, ALL), ended)
    assert ended.next().ok
    assert np.array_equal(blocks_of(big_sink.buffer, BIG), whole(4)[:, :, list(blocks)])


def test_a_pull_overlaps_the_step_of_another_process(start, sink):
    source, ended = start(transport="tcp", seed=3), Ended()
    sink.connect("source", source.address)
    source.call("begin_step", 1)
    sink.pull(migrate(1, (4, 5), (0, 1), ready=1, step=1), ended)
    assert ended.none()
    source.call("layer_done", 1, 2)
    assert ended.none()
    assert blocks_of(sink.buffer, LAYOUT)[:3, :, 1].any()
    assert not blocks_of(sink.buffer, LAYOUT)[3:, :, 1].any()
    source.call("end_step", 1)
    assert ended.next().ok


def test_a_source_killed_while_it_is_read(start, big_sink):
    """What is reported as good is good, the rest fails at once, and a new source serves."""
    want = whole(5)
    for delay in (0.0, 0.01, 0.05):
        source, ended = big_peer(start, seed=5), Ended()
        big_sink.connect("source", source.address)
        blocks_of(big_sink.buffer, BIG)[:] = 0
        for pull_id in range(20):
            big_sink.pull(migrate(pull_id, ALL, ALL), ended)
        time.sleep(delay)
        source.kill()
        events = [ended.next(timeout=5) for _ in range(20)]
        assert sorted(event.pull_id for event in events) == list(range(20))
        assert all(event.ok or "source" in event.reason for event in events)
        if any(event.ok for event in events):
            assert np.array_equal(blocks_of(big_sink.buffer, BIG), want)


def test_a_source_that_is_stopped_fails_pulls_at_their_deadline_and_serves_when_it_goes_on(start, big_sink):
    source, ended = big_peer(start, seed=6), Ended()
    big_sink.connect("source", source.address)
    source.signal(signal.SIGSTOP)
    try:
        deadline = time.time() + 0.3
        big_sink.pull(migrate(1, ALL, ALL, deadline=deadline), ended)
        event = in_time(ended, 0.3)
        assert (event.ok, event.reason) == (False, "deadline passed")
        blocks_of(big_sink.buffer, BIG)[:] = 0
    finally:
        source.signal(signal.SIGCONT)
    big_sink.pull(migrate(2, ALL[:9], ALL[:9]), ended)
    assert ended.next().ok
    # What was still on its way for the pull that failed went nowhere.
    assert np.array_equal(blocks_of(big_sink.buffer, BIG)[:, :, :9], whole(6)[:, :, :9])
    assert not blocks_of(big_sink.buffer, BIG)[:, :, 9:].any()


def num_descriptors():
    """Open ones, but for shared memory: TCP has none, and what other tests left of it comes and goes."""
    num = 0
    for entry in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # closed meanwhile
            num += "memfd:" not in str(entry.readlink())
    return num


def test_closing_leaves_no_descriptor_and_no_thread():
    before, threads = num_descriptors(), threading.active_count()
    for _ in range(3):
        one, other, ended = make(), make(), Ended()
        one.connect("source", other.address)
        one.pull(migrate(1, (1,), (1,), ready=0, step=5), ended)
        other.close()
        assert "closed" in ended.next().reason
        one.close()
        one.close()
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline and (num_descriptors() > before or threading.active_count() > threads):
        time.sleep(0.01)
    assert num_descriptors() <= before
    assert threading.active_count() <= threads
