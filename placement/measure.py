"""Attainment of one modelled deployment at one rate, in a steady state, with its interval.

Runs with different seeds are added, and lengthened, until the interval lies on one side of the target, is narrow
enough, or the budget of requests is spent; several at once, for several processes to work on. The interval is Student's
t over batch means, for requests that queue together are not independent; it is never narrower than Wilson's, which
independent requests would have.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.special import stdtrit

from distserve.bench.metrics import wilson_interval
from distserve.core.config import SLO
from placement.plan import Interval, Percentiles, RatePoint
from placement.steady import Window, measure_window
from simulator.results import Simulation

Run = Callable[[float, int, int], Simulation]
"""(rate, number of the run, requests) -> what happened. The same arguments give the same result."""

Runs = Callable[[float, Sequence[int], int], list[Simulation]]
"""(rate, numbers of the runs, requests of each) -> what happened in each, maybe side by side."""

_BATCHES = 5
_CONFIDENCE = 0.975


@dataclass(frozen=True, slots=True)
class Effort:
    """How much may be simulated at one rate.

    ``num_requests`` in each of the first runs and ``max_requests`` in all; ``min_runs`` at a time. ``half_width`` of
    the interval ends it, and so does an interval that excludes the target if ``until_decided``. ``sure_requests``, in
    place of ``max_requests``, where only a rate that surely holds or fails is of use (None: no more).
    """

    num_requests: int
    max_requests: int
    min_runs: int = 1
    half_width: float = 0.02
    until_decided: bool = True
    sure_requests: int | None = None


@dataclass(frozen=True)
class Measurement:
    """A rate's point, the last run's usage for the report, and the requests it took to simulate."""

    point: RatePoint
    last: Simulation
    num_simulated: int
    throughput: float
    """Requests/s answered within the windows: an overloaded deployment's capacity."""


def one_by_one(run: Run) -> Runs:
    """Runs that are made here, each after the one before."""
    return lambda rate, numbers, num_requests: [run(rate, number, num_requests) for number in numbers]


def measure(runs: Runs, rate: float, slo: SLO, cv: float, effort: Effort) -> Measurement:
    """Attainment at ``rate``."""
    windows: list[Window] = []
    length, spent, at_once = effort.num_requests, 0, effort.min_runs
    while True:
        simulations = runs(rate, range(len(windows), len(windows) + at_once), length)
        spent += sum(len(simulation.timelines) for simulation in simulations)
        windows += [measure_window(simulation.timelines, slo, cv) for simulation in simulations]
        point = summarise(rate, windows, slo)
        half = (point.attainment.high - point.attainment.low) / 2
        decided = point.surely_holds(slo.attainment) or point.surely_fails(slo.attainment)
        is_spent = spent + at_once * length > effort.max_requests
        if half <= effort.half_width or (effort.until_decided and decided) or is_spent:
            throughput = sum(window.throughput for window in windows) / len(windows)
            return Measurement(point, simulations[-1], spent, throughput)
        if len(windows) >= 4:
            # Many short runs would share the bias of short runs.
            length = min(length * 2, max((effort.max_requests - spent) // at_once, effort.num_requests))


def summarise(rate: float, windows: list[Window], slo: SLO) -> RatePoint:
    """Pool the windows of a rate's runs; overloaded if most of them are."""
    met = np.concatenate([window.met for window in windows])
    ttft = np.concatenate([window.ttft for window in windows])
    tpot = np.concatenate([window.tpot for window in windows])
    has_tpot = np.concatenate([window.has_tpot for window in windows])
    reasons = [window.instability for window in windows if window.instability]
    with np.errstate(invalid="ignore"):
        return RatePoint(
            rate=rate,
            attainment=_interval([window.met for window in windows]),
            ttft_attainment=float((ttft <= slo.ttft).mean()) if len(met) else 0.0,
            tpot_attainment=float((tpot <= slo.tpot).mean()) if len(met) else 0.0,
            ttft=_percentiles(ttft),
            tpot=_percentiles(tpot[has_tpot]),
            num_requests=len(met),
            num_runs=len(windows),
            instability=reasons[0] if 2 * len(reasons) > len(windows) else "",
        )


def _interval(met: list[NDArray[np.bool_]]) -> Interval:
    """95% interval of the mean over batches of consecutive requests, about equally long over all runs."""
    total = np.concatenate(met)
    if not len(total):
        return Interval(0.0, 0.0, 1.0)
    share = float(total.mean())
    size = max(len(total) // max(_BATCHES, 2 * len(met)), 1)
    means = [part.mean() for run in met for part in np.array_split(run, max(len(run) // size, 1)) if len(part)]
    low, high = wilson_interval(int(total.sum()), len(total))
    if len(means) > 1:
        half = float(stdtrit(len(means) - 1, _CONFIDENCE) * np.std(means, ddof=1) / np.sqrt(len(means)))
        low, high = min(low, share - half), max(high, share + half)
    return Interval(share, max(low, 0.0), min(high, 1.0))


def _percentiles(values: NDArray[np.float64]) -> Percentiles:
    answered = values[np.isfinite(values)]
    if not len(answered):
        nothing = float("nan")
        return Percentiles(nothing, nothing, nothing, nothing)
    p50, p90, p99 = np.percentile(answered, (50, 90, 99)).tolist()
    return Percentiles(float(answered.mean()), p50, p90, p99)
