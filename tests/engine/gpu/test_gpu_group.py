"""On two cards: an instance of several ranks, NCCL between them and in their graphs. Run with ``-m gpu``."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import distributed

from distserve.core.config import KvConfig, ParallelConfig, SchedulerConfig
from distserve.engine.device.cuda import CudaBackend
from distserve.engine.group.driver import RankGroup
from distserve.engine.sharding.comm import make_group
from tests.engine.conftest import NUM_TOKENS, Served
from tests.engine.device.test_device_runner import play
from tests.engine.harness import generate_side_by_side

pytestmark = pytest.mark.gpu

needs_two = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")


@pytest.fixture
def start() -> Iterator[Callable[..., RankGroup]]:
    """Starts groups on the machine's cards, and ends them after the test."""
    groups: list[RankGroup] = []

    def make(path: Path, tp: int, pp: int, kv: KvConfig = KvConfig(96, 16), **more: object) -> RankGroup:
        groups.append(RankGroup(path, parallel=ParallelConfig(tp, pp), kv=kv, device="cuda", timeout=120.0, **more))
        return groups[-1]

    yield make
    for group in groups:
        group.shutdown()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_nccl_is_captured(tmp_path: Path) -> None:
    """A group of one rank, so that a machine with one card shows it, too."""
    backend = CudaBackend(torch.device("cuda", 0))
    with backend.scope():
        group = make_group(distributed.FileStore(str(tmp_path / "store"), 1), 0, 1, backend.device, 60.0)
        given = torch.ones(8, device=backend.device)

        def step() -> torch.Tensor:
            doubled = given * 2
            group.allreduce([doubled]).wait()
            return doubled + 1

        replay = backend.capture(step)
        given.fill_(5)
        assert replay().tolist() == [11] * 8


@needs_two
@pytest.mark.parametrize("name", ["llama", "mixtral", "opt"])
@pytest.mark.parametrize(("tp", "pp"), [(2, 1), (1, 2)])
def test_texts_of_two_cards(
    served: Callable[[str], Served], start: Callable[..., RankGroup], name: str, tp: int, pp: int
) -> None:
    model = served(name)
    group = start(model.path, tp, pp, max_batch_size=6)
    assert generate_side_by_side(group, model.prompts, NUM_TOKENS) == model.expected


@needs_two
@pytest.mark.parametrize(("tp", "pp"), [(2, 1), (1, 2)])
def test_a_busy_instance_of_two_cards(llama: Served, start: Callable[..., RankGroup], tp: int, pp: int) -> None:
    """Steps ahead of their tokens, mixed batches and batches beyond the graphs, with every sampling option."""
    config = SchedulerConfig(max_batch_tokens=48, max_batch_size=9, headroom=0.0)
    plain = play(llama.worker(num_blocks=24), config, 3, aborts=False)
    group = start(llama.path, tp, pp, kv=KvConfig(24, 4), max_batch_size=3)
    several = play(group, replace(config, max_in_flight=2, lookahead=group.runs_ahead), 3, aborts=False)
    assert several.tokens() == plain.tokens()
