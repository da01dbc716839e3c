"""An instance of several ranks says what one rank says, and a lost rank is noticed and named."""

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from distserve.core.commands import Chunk, OpenSequence, RunStep, TableUpdate
from distserve.core.config import KvConfig, ParallelConfig
from distserve.core.errors import ConfigError, InstanceError
from distserve.core.events import StepDone
from distserve.engine.group.driver import RankGroup
from tests.engine.conftest import NUM_TOKENS, Served
from tests.engine.harness import Harness, make_request

KV = KvConfig(96, 4)
SAMPLED = {"temperature": 1.0, "seed": 11, "top_p": 0.95, "frequency_penalty": 0.3, "logprobs": 2, "prompt_logprobs": 1}

# Few by default, since every rank is a process: each model once, each kind of split at least once.
DEFAULT = [("llama", 4, 1), ("opt", 2, 2), ("mixtral", 2, 2)]
SHAPES = [(1, 2), (2, 1), (2, 2), (4, 1), (4, 2)]
MODELS = [
    "llama",
    "opt",
    "mixtral",
    "qwen3-moe",
    "phi3",
    "gpt2",
    "llama-tied",
    "gemma2",
    "gemma3",
    "qwen2-sliding",
    "gpt-neox",
]
MATRIX = [
    pytest.param(name, tp, pp, marks=() if (name, tp, pp) in DEFAULT else pytest.mark.slow)
    for name in MODELS
    for tp, pp in SHAPES
]


@pytest.fixture
def start() -> Iterator[Callable[..., RankGroup]]:
    """Starts groups, and ends them after the test."""
    groups: list[RankGroup] = []

    def make(path: Path, tp: int, pp: int, **more: object) -> RankGroup:
        group = RankGroup(path, parallel=ParallelConfig(tp, pp), kv=KV, timeout=120.0, **more)
        groups.append(group)
        return group

    yield make
    for group in groups:
        group.shutdown()


def nurseries() -> list[int]:
    """Processes that this one started to start ranks."""
    return [pid for pid in children_of(os.getpid()) if b"group.nursery" in Path(f"/proc/{pid}/cmdline").read_bytes()]


def rank_pids() -> list[int]:
    """Processes of ranks 1, 2, ... of the one group that this process has."""
    (nursery,) = nurseries()
    return children_of(nursery)


def children_of(pid: int) -> list[int]:
    tasks = Path(f"/proc/{pid}/task").iterdir()
    return sorted(int(child) for task in tasks for child in (task / "children").read_text().split())


@pytest.mark.parametrize(("name", "tp", "pp"), MATRIX)
def test_texts_of_several_ranks(
    served: Callable[[str], Served], start: Callable[..., RankGroup], name: str, tp: int, pp: int
) -> None:
    model = served(name)
    group = start(model.path, tp, pp)
    harness = Harness(group)
    for chunk in (None, 7):
        for prompt, expected in zip(model.prompts, model.expected, strict=True):
            assert harness.generate(make_request(prompt), NUM_TOKENS, chunk).output == expected
    # Together: decodes beside chunks in the middle of prompts.
    tracks = [harness.open(make_request(prompt)) for prompt in model.prompts]
    while any(len(track.output) < NUM_TOKENS for track in tracks):
        work = [(track, 1) for track in tracks if 0 < len(track.output) < NUM_TOKENS]
        work += [(t, min(t.num_tokens - t.num_computed, 9)) for t in [t for t in tracks if not t.output][:2]]
        harness.step(*work)
    assert [track.output for track in tracks] == model.expected
    # Sampling with penalties and log-probabilities is what one rank makes of it.
    alone = Harness(model.worker())
    request = make_request(model.prompts[1], **SAMPLED)
    one, several = alone.generate(request, 12), harness.generate(request, 12)
    assert several.output == one.output
    for mine, theirs in zip(several.logprobs, one.logprobs, strict=True):
        assert mine is not None
        assert theirs is not None
        assert mine.logprob == pytest.approx(theirs.logprob, abs=1e-3)
    assert len(several.prompt_logprobs) == len(model.prompts[1]) - 1


def test_as_many_batches_on_their_way_as_stages_until_a_rank_is_killed(
    llama: Served, start: Callable[..., RankGroup]
) -> None:
    told: list[Exception] = []
    group = start(llama.path, 2, 2, on_lost=told.append)
    done: dict[int, StepDone] = {}
    arrived = threading.Condition()

    def on_done(outcome: StepDone) -> None:
        with arrived:
            done[outcome.step_id] = outcome
            arrived.notify_all()

    def wait_for(step_id: int) -> int:
        with arrived:
            assert arrived.wait_for(lambda: step_id in done, timeout=30)
        return done[step_id].tokens[0]

    texts: dict[int, list[int]] = {1: [], 2: []}
    batches = {}
    for seq_id in texts:
        prompt = llama.prompts[seq_id]
        group.open(OpenSequence(seq_id, make_request(prompt), (0,), (), 0))
        table = TableUpdate(seq_id, 0, tuple(range(20 * seq_id, 20 * seq_id + 20)))
        group.launch(RunStep(seq_id, (Chunk(seq_id, len(prompt), samples=True),), (table,)), on_done)
        batches[seq_id] = (Chunk(seq_id, 1, samples=True),)
    # Each step is launched while the other sequence's is still on its way.
    for step_id in range(3, 2 * NUM_TOKENS + 1):
        seq_id = 1 if step_id % 2 else 2
        texts[seq_id].append(wait_for(step_id - 2))
        group.launch(RunStep(step_id, batches[seq_id]), on_done)
    for step_id in (2 * NUM_TOKENS - 1, 2 * NUM_TOKENS):
        texts[1 if step_id % 2 else 2].append(wait_for(step_id))
    assert texts == {1: llama.expected[1], 2: llama.expected[2]}
    for seq_id in texts:
        group.close(seq_id)
    # The killed one is named, and ends its instance alone.
    harness = Harness(group)
    track = harness.open(make_request(llama.prompts[0]))
    harness.prefill(track)
    pids = rank_pids()
    assert len(pids) == 3
    os.kill(pids[1], signal.SIGKILL)
    begin = time.monotonic()
    with pytest.raises(InstanceError, match="rank 2 was killed by SIGKILL"):
        harness.decode([track], 50)
    assert time.monotonic() - begin < 5
    assert len(told) == 1
    assert "rank 2" in str(told[0])
    assert not any(Path(f"/proc/{pid}").exists() for pid in pids)


def test_each_rank_has_cpus_of_its_own_and_a_killed_one_is_noticed_while_nothing_runs(
    llama: Served, start: Callable[..., RankGroup]
) -> None:
    cores = sorted(os.sched_getaffinity(0))[:2]
    lost = threading.Event()
    group = start(llama.path, 2, 1, cores=cores if len(cores) == 2 else (), on_lost=lambda _: lost.set())
    (pid,) = rank_pids()
    used = {frozenset(os.sched_getaffinity(int(task.name))) for task in Path(f"/proc/{pid}/task").iterdir()}
    assert used == {frozenset(cores[-1:])}
    assert Harness(group).generate(make_request(llama.prompts[0]), NUM_TOKENS).output == llama.expected[0]
    os.kill(pid, signal.SIGTERM)
    assert lost.wait(5)
    with pytest.raises(InstanceError, match="rank 1 was killed by SIGTERM"):
        group.run(RunStep(1, ()))


class Killed:
    """A rank's memory that the kernel has none for."""

    def __init__(self, *_: object) -> None:
        os.kill(os.getpid(), signal.SIGKILL)


def test_a_rank_killed_before_all_have_met_is_named_at_once(llama: Served, start: Callable[..., RankGroup]) -> None:
    begin = time.monotonic()
    with pytest.raises(InstanceError, match="rank 1 was killed by SIGKILL"):
        start(llama.path, 2, 1, memory=f"{__name__}:Killed")
    assert time.monotonic() - begin < 60
    assert not nurseries()


@pytest.mark.parametrize(
    ("tp", "pp", "message"),
    [
        (3, 1, "tp 3 does not divide the model's 2 KV heads"),
        (8, 1, "tp 8 does not divide the model's 4 attention heads"),
        (1, 4, "pp 4 is more than the model's 3 layers"),
    ],
)
def test_a_shape_that_does_not_divide_the_model(
    llama: Served, start: Callable[..., RankGroup], tp: int, pp: int, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        start(llama.path, tp, pp)


def test_an_instance_without_room_is_refused_before_it_starts(llama: Served) -> None:
    with pytest.raises(ConfigError, match=r"an instance of tp 2 and pp 1 needs .* are missing"):
        RankGroup(llama.path, parallel=ParallelConfig(2, 1), kv=KvConfig(10**9, 16))
    assert not nurseries()
