"""Two processes on one card: bytes, and the KV of a real prefill that a real decode goes on with.

On a real card with ``-m gpu``. The second runs on a fake one too, in the default suite; for the first that is in
``test_cuda_ipc_processes.py``.
"""

import dataclasses
import time

import pytest
import torch

from distserve.core.config import KvLayout
from distserve.demo import model_dir
from tests.engine.harness import make_request
from tests.oracle import demo_model, generate
from tests.peers import starting
from tests.transfer import card_peer
from tests.transfer.cards import CardRank, pattern
from tests.transfer.pools import Ended, migrate

REAL = pytest.param(
    "cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]
)
LAYOUT = KvLayout(num_layers=4, num_blocks=64, block_size=16, num_kv_heads=2, head_dim=64, dtype="bfloat16")
PROMPT = [7 * number % 150 + 3 for number in range(45)]
NUM_TOKENS, FIRST_CHUNK = 16, 24


@pytest.fixture
def start():
    """Starts a rank as ``card_peer.py`` has it."""
    with starting(card_peer.main) as starter:
        yield starter


@pytest.fixture
def rank():
    ranks = []

    def make(card, **options):
        ranks.append(CardRank(card, **options))
        return ranks[-1]

    yield make
    for each in ranks:
        each.transport.close()


def patient(pull):
    return dataclasses.replace(pull, deadline=time.time() + 120)


@pytest.mark.parametrize("card", [REAL])
def test_bytes_arrive_and_no_others_are_written(card, start, rank):
    source = start(card=card, layout=LAYOUT, seed=4)
    sink, ended = rank(card, layout=LAYOUT), Ended()
    sink.transport.connect("source", source.address)
    src_blocks, dst_blocks = (3, 4, 5, 63, 0, 9), (0, 1, 2, 40, 19, 7)
    sink.transport.pull(patient(migrate(1, src_blocks, dst_blocks, ready=2, step=3)), ended)
    assert ended.none()
    source.call("end_step", 3)
    event = ended.next(60)
    assert event.ok, event.reason
    shape = (LAYOUT.num_layers, 2, LAYOUT.num_blocks, -1)
    expected = torch.zeros(LAYOUT.num_bytes, dtype=torch.uint8).view(shape)
    expected[:, :, list(dst_blocks)] = pattern(LAYOUT, 4).view(shape)[:, :, list(src_blocks)]
    assert torch.equal(sink.pool.cpu().view(shape), expected)
    source.kill()
    sink.transport.pull(patient(migrate(2, (1,), (1,), ready=0, step=9)), ended)
    assert not ended.next(60).ok
    with pytest.raises(Exception, match="cannot connect to instance source"):
        sink.transport.connect("source", source.address)


@pytest.mark.parametrize("card", ["fake", REAL])
def test_a_real_decode_goes_on_with_the_kv_of_a_real_prefill(card, start, rank):
    """A prompt in two chunks: the first one's blocks are pulled while the second is computed, its own as they come."""
    model = str(model_dir())
    source = start(card=card, model=model)
    sink, ended = rank(card, model=model), Ended()
    opened = source.call("open", PROMPT)
    source.call("compute", FIRST_CHUNK)
    sink.transport.connect("source", source.address)
    # The blocks that the sequence will be given when it is opened, with its first token.
    dst_blocks = sink.harness.free[: -len(opened["blocks"]) - 1 : -1]
    num_ready = FIRST_CHUNK // sink.layout.block_size
    last_step = opened["next_step"] + 1
    sink.transport.pull(patient(migrate(1, opened["blocks"], dst_blocks, ready=num_ready, step=last_step)), ended)
    assert ended.none()
    (first,) = source.call("compute", len(PROMPT) - FIRST_CHUNK)["tokens"]
    event = ended.next(60)
    assert event.ok, event.reason
    assert event.num_bytes == len(dst_blocks) * sink.layout.block_size * sink.layout.token_bytes
    track = sink.harness.open(make_request(PROMPT), output=[first], num_computed=len(PROMPT))
    assert track.blocks == dst_blocks
    for _ in range(NUM_TOKENS - 1):
        sink.harness.step((track, 1))
    assert track.output == generate(demo_model(), PROMPT, NUM_TOKENS)
