"""What an instance reports of how long its steps take, also where these overlap."""

import pytest

from distserve.core.config import KvConfig, Role, SchedulerConfig
from distserve.core.messages import Report
from distserve.core.mixed import MixedScheduler
from distserve.core.prefill import PrefillScheduler
from distserve.core.topology import InstanceSpec
from tests.core.bench_instance import Bench
from tests.core.harness import make_request

KV = KvConfig(1000, 4)
BUDGET, STEP = 100, 0.1
LONG = 22
"""Seed of an answer of 23 tokens."""


def prefill_bench(in_flight: int, *, lookahead: bool) -> Bench:
    config = SchedulerConfig(
        max_batch_tokens=BUDGET, max_in_flight=in_flight, lookahead=lookahead, prefix_caching=False
    )
    return Bench(PrefillScheduler(InstanceSpec("prefill-0", Role.PREFILL, KV, config)))


def mixed_bench(in_flight: int, *, lookahead: bool) -> Bench:
    config = SchedulerConfig(
        max_batch_tokens=BUDGET, max_in_flight=in_flight, lookahead=lookahead, headroom=0.0, prefix_caching=False
    )
    return Bench(MixedScheduler(InstanceSpec("mixed-0", Role.MIXED, KV, config)))


def last_report(bench: Bench) -> Report:
    bench.tick(bench.scheduler.spec.scheduler.heartbeat)
    return [message for _, message in bench.sent if isinstance(message, Report)][-1]


@pytest.mark.parametrize("lookahead", [False, True])
@pytest.mark.parametrize("in_flight", [1, 2, 4])
def test_rates_of_prompts_are_those_of_steps_that_end_one_after_another(in_flight: int, lookahead: bool) -> None:
    """However many are under way at once: a step's time counts once, not once for every step beside it."""
    bench = prefill_bench(in_flight, lookahead=lookahead)
    for number in range(12):
        bench.submit(make_request(f"r{number}", BUDGET))
    for _ in range(12):
        assert bench.finish_step(STEP).chunks
    report = last_report(bench)
    assert report.prefill_rate == pytest.approx(BUDGET / STEP)
    assert report.prompt_rate == pytest.approx(BUDGET / STEP, rel=0.02)  # the token that samples is not counted


def test_a_token_of_a_pipeline_comes_after_all_its_stages() -> None:
    """Two batches in two stages: each is back after two steps' time, whatever ends between."""
    bench = mixed_bench(2, lookahead=False)
    for name in ("a", "b"):
        bench.submit(make_request(name, BUDGET, seed=LONG, max_tokens=20))
    for _ in range(8):
        bench.finish_step(STEP)
    assert last_report(bench).step_seconds == pytest.approx(2 * STEP)


def test_a_step_that_was_queued_takes_what_it_takes_once_started() -> None:
    bench = mixed_bench(2, lookahead=True)
    bench.submit(make_request("a", BUDGET, seed=LONG, max_tokens=20))
    bench.finish_step(STEP)
    for _ in range(6):
        bench.finish_step(STEP / 10)
    assert last_report(bench).step_seconds == pytest.approx(STEP / 10)


@pytest.mark.parametrize("lookahead", [False, True])
def test_a_prompt_token_costs_what_it_adds_to_a_step(lookahead: bool) -> None:
    bench = mixed_bench(1 + lookahead, lookahead=lookahead)
    bench.submit(make_request("a", BUDGET, seed=LONG, max_tokens=20))
    bench.finish_step(STEP)
    for number in range(18):
        if number % 4 == 0:
            bench.submit(make_request(f"r{number}", BUDGET - 10, max_tokens=1))
        step = bench.launched[0][0]
        bench.finish_step(0.01 + 0.001 * sum(chunk.num_tokens for chunk in step.chunks if chunk.num_tokens > 1))
    report = last_report(bench)
    assert report.step_seconds == pytest.approx(0.01)
    assert report.prompt_seconds == pytest.approx(0.001, rel=0.15)
