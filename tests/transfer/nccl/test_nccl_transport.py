"""KV through the NCCL transport, with communicators over sockets in NCCL's place: what arrives, and when things fail.

Pools are torch's memory. Faults are ordered from the library (``ranks.Faults``); each must end the pull by its
deadline, give every slot and block back, and leave the pair able to pull again, in a later generation.
"""

import dataclasses
import socket
import threading
import time

import pytest
import torch

from distserve.core.errors import ConfigError, TransferError
from distserve.transfer.nccl import cupy_nccl
from distserve.transfer.nccl.device import CpuDevice, CudaDevice
from distserve.transfer.nccl.room import Limits
from distserve.transfer.nccl.transport import NcclTransport, staging_bytes
from distserve.transfer.tcp import TcpTransport
from tests.transfer.nccl.ranks import LIMITS, Rank, eventually
from tests.transfer.pools import LAYOUT, SECRET, Ended, migrate

LATE = 2.0
"""Seconds within which a pull with a deadline ends after it, on a busy machine."""


@pytest.fixture
def start():
    ranks = []

    def starter(*arguments, **options):
        ranks.append(Rank(*arguments, **options))
        return ranks[-1]

    yield starter
    for rank in ranks:
        rank.close()


@pytest.fixture
def source(start):
    return start(seed=1)


@pytest.fixture
def sink(start, source):
    rank = start(dataclasses.replace(LAYOUT, num_blocks=20))
    rank.transport.connect("source", source.transport.address)
    return rank


def arrived(source, sink, src_blocks, dst_blocks, layers=slice(None)) -> bool:
    return torch.equal(sink.blocks[layers][:, :, list(dst_blocks)], source.blocks[layers][:, :, list(src_blocks)])


def untouched(sink, blocks) -> bool:
    return not sink.blocks[:, :, list(blocks)].any()


def pull(sink, pull_id, blocks, *, seconds=20.0, **options):
    ended = Ended()
    sink.transport.pull(migrate(pull_id, blocks, blocks, deadline=time.time() + seconds, **options), ended)
    return ended


def generation(rank) -> int:
    return max((link.generation for link in rank.hub.links.values()), default=0)


def as_good_as_new(source, sink) -> None:
    """The next pull of the pair arrives, and then nothing is left of any."""
    assert eventually(lambda: pull(sink, 1000 + time.monotonic_ns(), (7, 9), seconds=2).next().ok)
    assert arrived(source, sink, (7, 9), (7, 9))
    assert eventually(source.is_clean)
    assert eventually(sink.is_clean)


def test_ready_blocks_arrive_and_nothing_else_is_written(source, sink):
    ended = Ended()
    src_blocks, dst_blocks = (3, 4, 5, 31, 0, 9), (0, 1, 2, 3, 19, 7)
    sink.transport.pull(migrate(1, src_blocks, dst_blocks), ended)
    event = ended.next()
    assert (event.pull_id, event.ok, event.reason) == (1, True, "")
    assert event.num_bytes == 6 * LAYOUT.token_bytes * LAYOUT.block_size
    assert arrived(source, sink, src_blocks, dst_blocks)
    assert untouched(sink, set(range(20)) - set(dst_blocks))
    assert ended.none()


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


def test_blocks_out_of_range_fail_the_pull(source, sink):
    assert "source blocks" in pull(sink, 1, (1, 32)).next().reason


def test_a_pull_of_nothing_ends_well(sink):
    assert pull(sink, 1, ()).next().ok


def test_peers_come_and_go(start, source, sink):
    gone, stays = pull(sink, 1, (1,), ready=0, step=5), Ended()
    other = start(seed=2)
    sink.transport.connect("other", other.transport.address)
    sink.transport.pull(dataclasses.replace(migrate(2, (1,), (2,), ready=0, step=5), source_id="other"), stays)
    sink.transport.forget("source")
    sink.transport.forget("source")
    assert "source is gone" in gone.next().reason
    assert "not connected" in pull(sink, 3, (1,)).next().reason
    other.transport.end_step(5)
    assert stays.next().ok
    # Another one under the same name is not mistaken for it.
    sink.transport.connect("source", source.transport.address)
    replaced = pull(sink, 4, (1,), ready=0, step=6)
    sink.transport.connect("source", other.transport.address)
    assert "replaced" in replaced.next().reason
    assert pull(sink, 5, (4,)).next().ok
    assert arrived(other, sink, (4,), (4,))


def test_a_source_that_closes_fails_pulls_from_it(source, sink):
    ended = pull(sink, 1, (1,), ready=0, step=5)
    source.transport.close()
    source.transport.close()
    assert "closed" in ended.next().reason
    with pytest.raises(TransferError, match="no KV memory to be reached"):
        sink.transport.connect("source", source.transport.address)


def test_close_fails_what_is_under_way(sink):
    ended = pull(sink, 1, (1,), ready=0, step=5)
    sink.transport.close()
    assert ended.next().reason == "transport closed"
    assert eventually(lambda: not sink.collectives.live)


def break_init(source, sink):
    sink.faults.fail_in_init = 1


def hang_in_init(source, sink):
    sink.faults.hang_in_init = 1


def hang_in_init_of_source(source, sink):
    source.faults.hang_in_init = 1


def hang_in_send(source, sink):
    source.faults.hang_in_send = 1


def hang_in_receive(source, sink):
    sink.faults.hang_in_send = 1


def hang_on_stream(source, sink):
    source.faults.hang_on_stream = 1


def error_in_send(source, sink):
    source.faults.fail_in_send = 1


def error_on_stream(source, sink):
    sink.faults.break_on_stream = 1


def hang_in_send_and_abort(source, sink):
    source.faults.hang_in_send = 1
    source.faults.hang_in_abort = True


IN_INIT = [break_init, hang_in_init, hang_in_init_of_source]
LATER = [
    hang_in_send,
    hang_in_receive,
    hang_on_stream,
    error_in_send,
    error_on_stream,
    hang_in_send_and_abort,
]  # fmt: skip
CASES = [(fault, True) for fault in (*IN_INIT, *LATER)] + [(fault, False) for fault in LATER]


@pytest.mark.parametrize(
    ("fault", "is_first"), CASES, ids=[f"{fault.__name__}-{'first' if new else 'later'}" for fault, new in CASES]
)
def test_a_fault_ends_the_pull_in_time_and_the_pair_goes_on(source, sink, fault, is_first):
    if not is_first:
        assert pull(sink, 0, (3,)).next().ok
    survives = fault is break_init
    before = generation(sink)
    fault(source, sink)
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
    assert generation(sink) > before
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
    assert generation(sink) == 1


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


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_pulls_end_even_if_the_transfer_thread_fails(sink):
    waiting = pull(sink, 1, (1,), ready=0, step=5)

    def raises(event):
        raise RuntimeError("a bug")

    sink.transport.pull(migrate(2, (2,), (2,)), raises)
    assert waiting.next().reason == "the transfer thread failed"


def test_layouts_that_differ_are_refused_and_both_named(start, source):
    rank = start(dataclasses.replace(LAYOUT, num_layers=6, dtype="float32"))
    with pytest.raises(TransferError, match="num_layers 4 there, 6 here, dtype bfloat16 there, float32 here"):
        rank.transport.connect("source", source.transport.address)


def test_versions_of_nccl_and_secrets_that_differ_are_refused(start, source):
    rank = start()
    rank.transport._bootstrap._version = "1.2.4"
    with pytest.raises(TransferError, match=r"NCCL 1\.2\.3 there, 1\.2\.4 here"):
        rank.transport.connect("source", source.transport.address)
    with pytest.raises(TransferError, match="secret"):
        start(secret=b"another").transport.connect("source", source.transport.address)


def test_a_rank_that_does_not_use_nccl_is_refused(source):
    tcp = TcpTransport(LAYOUT, host="127.0.0.1", secret=SECRET, clock=time.time)
    try:
        with pytest.raises(TransferError, match="not the address of a rank that uses NCCL"):
            source.transport.connect("tcp", tcp.address)
    finally:
        tcp.close()


def test_strangers_and_nonsense_are_hung_up_on(source, sink):
    host, _, port = source.transport.address.removeprefix("nccl+tcp://").partition("/")[0].partition(":")
    with socket.create_connection((host, int(port)), timeout=20) as stranger:
        stranger.sendall(b"\x05\0\0\0hello")
        while stranger.recv(4096):
            pass
    (link,) = sink.transport._driver._peers.values()
    link.control.connection.sendall(b"\xff" * 64)
    assert eventually(lambda: not source.hub.links)
    sink.transport.connect("source", source.transport.address)
    as_good_as_new(source, sink)


def test_without_cupy_the_error_names_the_extra(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "cupy", None)
    monkeypatch.setitem(__import__("sys").modules, "cupy.cuda", None)
    pool = torch.zeros(LAYOUT.num_bytes, dtype=torch.uint8)
    with pytest.raises(ConfigError, match=r"CuPy, which is not installed: .*distserve\[cuda\]"):
        NcclTransport(LAYOUT, pool, host="127.0.0.1", secret=SECRET, clock=time.time)


def test_two_copies_of_nccl_in_a_process_are_noticed():
    maps = "\n".join(
        f"7f00-7f01 r-xp 0 08:01 {number} {path}"
        for number, path in enumerate(
            [
                "/a/nvidia/nccl/lib/libnccl.so.2",
                "/a/nvidia/nccl/lib/libnccl.so.2",
                "/usr/lib/libc.so.6",
                "/b/libnccl.so.2.1",
            ]
        )
    )
    assert cupy_nccl.loaded_libraries(maps) == ["/a/nvidia/nccl/lib/libnccl.so.2", "/b/libnccl.so.2.1"]
    assert cupy_nccl.loaded_libraries() == []


def test_a_pool_of_another_size_or_device_is_refused(monkeypatch):
    pool = torch.zeros(LAYOUT.num_bytes + 2, dtype=torch.uint8)
    with pytest.raises(ConfigError, match=f"{LAYOUT.num_bytes} bytes"):
        NcclTransport(LAYOUT, pool, host="127.0.0.1", secret=SECRET, clock=time.time)
    if not torch.cuda.is_available():
        with pytest.raises(ConfigError, match="needs a CUDA device"):
            CudaDevice(torch.device("cuda"))


def test_what_it_costs_beside_the_pool_is_known_beforehand():
    layout = dataclasses.replace(LAYOUT, num_layers=32, num_kv_heads=8, head_dim=128)
    assert staging_bytes(layout) == 2 * 4 * 3 * (16 << 20)
    assert staging_bytes(layout, Limits(min_piece_bytes=1, num_slots=1)) == 2 * 2 * layout.block_bytes
    assert CpuDevice().record().query()
