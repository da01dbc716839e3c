"""Measuring attainment and bracketing goodput, on deployments whose answer is known."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distserve.core.config import SLO
from placement.goodput import find_goodput
from placement.measure import Effort, measure, one_by_one
from placement.steady import measure_window
from simulator.results import Simulation, Timelines

SLO_1S = SLO(1.0, 0.1)


def timelines(arrival, ttft, tpot, num_output=11):
    num = len(arrival)
    nothing = np.full(num, np.nan)
    first = arrival + ttft
    return Timelines(
        arrival=arrival,
        prompt_tokens=np.full(num, 100),
        output_tokens=np.full(num, num_output),
        prefill_start=nothing,
        prefill_end=nothing,
        first_token=first,
        migration_start=nothing,
        migration_end=nothing,
        decode_start=nothing,
        finish=first + tpot * (num_output - 1),
        status=np.full(num, 200),
        num_attempts=np.ones(num, np.int64),
        prefill_id=np.zeros(num, np.int64),
        decode_id=np.zeros(num, np.int64),
    )


def simulation(lines):
    return Simulation(lines, (), (), float(lines.arrival[-1]), 0)


def coin(threshold, softness=0.3):
    """A deployment whose requests meet the objective independently, 90% of them at ``threshold`` requests/s."""

    def run(rate, number, num_requests):
        rng = np.random.default_rng((number, num_requests))
        draws = rng.random(num_requests)
        share = 1 / (1 + np.exp(min((rate / threshold - 1) / softness * 3, 100)) / 9)
        arrival = np.cumsum(rng.exponential(1 / rate, num_requests))
        return simulation(timelines(arrival, np.where(draws < share, 0.5, 1.5), np.full(num_requests, 0.01)))

    return one_by_one(run)


def queue(service):
    """One server, first come first served, constant service: M/D/1."""

    def run(rate, number, num_requests):
        rng = np.random.default_rng((number, 1))
        arrival = np.cumsum(rng.exponential(1.0, num_requests)) / rate
        served = service * np.arange(num_requests)
        done = np.maximum.accumulate(arrival - served) + served + service
        return simulation(timelines(arrival, done - arrival, np.full(num_requests, 0.0)))

    return one_by_one(run)


@given(st.floats(0.5, 200), st.floats(0.05, 0.95))
@settings(max_examples=25, deadline=None)
def test_bisection_finds_the_rate_where_attainment_crosses(threshold, share):
    found = find_goodput(
        coin(threshold), SLO_1S, 1.0, threshold / share, lambda rate: Effort(3000, 12000), tolerance=0.02
    )
    assert found.interval.estimate == pytest.approx(threshold, rel=0.06)
    assert found.low <= found.interval.estimate <= found.high


def test_intervals_cover_the_truth_about_as_often_as_they_say():
    covered = 0
    for seed in range(20):
        run = coin(10.0)
        found = find_goodput(
            lambda rate, numbers, num, seed=seed, run=run: run(rate, [n + 100 * seed for n in numbers], num),
            SLO_1S,
            1.0,
            20.0,
            lambda rate: Effort(400, 3200, min_runs=2, half_width=0.02),
            tolerance=0.03,
            with_interval=True,
        )
        covered += found.interval.low <= 10.0 <= found.interval.high
        assert found.interval.high - found.interval.low < 4.0
    assert covered >= 17


def test_a_queue_is_followed_to_what_long_runs_attain():
    # M/D/1 with service D: P(wait <= 0.9 s) with D = 0.1 crosses 90% close below capacity, computed by a long run.
    long = queue(0.1)
    for rate in np.arange(9.0, 10.0, 0.05):
        lines = long(rate, [77], 200_000)[0].timelines
        if measure_window(lines, SLO_1S).met.mean() < 0.9:
            break
    found = find_goodput(
        queue(0.1), SLO_1S, 1.0, 10.0, lambda rate: Effort(4000, 40_000, 3, 0.02), tolerance=0.01, with_interval=True
    )
    assert found.interval.low <= rate + 0.15
    assert found.interval.high >= rate - 0.15
    assert found.interval.estimate == pytest.approx(rate, rel=0.04)


def test_a_growing_queue_fails_although_its_requests_are_in_time():
    patient = SLO(1e6, 0.1)
    overloaded = measure(queue(0.1), 11.5, patient, 1.0, Effort(2000, 4000))
    assert overloaded.point.attainment.estimate == 1.0
    assert "grows" in overloaded.point.instability
    assert not overloaded.point.holds(0.9)
    assert overloaded.throughput == pytest.approx(10.0, rel=0.05)
    assert measure(queue(0.1), 8.0, patient, 1.0, Effort(2000, 4000)).point.is_stable


def test_runs_are_added_until_the_interval_decides():
    clear = measure(coin(10.0), 5.0, SLO_1S, 1.0, Effort(300, 30_000, half_width=0.005))
    close = measure(coin(10.0), 10.1, SLO_1S, 1.0, Effort(300, 30_000, half_width=0.005))
    assert clear.num_simulated < close.num_simulated
    assert clear.point.surely_holds(0.9)
    assert close.num_simulated <= 30_000


def test_a_floor_that_fails_ends_the_search_at_once():
    found = find_goodput(coin(10.0), SLO_1S, 1.0, 100.0, lambda rate: Effort(1000, 1000), tolerance=0.05, floor=30.0)
    assert found.low == 0.0
    assert found.high == 30.0
    assert len(found.measured) == 1


def test_what_serves_nothing_has_no_goodput():
    found = find_goodput(coin(1e-6), SLO_1S, 1.0, 100.0, lambda rate: Effort(300, 300), tolerance=0.05)
    assert found.low == found.interval.estimate == 0.0


def test_the_window_leaves_out_filling_and_draining():
    arrival = np.arange(0.0, 100.0, 0.1)
    ttft = np.where((arrival < 9.5) | (arrival > 97), 5.0, 0.5)
    window = measure_window(timelines(arrival, ttft, np.full(len(arrival), 0.3)), SLO(1.0, 0.5))
    assert window.met.all()
    assert 9.5 <= window.begin < 15
    assert 85 <= window.end < 97


def test_an_interval_reaches_down_to_a_rate_that_surely_holds_however_slowly_attainment_falls():
    found = find_goodput(
        coin(10.0, softness=6.0),
        SLO_1S,
        1.0,
        12.0,
        lambda rate: Effort(400, 1600, min_runs=2, half_width=0.005),
        tolerance=0.03,
        with_interval=True,
    )
    assert 1.0 < found.interval.low < 0.75 * found.low


def ending(runs, rows, **columns):
    """``runs`` in which every request of ``rows`` (a function of the number of requests) ends as ``columns`` say."""

    def changed(rate, numbers, num_requests):
        found = []
        for run in runs(rate, numbers, num_requests):
            lines, which = run.timelines, rows(num_requests)
            new = {name: np.where(which, value, getattr(lines, name)) for name, value in columns.items()}
            found.append(simulation(replace(lines, **new)))
        return found

    return changed


@pytest.mark.parametrize(("status", "is_stable"), [(400, True), (503, True), (0, False)])
def test_refused_requests_are_no_backlog_and_those_still_under_way_are(status, is_stable):
    nothing = {"status": status, "first_token": np.nan, "finish": np.nan}
    runs = ending(queue(0.01), lambda num: np.arange(num) % 20 == 0, **nothing)
    point = measure(runs, 50.0, SLO_1S, 1.0, Effort(2000, 2000)).point
    assert point.is_stable is is_stable
    assert point.attainment.estimate == pytest.approx(0.95, abs=0.001)
    assert point.tpot_attainment == pytest.approx(0.95, abs=0.001)


def steady(tpot):
    """A deployment whose first tokens take half a second, and later ones ``tpot`` seconds each, at any rate."""

    def run(rate, number, num_requests):
        arrival = np.arange(num_requests) / rate
        return simulation(timelines(arrival, np.full(num_requests, 0.5), np.full(num_requests, tpot)))

    return one_by_one(run)


def test_answers_of_one_token_meet_any_tpot_and_are_none_of_its_percentiles():
    runs = ending(steady(0.05), lambda num: np.arange(num) % 4 < 2, output_tokens=1)
    refused = ending(runs, lambda num: np.arange(num) % 4 == 0, status=400, first_token=np.nan, finish=np.nan)
    point = measure(refused, 10.0, SLO_1S, 1.0, Effort(800, 800)).point
    assert [point.tpot.mean, point.tpot.p50, point.tpot.p99] == pytest.approx([0.05] * 3)
    assert point.tpot_attainment == point.attainment.estimate == pytest.approx(0.75, abs=0.01)
    short = measure(ending(runs, lambda num: np.ones(num, bool), output_tokens=1), 10.0, SLO_1S, 1.0, Effort(800, 800))
    assert short.point.attainment.estimate == short.point.tpot_attainment == 1.0
    assert np.isnan([short.point.tpot.mean, short.point.tpot.p50, short.point.tpot.p99]).all()
