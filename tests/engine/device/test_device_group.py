"""An instance of several ranks on devices, rehearsed on the CPU: one rank's tokens, from graphs, steps ahead."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from distserve.core.config import KvConfig, ParallelConfig, SchedulerConfig
from distserve.engine.group.driver import RankGroup
from tests.engine.conftest import NUM_TOKENS, Served
from tests.engine.device.group_backend import MADE
from tests.engine.device.test_device_runner import play
from tests.engine.harness import generate_side_by_side

KV = KvConfig(96, 4)
REHEARSED = "tests.engine.device.group_backend:rank_backend"

# Few by default, since every rank is a process: each way of sharing tokens at least once.
DEFAULT = [("llama", 2, 1), ("mixtral", 1, 2)]
MATRIX = [
    pytest.param(name, tp, pp, marks=() if (name, tp, pp) in DEFAULT else pytest.mark.slow)
    for name in ["llama", "llama-tied", "opt", "mixtral", "qwen3-moe", "phi3", "gpt2", "gemma2"]
    for tp, pp in [(2, 1), (1, 2), (2, 2)]
]


@pytest.fixture
def start() -> Iterator[Callable[..., RankGroup]]:
    """Starts groups, and ends them after the test."""
    groups: list[RankGroup] = []

    def make(path: Path, tp: int, pp: int, **more: object) -> RankGroup:
        options = {"kv": KV, "timeout": 120.0, "backend": REHEARSED, "max_batch_size": 6, **more}
        group = RankGroup(path, parallel=ParallelConfig(tp, pp), **options)
        groups.append(group)
        return group

    yield make
    for group in groups:
        group.shutdown()


@pytest.mark.parametrize(("name", "tp", "pp"), MATRIX)
def test_texts_of_several_ranks(
    served: Callable[[str], Served], start: Callable[..., RankGroup], name: str, tp: int, pp: int
) -> None:
    model = served(name)
    group = start(model.path, tp, pp)
    assert generate_side_by_side(group, model.prompts, NUM_TOKENS) == model.expected
    assert MADE[-1].num_replays > NUM_TOKENS


@pytest.mark.parametrize(
    ("tp", "pp", "ahead"),
    [(2, 1, 2), pytest.param(1, 2, 0, marks=pytest.mark.slow), pytest.param(2, 2, 0, marks=pytest.mark.slow)],
)
def test_a_busy_instance_gives_the_tokens_of_one_rank(
    llama: Served, start: Callable[..., RankGroup], tp: int, pp: int, ahead: int
) -> None:
    """Mixed batches, forks, evictions, batches beyond the ladder, every sampling option, several steps on their way."""
    config = SchedulerConfig(max_batch_tokens=48, max_batch_size=9, headroom=0.0)
    plain = play(llama.worker(num_blocks=24), config, 3, aborts=False)
    group = start(llama.path, tp, pp, kv=KvConfig(24, 4), max_batch_size=3)
    assert group.runs_ahead == (ahead > 0)
    several = play(group, replace(config, max_in_flight=ahead or pp, lookahead=ahead > 0), 3, aborts=False)
    assert several.most_in_flight == 2
    assert several.scheduler.totals.num_preempted > 0
    assert several.tokens() == plain.tokens()
