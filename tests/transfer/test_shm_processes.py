"""Shared memory between real processes, and what is left when they are killed."""

import fcntl
import gc
import mmap
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from distserve.core.errors import TransferError
from distserve.transfer.shm import ShmTransport
from tests.transfer.pools import LAYOUT, SECRET, Ended, blocks_of, eventually, fill, migrate


@pytest.fixture
def sink():
    transport = ShmTransport(LAYOUT, secret=SECRET, clock=time.time)
    yield transport
    transport.close()


def kv_files(pid: int) -> list[str]:
    """Open descriptors of a process that are KV memory."""
    found = []
    for fd in Path(f"/proc/{pid}/fd").glob("*"):
        try:
            target = str(fd.readlink())
        except OSError:
            continue
        if "memfd:distserve" in target:
            found.append(target)
    return found


def kv_mappings() -> set[str]:
    """Inodes of the KV memory this process has mapped."""
    return {line.split()[4] for line in Path("/proc/self/maps").read_text().splitlines() if "memfd:distserve" in line}


def expected(seed: int, blocks) -> np.ndarray:
    pool = bytearray(LAYOUT.num_bytes)
    fill(memoryview(pool), LAYOUT, seed)
    return blocks_of(memoryview(pool), LAYOUT)[:, :, list(blocks)]


def test_a_pull_overlaps_the_step_of_another_process(start, sink):
    source, ended = start(seed=3), Ended()
    sink.connect("source", source.address)
    ours = blocks_of(sink.buffer, LAYOUT)
    want = expected(3, (4, 5, 9))
    source.call("begin_step", 1)
    sink.pull(migrate(1, (4, 5, 9), (0, 1, 2), ready=1, step=1), ended)
    assert eventually(lambda: np.array_equal(ours[:, :, 0], want[:, :, 0]))
    assert not ours[:, :, 1:].any()
    source.call("layer_done", 1, 1)
    assert eventually(lambda: np.array_equal(ours[:2, :, :3], want[:2]))
    assert not ours[2:, :, 1:].any()
    source.call("end_step", 1)
    event = ended.next()
    assert event.ok
    assert event.num_bytes == 3 * LAYOUT.block_size * LAYOUT.token_bytes
    assert np.array_equal(ours[:, :, :3], want)


def test_a_source_killed_while_it_computes_fails_its_pulls_at_once(start, sink):
    source, ended = start(), Ended()
    sink.connect("source", source.address)
    source.call("begin_step", 1)
    for pull_id in (1, 2):
        sink.pull(migrate(pull_id, (pull_id,), (pull_id,), ready=0, step=1), ended)
    assert ended.none()
    source.kill()
    for event in (ended.next(), ended.next()):
        assert not event.ok
        assert "closed its connection" in event.reason
    sink.pull(migrate(3, (1,), (1,)), ended)
    assert "not connected" in ended.next().reason


def test_a_source_killed_while_it_is_read(start, sink):
    """Reading goes on harmlessly or stops; what is reported as good is good, and a new source serves."""
    blocks = tuple(range(LAYOUT.num_blocks))
    want = expected(5, blocks)
    before = kv_mappings()
    for delay in (0.0, 0.001, 0.004):
        source, ended = start(seed=5), Ended()
        sink.connect("source", source.address)
        blocks_of(sink.buffer, LAYOUT)[:] = 0
        for pull_id in range(100):
            sink.pull(migrate(pull_id, blocks, blocks), ended)
        time.sleep(delay)
        source.kill()
        events = [ended.next() for _ in range(100)]
        assert sorted(event.pull_id for event in events) == list(range(100))
        if any(event.ok for event in events):
            assert np.array_equal(blocks_of(sink.buffer, LAYOUT), want)
        assert ended.none()
        assert eventually(lambda: kv_mappings() <= before), "a dead peer's memory stays mapped"


def test_memory_goes_with_whoever_used_it_last():
    """And not when Python happens to look for garbage: a pool may be most of a machine's memory."""
    before = kv_mappings()
    gc.disable()
    try:
        source, sink = (ShmTransport(LAYOUT, secret=SECRET, clock=time.time) for _ in range(2))
        sink.connect("source", source.address)
        ended = Ended()
        sink.pull(migrate(1, (1,), (2,)), ended)
        assert ended.next().ok
        assert len(kv_mappings() - before) == 4, "memory and progress of both"
        source.close()
        del source
        assert eventually(lambda: len(kv_mappings() - before) == 2)
        sink.close()
        del sink
        assert eventually(lambda: kv_mappings() <= before)
    finally:
        gc.enable()


def test_a_destination_killed_while_it_pulls_leaves_the_source_serving(start):
    source = ShmTransport(LAYOUT, secret=SECRET, clock=time.time)
    try:
        fill(source.buffer, LAYOUT, seed=1)
        sockets = len(list(Path("/proc/self/fd").iterdir()))
        victim = start()
        victim.call("connect", "source", source.address)
        victim.call("pull", 1, [1, 2], [1, 2], 1, 5)
        victim.kill()
        # Fewer where other tests' leavings are collected meanwhile.
        assert eventually(lambda: len(list(Path("/proc/self/fd").iterdir())) <= sockets)
        heir = start()
        heir.call("connect", "source", source.address)
        source.end_step(5)
        answers = [heir.call("pull", 2, [1, 2], [1, 2], 1, 5), heir.read()]
        assert {"pull_id": 2, "ok": True, "reason": "", "num_bytes": 2 * 16 * LAYOUT.token_bytes} in answers
    finally:
        source.close()


def test_nothing_is_left_of_killed_processes(start):
    """Their memory never had a name, so its end is that of the processes; the sockets' names end with them too."""
    source, sink = start(), start()
    sink.call("connect", "source", source.address)
    sink.call("pull", 1, [1], [1], 0, 5)
    for peer in (source, sink):
        assert kv_files(peer.pid)
        assert "/dev/shm/" not in Path(f"/proc/{peer.pid}/maps").read_text()
        assert peer.address in Path("/proc/net/unix").read_text()
        peer.kill()
    for peer in (source, sink):
        assert peer.address not in Path("/proc/net/unix").read_text()
        assert not Path(f"/proc/{peer.pid}/fd").exists()


def test_a_wrong_secret_is_refused_on_both_sides(start, sink):
    stranger = start(secret=b"of another cluster")
    with pytest.raises(TransferError, match=r"instance source: .* the secrets differ"):
        sink.connect("source", stranger.address)
    assert "the secrets differ" in stranger.call("connect", "source", sink.address)["error"]


def test_a_different_layout_is_refused_with_both_values(start, sink):
    stranger = start(layout={"num_kv_heads": 4})
    with pytest.raises(TransferError, match="num_kv_heads 4 there, 2 here"):
        sink.connect("source", stranger.address)
    assert "num_kv_heads 2 there, 4 here" in stranger.call("connect", "source", sink.address)["error"]


def test_another_user_gets_nothing(sink):
    if os.geteuid() != 0:
        pytest.skip("needs to become another user")
    client = (
        "import os, socket, sys; os.setuid(65534); s = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET);"
        "s.connect(chr(0) + sys.argv[1]); print(s.recv(100))"
    )
    answer = subprocess.run(
        [sys.executable, "-I", "-c", client, sink.address], capture_output=True, text=True, check=True, timeout=20
    )
    assert answer.stdout == "b''\n"


def test_a_peer_cannot_write_or_shrink_the_memory(sink):
    """What a peer is given is sealed: not even by mistake can it damage the cache or make its reader crash."""
    fd = next(fd for fd in Path("/proc/self/fd").iterdir() if "memfd:distserve-kv" in str(fd.readlink()))
    with fd.open("r+b") as memory:
        with pytest.raises(PermissionError):
            mmap.mmap(memory.fileno(), 0)
        with pytest.raises(PermissionError):
            os.ftruncate(memory.fileno(), 0)
        with pytest.raises(PermissionError):
            fcntl.fcntl(memory.fileno(), fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE)
