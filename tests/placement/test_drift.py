"""Drift: what was planned is left in peace however long one looks, and what has changed is said once."""

import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distserve.bench.arrivals import Gamma, TraceTimes
from distserve.bench.lengths import Fixed, Lognormal
from distserve.bench.traces import Trace, read_trace
from distserve.bench.workload import WorkloadSpec
from placement.drift import Expected, rate_interval
from placement.watch import LoadWatch, describe

WINDOW = 120.0
RATE = 10.0
PROMPT, OUTPUT = Lognormal(300, 0.8), Lognormal(60, 0.6)


def spec(cv: float = 1.0) -> WorkloadSpec:
    return WorkloadSpec(Gamma(cv), PROMPT, OUTPUT)


def play(watch: LoadWatch, workload: WorkloadSpec, rate: float, seconds: float, start: float = 0.0) -> list[str]:
    """Let requests of ``workload`` come and be served in half a second each; what was said, every ten seconds asked."""
    made = WorkloadSpec(workload.arrivals, workload.prompt, workload.output, duration=seconds, seed=7).at(rate)
    assert made.arrivals is not None
    said, looks = [], iter(np.arange(start + 10, start + seconds, 10.0))
    due = next(looks)
    for index, time in enumerate(made.arrivals + start):
        while time > due:
            findings = watch.look(due)
            if findings is not None:
                said.append(describe(findings, WINDOW))
            due = next(looks, np.inf)
        watch.arrived(f"{start}-{index}", time, int(made.prompt_lens[index]))
        watch.ended(f"{start}-{index}", int(made.output_lens[index]), complete=True)
    return said


@pytest.mark.parametrize("cv", [0.3, 1.0, 3.0])
def test_an_hour_of_the_planned_load_passes_without_a_word(cv: float) -> None:
    watch = LoadWatch(Expected.of(spec(cv), RATE, WINDOW), WINDOW)
    assert play(watch, spec(cv), RATE, 3600) == []


@pytest.mark.parametrize(
    ("workload", "rate", "expected"),
    [
        (spec(), 14.0, "no longer holds: .* 1[1-4].* requests/s arrive .*, planned were 10"),
        (WorkloadSpec(Gamma(), Lognormal(400, 0.8), OUTPUT), RATE, "no longer holds: .* prompts are .* planned were 3"),
        (
            WorkloadSpec(Gamma(), PROMPT, Lognormal(90, 0.6)),
            RATE,
            "no longer holds: .* outputs are .* planned were [56]",
        ),
        # The same mean, another tail.
        (WorkloadSpec(Gamma(), Lognormal(300, 1.6), OUTPUT), RATE, "no longer holds: .* prompts are"),
        (spec(), 5.0, "serves more than comes in: .* planned were 10"),
    ],
)
def test_a_change_is_said_once_and_its_end_too(workload: WorkloadSpec, rate: float, expected: str) -> None:
    watch = LoadWatch(Expected.of(spec(), RATE, WINDOW), WINDOW)
    assert play(watch, spec(), RATE, 300) == []
    said = play(watch, workload, rate, 300, start=300)
    assert len(said) == 1
    assert re.search(expected, said[0]), said
    assert play(watch, spec(), RATE, 400, start=600) == ["The load is what was planned for again."]


def test_what_was_said_stands_while_too_little_comes_to_judge() -> None:
    watch = LoadWatch(Expected.of(spec(), RATE, WINDOW), WINDOW)
    assert len(play(watch, spec(), 5.0, 300)) == 1
    assert [watch.look(time) for time in np.arange(300.0, 900.0, 10.0)] == [None] * 60, "traffic has merely stopped"
    assert play(watch, spec(), RATE, 400, start=900) == ["The load is what was planned for again."]


def test_a_small_difference_is_no_news_however_sure() -> None:
    planned = WorkloadSpec(Gamma(0.1), Fixed(300), Fixed(60))
    watch = LoadWatch(Expected.of(planned, 50.0, WINDOW), WINDOW)
    slightly = WorkloadSpec(Gamma(0.1), Fixed(315), Fixed(63))
    assert play(watch, slightly, 52.0, 300) == []


def test_an_idle_service_is_no_news() -> None:
    watch = LoadWatch(Expected.of(spec(), RATE, WINDOW), WINDOW)
    assert all(watch.look(time) is None for time in range(0, 4000, 10))
    # Nor is the idle time before the first request counted against the rate.
    assert play(watch, spec(), RATE, 300, start=4000) == []


def test_outputs_under_way_do_not_make_outputs_look_short() -> None:
    planned = WorkloadSpec(Gamma(), Fixed(100), Lognormal(100, 1.0))
    watch = LoadWatch(Expected.of(planned, RATE, WINDOW), WINDOW)
    made = WorkloadSpec(Gamma(), Fixed(100), Lognormal(100, 1.0), duration=100, seed=3).at(RATE)
    assert made.arrivals is not None
    ends = made.arrivals + made.output_lens * 0.5  # a token in half a second: most are still under way
    events = sorted([(t, 0, i) for i, t in enumerate(made.arrivals)] + [(t, 1, i) for i, t in enumerate(ends)])
    for time, is_end, index in events:
        if time > 100:
            break
        if is_end:
            watch.ended(str(index), int(made.output_lens[index]), complete=True)
        else:
            watch.arrived(str(index), time, 100)
        assert watch.look(time) is None


def test_a_bursty_trace_may_burst() -> None:
    rng = np.random.default_rng(5)
    rates = np.repeat(rng.choice([4.0, 16.0], 120), 30)  # half minutes of calm and of rush
    times = np.sort(np.concatenate([second + rng.random(rng.poisson(rate)) for second, rate in enumerate(rates)]))
    trace = Trace(np.full(len(times), 300), np.full(len(times), 60), times)
    workload = WorkloadSpec(TraceTimes(times), None, None, trace=trace)
    rate = len(times) / times[-1]
    expected = Expected.of(workload, rate, WINDOW)
    assert expected.dispersion > 3
    watch = LoadWatch(expected, WINDOW)
    for index, time in enumerate(times):
        watch.arrived(str(index), float(time), 300)
        watch.ended(str(index), 60, complete=True)
        if index % 50 == 0:
            findings = watch.look(float(time)) or ()
            assert not any(finding.is_more for finding in findings), findings


@given(st.integers(0, 500), st.floats(0.1, 1000), st.floats(0.05, 20), st.floats(1e-5, 0.3))
def test_the_interval_holds_the_estimate_and_grows_with_dispersion(
    num: int, span: float, dispersion: float, significance: float
) -> None:
    low, high = rate_interval(num, span, dispersion, significance)
    assert low <= num / span <= high
    wider = rate_interval(num, span, dispersion * 1.5, significance)
    assert wider[0] <= low + 1e-9
    assert wider[1] >= high - 1e-9


@settings(max_examples=20)
@given(st.integers(0, 2**32 - 1))
def test_the_interval_is_of_the_level_it_says(seed: int) -> None:
    rng = np.random.default_rng(seed)
    counts = rng.poisson(30.0, 400)
    outside = sum(not low <= 3.0 <= high for low, high in (rate_interval(int(n), 10.0, 1.0, 0.1) for n in counts))
    # At most a tenth, and 4 standard deviations.
    assert outside <= 40 + 4 * 6


def test_what_was_observed_is_a_trace_the_planner_reads(tmp_path: Path) -> None:
    watch = LoadWatch(Expected.of(spec(), RATE, WINDOW), WINDOW)
    for index in range(30):
        watch.arrived(str(index), 1.7e9 + index * 0.25, 100 + index)
        if index < 25:
            watch.ended(str(index), 10 + index, complete=index != 3)
    watch.ended("unknown", 5, complete=True)
    assert watch.write_trace(tmp_path / "observed.csv", 1.7e9 + 10) == 30
    trace = read_trace(tmp_path / "observed.csv")
    assert trace.timestamps is not None
    np.testing.assert_allclose(trace.timestamps, np.arange(30) * 0.25, atol=1e-5)
    assert trace.prompt_lens.tolist() == [100 + index for index in range(30)]
    assert trace.output_lens[:3].tolist() == [10, 11, 12]
    # One that was cut off and those still under way are as long as others were.
    served = {10 + index for index in range(25) if index != 3}
    assert set(trace.output_lens.tolist()) <= served


def test_longer_prompts_stand_until_they_are_clearly_shorter() -> None:
    def prompts_of(tokens: int) -> WorkloadSpec:
        return WorkloadSpec(Gamma(), Fixed(tokens), Fixed(60))

    watch = LoadWatch(Expected.of(prompts_of(300), RATE, WINDOW), WINDOW)
    assert len(play(watch, prompts_of(336), RATE, 300)) == 1
    assert play(watch, prompts_of(324), RATE, 300, start=300) == [], "8% more: neither news nor over"
    assert play(watch, prompts_of(300), RATE, 400, start=600) == ["The load is what was planned for again."]
