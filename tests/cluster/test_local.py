"""A cluster in one process gives the tokens of transformers' own generate, also when instances die or clients leave."""

import asyncio
from pathlib import Path

import pytest

from distserve.cluster.clock import cluster_time
from distserve.cluster.local import LocalCluster
from distserve.cluster.parts import OWNER
from distserve.cluster.replay import replay
from distserve.core.commands import Conclude, Deliver
from distserve.core.config import KvConfig, SchedulerConfig
from distserve.core.instance_machine import scheduler_for
from distserve.core.owner import Owner
from distserve.core.router import Router
from distserve.core.scheduler import InstanceScheduler
from distserve.demo import model_dir
from tests.cluster.asking import collect, greedy, until_idle
from tests.oracle import demo_model, generate

PROMPTS = [list(range(20 + 7 * number, 20 + 7 * number + 3 + 11 * number)) for number in range(6)]
NUM_TOKENS, NUM_LONG = 24, 100


class Watcher:
    """An observer that writes down what it is told."""

    def __init__(self) -> None:
        self.prompts: dict[str, int] = {}
        self.ends: dict[str, tuple[int, bool]] = {}

    def arrived(self, request_id: str, time: float, num_prompt_tokens: int) -> None:
        assert abs(time - cluster_time()) < 60
        self.prompts[request_id] = num_prompt_tokens

    def ended(self, request_id: str, num_output_tokens: int, *, complete: bool) -> None:
        assert request_id not in self.ends
        self.ends[request_id] = (num_output_tokens, complete)


@pytest.fixture(scope="module")
def expected() -> list[list[int]]:
    return [generate(demo_model(), prompt, NUM_LONG) for prompt in PROMPTS]


@pytest.mark.parametrize(("prefill", "decode", "mixed"), [(1, 1, 0), (2, 2, 0), (0, 0, 1)])
async def test_tokens_are_those_of_generate(
    expected: list[list[int]], prefill: int, decode: int, mixed: int, tmp_path: Path
) -> None:
    kv = KvConfig(num_blocks=64)
    scheduler = SchedulerConfig(max_batch_tokens=48, report_interval=0.02)
    cluster = LocalCluster(model_dir(), prefill, decode, mixed=mixed, kv=kv, scheduler=scheduler, log_dir=tmp_path)
    async with cluster as backend:
        answers = await asyncio.gather(
            *(collect(backend, greedy(f"r{number}", prompt)) for number, prompt in enumerate(PROMPTS))
        )
        await until_idle(backend, kv)
    assert [tokens for tokens, _ in answers] == [tokens[:NUM_TOKENS] for tokens in expected]
    assert {conclude.status for _, conclude in answers} == {200}
    # What the live machines decided follows from their logs alone.
    machines = {spec.instance_id: scheduler_for(spec) for spec in cluster.specs}
    for name, machine in {**machines, OWNER: Owner(OWNER), "router": Router()}.items():
        steps = list(replay(tmp_path / f"{name}.log", machine))
        assert steps
        for _, event, live, again in steps:
            assert live == again, (name, event)


@pytest.mark.parametrize(("prefill", "decode", "mixed"), [(1, 1, 0), (0, 0, 1)])
async def test_preempted_sequences_still_give_the_same_tokens(
    expected: list[list[int]], prefill: int, decode: int, mixed: int
) -> None:
    # Too few blocks for all sequences to grow to their ends.
    kv = KvConfig(num_blocks=16)
    scheduler = SchedulerConfig(headroom=0.0, report_interval=0.0)
    async with LocalCluster(model_dir(), prefill, decode, mixed=mixed, kv=kv, scheduler=scheduler) as backend:
        answers = await asyncio.gather(
            *(collect(backend, greedy(f"r{number}", prompt, NUM_LONG)) for number, prompt in enumerate(PROMPTS))
        )
        await until_idle(backend, kv)
        status = backend.status()
    assert status is not None
    assert sum(report.num_preempted for _, report in status.instances) > 0
    assert [tokens for tokens, _ in answers] == expected


@pytest.mark.parametrize(("prefill", "decode", "mixed"), [(1, 1, 0), (0, 0, 1)])
async def test_prompts_with_a_common_prefix_give_the_same_tokens(
    prefill: int, decode: int, mixed: int, tmp_path: Path
) -> None:
    """Repeated prompts, longer ones, and the next turn of a conversation; some at once, some later."""
    system = list(range(50, 115))
    first = [[*system, *range(20, 20 + length)] for length in (7, 7, 30)] + [system[:64], system[:40]]
    turns = [[*first[0], *generate(demo_model(), first[0], NUM_TOKENS), *range(30, 40)], first[2]]
    kv = KvConfig(num_blocks=64)
    scheduler = SchedulerConfig(max_batch_tokens=48, report_interval=0.02, prefix_caching=True)
    cluster = LocalCluster(model_dir(), prefill, decode, mixed=mixed, kv=kv, scheduler=scheduler, log_dir=tmp_path)
    answers = []
    async with cluster as backend:
        for prompts in (first, turns):
            calls = [collect(backend, greedy(f"r{len(answers) + at}", prompt)) for at, prompt in enumerate(prompts)]
            answers += await asyncio.gather(*calls)
        await until_idle(backend, kv)
    assert [tokens for tokens, _ in answers] == [generate(demo_model(), prompt, NUM_TOKENS) for prompt in first + turns]
    # What was found is in the log: the machine goes through the same states again.
    machine = scheduler_for(cluster.specs[0])
    assert isinstance(machine, InstanceScheduler)
    for _, event, live, again in replay(tmp_path / f"{cluster.specs[0].instance_id}.log", machine):
        assert live == again, event
    shared_turn = (len(first[0]) + NUM_TOKENS - 1 if mixed else len(first[0])) // 16 * 16
    assert machine.totals.num_hit_tokens == 64 + 64 + 48 + 32 + shared_turn + (len(first[2]) - 1) // 16 * 16


@pytest.mark.parametrize("victim", ["prefill-0", "decode-0"])
async def test_a_lost_instance_costs_no_tokens(expected: list[list[int]], victim: str) -> None:
    cluster = LocalCluster(model_dir(), prefill=2, decode=2)
    async with cluster as backend:
        tasks = [
            asyncio.create_task(collect(backend, greedy(f"r{number}", prompt))) for number, prompt in enumerate(PROMPTS)
        ]
        await asyncio.sleep(0.03)
        await asyncio.to_thread(cluster.lose, victim)
        answers = await asyncio.gather(*tasks)
    assert [tokens for tokens, _ in answers] == [tokens[:NUM_TOKENS] for tokens in expected]


async def test_a_client_that_leaves_frees_its_blocks() -> None:
    kv = KvConfig(num_blocks=64)
    scheduler = SchedulerConfig(report_interval=0.02, heartbeat=0.1)
    watcher = Watcher()
    async with LocalCluster(model_dir(), kv=kv, scheduler=scheduler) as backend:
        backend.observe(watcher)
        for number in range(4):
            stream = backend.submit(greedy(f"r{number}", PROMPTS[1], num_tokens=400))
            for _ in range(number):
                assert isinstance(await anext(stream), Deliver)
            backend.abandon(f"r{number}")
        assert backend.num_active == 0
        await until_idle(backend, kv)
        await collect(backend, greedy("r4", PROMPTS[2], num_tokens=30))
    assert watcher.prompts == {**{f"r{number}": len(PROMPTS[1]) for number in range(4)}, "r4": len(PROMPTS[2])}
    for number in range(4):
        num_tokens, is_complete = watcher.ends[f"r{number}"]
        # A delivery holds several tokens where the client was slower than the engine.
        assert number <= num_tokens < 400
        assert not is_complete
    assert watcher.ends["r4"] == (30, True)


async def test_a_stopped_choice_ends_there() -> None:
    async with LocalCluster(model_dir()) as backend:
        tokens = 0
        async for item in backend.submit(greedy("r", PROMPTS[0], num_tokens=400)):
            if isinstance(item, Conclude):
                assert item.status == 200
                break
            tokens += len(item.outputs)
            if tokens == 3:
                backend.stop("r", 0, 3)
        assert tokens < 100


async def test_draining_refuses_the_new_and_finishes_the_old(expected: list[list[int]]) -> None:
    async with LocalCluster(model_dir()) as backend:
        old = asyncio.create_task(collect(backend, greedy("old", PROMPTS[2])))
        await asyncio.sleep(0)
        draining = asyncio.create_task(backend.drain(30))
        await asyncio.sleep(0)
        tokens, refusal = await collect(backend, greedy("new", PROMPTS[0]))
        assert (tokens, refusal.status) == ([], 503)
        assert backend.status() is None
        assert await draining
        assert (await old)[0] == expected[2][:NUM_TOKENS]


async def test_draining_gives_up_in_time() -> None:
    async with LocalCluster(model_dir()) as backend:
        old = asyncio.create_task(collect(backend, greedy("old", PROMPTS[2], num_tokens=450)))
        await asyncio.sleep(0)
        assert not await backend.drain(0.05)
    _, conclude = await old
    assert conclude.status == 503


async def test_what_can_never_fit_is_refused() -> None:
    async with LocalCluster(model_dir(), kv=KvConfig(num_blocks=4)) as backend:
        tokens, refusal = await collect(backend, greedy("big", list(range(10, 90))))
        assert (tokens, refusal.status) == ([], 400)
        tokens, _ = await collect(backend, greedy("small", PROMPTS[0], num_tokens=5))
        assert len(tokens) == 5
