"""What the figures mean, on records made by hand, and the verdicts on steadiness and goodput."""

import asyncio
import math
from array import array

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from distserve.bench.goodput import Goodput, Probe, find_goodput
from distserve.bench.metrics import SLO, attainment, in_flight, meets_fastgen, summarise, wilson_interval
from distserve.bench.records import RequestRecord, Status
from distserve.bench.steady import judge_stability


def record(
    scheduled: float, times: list[float], *, status: Status = Status.OK, tokens: int | None = None, prompt: int = 100
) -> RequestRecord:
    """A request whose token events arrive at ``times`` (absolute)."""
    made = RequestRecord(0, scheduled, prompt, len(times), sent=scheduled, status=status)
    made.end = times[-1] if times else scheduled + 1
    made.event_times = array("d", times)
    made.num_output_tokens = len(times) if tokens is None else tokens
    return made


def test_latencies_count_from_the_scheduled_arrival() -> None:
    one = record(10.0, [10.5, 10.6, 10.7, 10.9])
    one.sent = 10.3
    assert one.ttft == pytest.approx(0.5)
    assert one.tpot == pytest.approx(0.4 / 3)
    assert one.latency == pytest.approx(0.9)


def test_tpot_counts_tokens_not_events() -> None:
    assert record(0.0, [1.0, 2.0], tokens=11).tpot == pytest.approx(0.1)


def test_attainment_is_over_all_requests_offered() -> None:
    records = [
        record(0.0, [0.1, 0.2]),
        record(0.0, [0.1]),  # one token: TPOT is met
        record(0.0, [0.9, 1.0]),  # late
        record(0.0, [0.1, 2.0]),  # slow
        record(0.0, [0.1, 0.2], status=Status.FAILED),
        record(0.0, [], status=Status.SHED),
        record(0.0, [0.1, 0.2], status=Status.TIMEOUT),
        record(0.0, [0.1, 0.2], status=Status.CANCELLED),  # cut off by us: not counted
    ]
    summary = summarise(records, SLO(0.5, 0.5))
    assert summary.attainment is not None
    assert summary.attainment.both == pytest.approx(2 / 7)
    assert summary.attainment.ttft == pytest.approx(3 / 7)
    assert summary.attainment.tpot == pytest.approx(3 / 7)
    assert (summary.num_offered, summary.num_ok, summary.num_shed, summary.num_failed) == (7, 4, 1, 1)
    assert (summary.num_timeout, summary.num_cancelled) == (1, 1)


def test_warmup_is_sent_but_not_counted() -> None:
    records = [record(0.0, [9.0]), record(5.0, [5.1]), record(6.0, [6.1])]
    summary = summarise(records, SLO(1.0, 1.0), warmup=5.0)
    assert summary.attainment is not None
    assert (summary.num_offered, summary.num_warmup, summary.attainment.both) == (2, 1, 1.0)
    assert summary.duration == pytest.approx(1.1)


def test_percentiles_are_numpys() -> None:
    records = [record(0.0, [i / 100]) for i in range(1, 101)]
    ttft = summarise(records, None).ttft
    assert ttft.p90 == pytest.approx(np.percentile(np.arange(1, 101) / 100, 90))
    assert ttft.p50 == pytest.approx(0.505)


def test_a_run_without_any_success_has_a_summary() -> None:
    summary = summarise([record(0.0, [], status=Status.FAILED)], SLO(1, 1))
    assert summary.attainment is not None
    assert (summary.num_ok, summary.ttft.p50, summary.attainment.both) == (0, None, 0.0)
    assert summarise([], SLO(1, 1)).attainment is None


def test_fastgen_criterion() -> None:
    # 1024 prompt tokens allow 2 s to the first token; 4 tokens/s allow an average gap of 0.25 s.
    steady = [1.9 + 0.2 * i for i in range(20)]
    assert meets_fastgen(record(0.0, steady, prompt=1024), 4)
    assert not meets_fastgen(record(0.0, steady, prompt=512), 4)
    assert not meets_fastgen(record(0.0, steady, prompt=1024), 6)
    # One gap of 0.6 s after many: the average, span 16, rises to 0.2 + 0.4 * 2 / 17 = 0.247 and stays below.
    stalled = [1.9 + 0.2 * i + (0.4 if i >= 90 else 0) for i in range(100)]
    assert meets_fastgen(record(0.0, stalled, prompt=1024), 4)
    longer = [1.9 + 0.2 * i + (0.5 if i >= 90 else 0) for i in range(100)]
    assert not meets_fastgen(record(0.0, longer, prompt=1024), 4)
    # Among few gaps each counts for more: the third one's share is 1 / (1 + 15/17 + (15/17)^2) = 0.376.
    early = [1.9 + 0.2 * i + (0.12 if i >= 3 else 0) for i in range(20)]
    assert meets_fastgen(record(0.0, early, prompt=1024), 4)
    slower = [1.9 + 0.2 * i + (0.14 if i >= 3 else 0) for i in range(20)]
    assert not meets_fastgen(record(0.0, slower, prompt=1024), 4)
    assert not meets_fastgen(record(0.0, steady, prompt=1024, status=Status.FAILED), 2)


@given(st.integers(1, 2000).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_wilson_interval_holds_the_share(case: tuple[int, int]) -> None:
    successes, num = case
    low, high = wilson_interval(successes, num)
    assert 0 <= low <= successes / num + 1e-12
    assert successes / num - 1e-12 <= high <= 1


def test_wilson_interval_known_value() -> None:
    assert wilson_interval(90, 100) == pytest.approx((0.8256, 0.9448), abs=1e-4)


@given(st.lists(st.tuples(st.floats(0, 100), st.floats(0, 50)), min_size=1, max_size=60))
def test_requests_in_flight_never_go_below_zero_and_end_at_zero(spans: list[tuple[float, float]]) -> None:
    records = []
    for start, length in spans:
        one = record(start, [start + length])
        records.append(one)
    times, level = in_flight(records)
    assert level.min() >= 0
    assert level[-1] == 0
    assert np.all(np.diff(times) >= 0)


def queue(rate: float, service: float, seconds: float, seed: int) -> list[RequestRecord]:
    """M/D/1: Poisson arrivals at one server."""
    gaps = np.random.default_rng(seed).exponential(1 / rate, int(rate * seconds * 2))
    free, records = 0.0, []
    for at in np.cumsum(gaps).tolist():
        if at >= seconds:
            break
        free = max(free, at) + service
        records.append(record(at, [free]))
    return records


@pytest.mark.parametrize("seed", range(20))
def test_a_queue_below_capacity_is_stable_and_one_above_is_not(seed: int) -> None:
    below = judge_stability(queue(14.0, 0.05, 60.0, seed), 12.0, 60.0, ttft_scale=1.0)
    above = judge_stability(queue(26.0, 0.05, 60.0, seed), 12.0, 60.0, ttft_scale=1.0)
    assert below.stable, below.reason
    assert not above.stable
    assert "backlog grows" in above.reason or "TTFT grows" in above.reason


def test_a_short_run_above_capacity_may_meet_the_slo_but_is_unstable() -> None:
    records = queue(26.0, 0.05, 20.0, 1)
    share = attainment(records, SLO(10.0))
    assert share is not None
    assert share.both == 1.0
    assert not judge_stability(records, 4.0, 20.0, ttft_scale=10.0).stable


def search(truth: float, **options: float) -> Goodput:
    async def probe(rate: float) -> Probe:
        return Probe(rate, rate <= truth, "", 1.0 if rate <= truth else 0.0)

    bounds = {"start": 1.0, "min_rate": 0.01, "max_rate": 10_000.0, "tolerance": 0.05, "max_probes": 40} | options
    return asyncio.run(find_goodput(probe, **bounds))  # type: ignore[arg-type]


@given(st.floats(0.02, 5000), st.floats(0.02, 5000))
def test_bisection_brackets_the_goodput(truth: float, start: float) -> None:
    found = search(truth, start=start)
    assert found.high is not None
    assert found.low <= truth < found.high
    assert found.closed
    assert found.high - found.low <= 0.05 * found.high


def test_the_search_is_bounded_and_says_how_it_ended() -> None:
    assert (search(1e9, max_rate=8.0).high, search(1e9, max_rate=8.0).low) == (None, 8.0)
    assert "highest rate" in search(1e9, max_rate=8.0).reason
    low = search(0.001, min_rate=0.5)
    assert (low.low, low.high) == (0.0, 0.5)
    assert "lowest rate" in low.reason
    few = search(777.0, max_probes=4)
    assert len(few.probes) == 4
    assert not few.closed


def test_an_incomplete_probe_ends_the_search_and_decides_nothing() -> None:
    async def probe(rate: float) -> Probe:
        return Probe(rate, rate < 3, "interrupted", 0.5, complete=rate < 3)

    found = asyncio.run(find_goodput(probe, start=1.0, min_rate=0.1, max_rate=100.0, tolerance=0.05, max_probes=20))
    assert (found.low, found.high, found.closed, found.reason) == (2.0, None, False, "interrupted")


def test_an_slo_without_a_limit_says_so() -> None:
    assert str(SLO(0.4, math.inf)) == "TTFT 0.4 s for 90%"
    assert str(SLO(0.4, 0.04, 0.95)) == "TTFT 0.4 s and TPOT 0.04 s for 95%"
