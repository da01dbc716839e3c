"""Ranks in processes of their own: what is left when one is killed or stopped, and tokens of a prompt that moved.

On a card (``-m gpu``) with NCCL itself: a communicator of one rank that sends to itself, and two ranks on one card
where the library allows that. In the default suite with communicators over sockets.
"""

import signal
import time

import pytest
import torch

from distserve.demo import model_dir
from distserve.transfer.nccl.cupy_nccl import CupyCollectives, CupyCommunicator
from distserve.transfer.nccl.device import device_of
from distserve.transfer.nccl.loopback import CopyExchanger, LoopbackCollectives
from tests.engine.harness import make_request
from tests.peers import starting
from tests.transfer.nccl import peer
from tests.transfer.nccl.engines import EngineRank
from tests.transfer.nccl.ranks import Rank, pull
from tests.transfer.pools import Ended, eventually, migrate

ON_CARD = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]
PROMPT = [7 * number % 150 + 3 for number in range(45)]
NUM_TOKENS, FIRST_CHUNK = 12, 24
MULTI_RANK = (2, 30, 3)
"""The first NCCL that can be told to allow two ranks of a communicator on one card."""


@pytest.fixture
def start():
    """Starts a rank as ``peer.py`` has it."""
    with starting(peer.main) as starter:
        yield starter


@pytest.fixture
def sink():
    rank = Rank()
    yield rank
    rank.close()


def test_a_source_that_is_stopped_or_killed_costs_the_pull_and_no_more(start, sink):
    want = Rank(seed=3)
    want.close()
    source = start(seed=3)
    sink.transport.connect("source", source.address)
    assert pull(sink, 1, (1, 2)).next().ok
    # Stopped: the deadline ends the pull.
    source.signal(signal.SIGSTOP)
    started = time.monotonic()
    assert "deadline passed" in pull(sink, 2, (3, 4), seconds=0.4).next(5).reason
    assert time.monotonic() - started < 3
    source.signal(signal.SIGCONT)
    assert eventually(lambda: pull(sink, 1000 + time.monotonic_ns(), (3, 4), seconds=2).next().ok)
    assert torch.equal(sink.blocks[:, :, [1, 2, 3, 4]], want.blocks[:, :, [1, 2, 3, 4]])
    # Stopped while it sends: the watchdog ends the generation, and the next one serves.
    assert source.call("fault", "delay", 0.3) == {"returned": "fault"}
    ended = pull(sink, 3, tuple(range(8)), seconds=1.0)
    time.sleep(0.1)
    source.signal(signal.SIGSTOP)
    assert not ended.next(5).ok
    source.signal(signal.SIGCONT)
    source.call("fault", "delay", 0.0)
    assert eventually(lambda: pull(sink, 1000 + time.monotonic_ns(), (5, 6), seconds=2).next().ok)
    # Killed while it sends: its pulls fail at once.
    source.call("fault", "delay", 0.3)
    ended = pull(sink, 4, tuple(range(8)))
    time.sleep(0.1)
    source.kill()
    assert not ended.next(5).ok
    assert eventually(sink.is_clean)
    assert eventually(lambda: sink.transport.num_communicators == 0)
    # Its successor serves.
    other = start(seed=4)
    sink.transport.connect("source", other.address)
    assert pull(sink, 5, (1,)).next().ok


def test_a_destination_that_is_stopped_or_killed_costs_the_source_nothing(start):
    source = Rank(seed=3)
    try:
        sink = start()
        sink.call("connect", "source", source.transport.address)
        assert sink.call("pull", 1, [1, 2], 20)["ok"]
        sink.call("fault", "delay", 0.3)
        sink.send("pull", 2, list(range(8)), 1.0)
        time.sleep(0.1)
        sink.signal(signal.SIGSTOP)
        # Slots come back although nobody says anything.
        assert eventually(source.is_clean, seconds=5)
        sink.signal(signal.SIGCONT)
        assert not sink.read()["ok"]
        sink.call("fault", "delay", 0.0)
        assert eventually(lambda: sink.call("pull", time.monotonic_ns(), [3], 2)["ok"])
        sink.kill()
        assert eventually(lambda: source.transport.num_communicators == 0)
        assert not source.hub.links
    finally:
        source.close()


def expected_tokens(device: str) -> list[int]:
    rank = EngineRank(str(model_dir()), device, LoopbackCollectives(CopyExchanger))
    try:
        return rank.harness.generate(make_request(PROMPT), NUM_TOKENS).output
    finally:
        rank.transport.close()


def decode_what_was_prefilled(sink: EngineRank, address: str, call) -> list[int]:
    """Pull a prompt's first chunk at once and the other as its step goes on; then decode."""
    sink.transport.connect("source", address)
    opened = call("open", PROMPT)
    call("compute", FIRST_CHUNK)
    blocks = sink.reserve(len(PROMPT))
    ended, num_ready = Ended(), FIRST_CHUNK // sink.transport.layout.block_size
    step_id = opened["next_step"] + 1
    sink.transport.pull(
        migrate(1, opened["blocks"], blocks, ready=num_ready, step=step_id, deadline=time.time() + 60), ended
    )
    assert ended.none()
    (first,) = call("compute", len(PROMPT) - FIRST_CHUNK)["tokens"]
    event = ended.next()
    assert event.ok, event.reason
    track = sink.go_on(make_request(PROMPT), first, blocks)
    sink.harness.decode([track], NUM_TOKENS - 1)
    return track.output


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=ON_CARD)])
def test_a_decode_goes_on_with_the_prefill_of_the_same_process(device):
    """On a card: NCCL's communicator of one rank, which sends to itself."""
    if device == "cpu":
        shared = LoopbackCollectives(CopyExchanger)
    else:
        cupy = CupyCollectives(device_of(torch.empty(1, device="cuda")))

        def make() -> CupyCommunicator:
            return cupy.communicator(cupy.unique_id(), rank=0, num_ranks=1)

        shared = LoopbackCollectives(make, cupy.version)
    source, sink = (EngineRank(str(model_dir()), device, shared) for _ in range(2))
    tracks = []

    def call(name, argument):
        if name == "open":
            tracks.append(source.open(make_request(argument)))
            return {"blocks": tracks[0].blocks, "next_step": source.harness.step_id + 1}
        return {"tokens": source.compute(tracks[0], argument)}

    try:
        assert decode_what_was_prefilled(sink, source.transport.address, call) == expected_tokens(device)
    finally:
        sink.transport.close()
        source.transport.close()


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=ON_CARD)])
def test_a_decode_goes_on_with_the_prefill_of_another_process(start, device, monkeypatch):
    """On a card: two ranks of one communicator on it, where NCCL allows that."""
    if device == "cuda":
        version = torch.cuda.nccl.version()
        if version < MULTI_RANK:
            pytest.skip(f"NCCL {'.'.join(map(str, version))} has no two ranks on one card; {MULTI_RANK} has")
        monkeypatch.setenv("NCCL_MULTI_RANK_GPU_ENABLE", "1")
    source = start(model=str(model_dir()), device=device)
    sink = EngineRank(str(model_dir()), device)
    try:
        assert decode_what_was_prefilled(sink, source.address, source.call) == expected_tokens(device)
    finally:
        sink.transport.close()
