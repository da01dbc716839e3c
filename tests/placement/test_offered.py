"""Workloads of runs: common random numbers over rates, other numbers over runs, stretches of a trace."""

import numpy as np
import pytest

from distserve.bench.arrivals import Gamma, TraceTimes
from distserve.bench.errors import WorkloadError
from distserve.bench.lengths import Fixed, Lognormal
from distserve.bench.traces import Trace
from distserve.bench.workload import WorkloadSpec
from placement.offered import Offered

SPEC = WorkloadSpec(Gamma(1.0), Lognormal(300, 1.0), Lognormal(100, 0.5))


def trace_of(num: int) -> Trace:
    rng = np.random.default_rng(5)
    return Trace(np.arange(1, num + 1), np.full(num, 7), np.cumsum(rng.exponential(0.5, num)), None)


def test_two_rates_offer_the_same_requests_denser():
    offered = Offered(SPEC)
    slow, fast = offered.at(1.0, 3, 50), offered.at(4.0, 3, 50)
    assert np.array_equal(slow.prompt_lens, fast.prompt_lens)
    assert np.allclose(slow.arrivals, 4 * fast.arrivals)


def test_runs_differ_and_repeat():
    offered = Offered(SPEC)
    assert not np.array_equal(offered.at(1.0, 0, 50).prompt_lens, offered.at(1.0, 1, 50).prompt_lens)
    assert np.array_equal(offered.at(1.0, 1, 50).arrivals, Offered(SPEC).at(1.0, 1, 50).arrivals)


def test_a_trace_offers_consecutive_requests_at_the_mean_rate():
    trace = trace_of(1000)
    offered = Offered(WorkloadSpec(TraceTimes(trace.timestamps), None, None, trace=trace))
    starts = set()
    for run in range(4):
        work = offered.at(10.0, run, 200)
        assert np.all(np.diff(work.prompt_lens) == 1)
        starts.add(int(work.prompt_lens[0]))
        first = int(work.prompt_lens[0]) - 1
        gaps = np.diff(trace.timestamps)[first : first + 199]
        assert np.allclose(np.diff(work.arrivals), gaps * offered.natural_rate / 10.0)
    assert len(starts) == 4


def test_a_stretch_begins_with_the_same_requests_however_long_it_is():
    trace = trace_of(1000)
    offered = Offered(WorkloadSpec(TraceTimes(trace.timestamps), None, None, trace=trace))
    for run in range(3):
        short, long = offered.at(10.0, run, 100), offered.at(10.0, run, 300)
        assert np.array_equal(short.prompt_lens, long.prompt_lens[:100])
        assert np.allclose(short.arrivals, long.arrivals[:100])


def test_a_stretch_is_no_longer_than_the_trace():
    trace = trace_of(100)
    offered = Offered(WorkloadSpec(TraceTimes(trace.timestamps), None, None, trace=trace))
    assert len(offered.at(10.0, 0, 500)) == 100


def test_random_arrivals_of_a_traces_lengths_start_elsewhere_each_run():
    offered = Offered(WorkloadSpec(Gamma(1.0), None, None, trace=trace_of(100)))
    assert len({int(offered.at(1.0, run, 10).prompt_lens[0]) for run in range(5)}) == 5


def test_lengths_are_scaled_by_the_whole_traces_factor():
    trace = trace_of(1000)
    offered = Offered(WorkloadSpec(TraceTimes(trace.timestamps), None, None, trace=trace, fit_context=503))
    assert all(offered.at(1.0, run, 50).length_factor == pytest.approx(503 / 1007) for run in range(3))


def test_closed_loops_are_refused():
    with pytest.raises(WorkloadError, match="closed loop"):
        Offered(WorkloadSpec(None, Fixed(1), Fixed(1))).at(1.0, 0, 10)
