"""An instance of several ranks on devices, rehearsed on the CPU: one rank's tokens, from graphs, steps ahead."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from distserve.core.config import KvConfig, ParallelConfig, SchedulerConfig
from distserve.engine.group.driver import RankGroup
from tests.engine.conftest import NUM_TOKENS, Served
from tests.engine.device.driving import Driven
from tests.engine.device.test_device_runner import requests_of
from tests.engine.harness import Harness, make_request

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


def busy(group: RankGroup, config: SchedulerConfig, num_requests: int) -> Driven:
    import random

    rng = random.Random(3)
    driven = Driven(group, config)
    for request in requests_of(rng, num_requests):
        driven.submit(request)
        for _ in range(rng.randint(0, 3)):
            if driven.in_flight:
                driven.finish_step()
    driven.run_out()
    assert not driven.failed
    return driven


@pytest.mark.parametrize(("name", "tp", "pp"), MATRIX)
def test_texts_of_several_ranks(
    served: Callable[[str], Served], start: Callable[..., RankGroup], name: str, tp: int, pp: int
) -> None:
    model = served(name)
    group = start(model.path, tp, pp)
    harness = Harness(group)
    tracks = [harness.open(make_request(prompt)) for prompt in model.prompts]
    harness.prefill(tracks[0])
    harness.prefill(tracks[1], 5)
    # Prompts beside decoding sequences, then three rungs, two of them with padding.
    harness.step((tracks[0], 1), (tracks[2], len(model.prompts[2])), (tracks[1], 1))
    harness.prefill(tracks[3], 7)
    while open_tracks := [track for track in tracks if len(track.output) < NUM_TOKENS]:
        harness.decode(open_tracks, 1)
    assert [track.output for track in tracks] == model.expected
