"""Mooncake's conversation trace in simulation: caching and counting hits pay, for both kinds of deployment."""

from pathlib import Path

import pytest

from benchmarks.prefix_caching.run import POOLS, ceilings, lru_hit_rate, plot, report, run
from distserve.bench.traces import Trace, read_trace

TRACE = Path(__file__).parents[3] / "shared/data/traces/mooncake_conversation.jsonl"

needs_trace = pytest.mark.skipif(not TRACE.exists(), reason="no trace here")


@pytest.fixture(scope="module")
def trace() -> Trace:
    return read_trace(TRACE, "mooncake").window(0.0, 150.0)


@needs_trace
@pytest.mark.parametrize("pools", POOLS)
def test_hits_and_times_to_first_token(trace: Trace, pools: str) -> None:
    none, by_load, by_hits = (
        run(trace, pools, variant, 2.0) for variant in ("none", "caching, by load", "caching, by hits")
    )
    assert none.hit_rate == none.not_pulled == 0
    assert 0 < by_load.hit_rate < by_hits.hit_rate <= lru_hit_rate(trace, None)
    assert by_hits.ttft_mean < by_load.ttft_mean < none.ttft_mean
    assert none.answered == by_load.answered == by_hits.answered == 1
    assert (by_hits.not_pulled > 0) == ("decode" in pools)
    text = report([none, by_load, by_hits], ceilings(trace), len(trace))
    assert f"{by_hits.hit_rate:.1%}" in text
    assert plot([none, by_load, by_hits]).axes


@needs_trace
def test_memory_bounds_what_can_be_hit(trace: Trace) -> None:
    rates = [lru_hit_rate(trace, capacity) for capacity in (10, 1000, None)]
    assert rates == sorted(rates)
    assert rates[0] < rates[-1]
