"""Is a run in a steady state, or does its backlog grow for as long as it lasts?

A rate above capacity can meet an SLO on a short run: the queue has not grown long enough yet. So a probe must show,
after the warm-up, that neither the backlog nor the TTFT drifts upward.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from distserve.bench.metrics import Floats, in_flight
from distserve.bench.records import RequestRecord

_MIN_REQUESTS = 20
_BACKLOG_SIGMAS = 3.0
_BACKLOG_RATIO = 1.5
_TREND_CORRELATION = 0.5
_TREND_RATIO = 2.0


@dataclass(frozen=True)
class Stability:
    """The drift between the first and the last third of the measured arrivals.

    ``backlog_first`` and ``backlog_last``: mean requests outstanding in each. ``ttft_first`` and ``ttft_last``: median
    TTFT, ``ttft_correlation``: Spearman's, of TTFT with arrival. ``reason``: why it counts as unstable, else empty.
    """

    backlog_first: float
    backlog_last: float
    ttft_first: float | None
    ttft_last: float | None
    ttft_correlation: float | None
    reason: str = ""

    @property
    def stable(self) -> bool:
        """No upward drift was seen."""
        return not self.reason


def judge_stability(
    records: Sequence[RequestRecord], begin: float, end: float, *, cv: float = 1.0, ttft_scale: float = 0.0
) -> Stability:
    """Look for drift among the arrivals in ``[begin, end)`` seconds; ``records`` are all of the run's, ended.

    Backlog: unstable when the last third holds half as much again as the first, and the growth exceeds three standard
    deviations of a stationary backlog (Poisson's, sqrt(mean), widened by the arrivals' ``cv``). TTFT: unstable when it
    rises with arrival time (correlation above 0.5) and its median at least doubles and gains a tenth of
    ``ttft_scale`` seconds (the limit that matters). With fewer than 20 requests there is no verdict: stable.

    A queue close to capacity wanders for longer than a probe lasts, so neither error can be excluded. Over 48 s of an
    M/D/1 queue with 50 ms service (200 ms in brackets), unstable is said at 80% of capacity of 0% (8%) of runs, at 90%
    10% (20%), at 105% 83% (48%), at 110% 97% (67%), at 130% all.
    """
    third = (end - begin) / 3
    times, level = in_flight(records)
    first = _mean_level(times, level, begin, begin + third)
    last = _mean_level(times, level, end - third, end)
    inside = [r for r in records if begin <= r.scheduled < end]
    answered = [r for r in inside if r.ttft is not None]
    ttfts = np.array([r.ttft for r in answered], np.float64)
    at = np.array([r.scheduled for r in answered], np.float64)
    early, late = ttfts[at < begin + third], ttfts[at >= end - third]
    enough = len(ttfts) >= _MIN_REQUESTS and len(early) and len(late)
    ttft_first = float(np.median(early)) if enough else None
    ttft_last = float(np.median(late)) if enough else None
    correlation = _spearman(at, ttfts) if enough else None

    reason = ""
    if len(inside) >= _MIN_REQUESTS:
        growth = last - first
        noise = _BACKLOG_SIGMAS * math.sqrt(max(first, 1.0)) * max(cv, 1.0)
        if growth > noise and last > _BACKLOG_RATIO * first:
            reason = f"the backlog grows: {first:.1f} requests in the first third, {last:.1f} in the last"
        elif ttft_first is not None and ttft_last is not None and correlation is not None:
            rises = ttft_last > _TREND_RATIO * ttft_first and ttft_last - ttft_first > 0.1 * ttft_scale
            if correlation > _TREND_CORRELATION and rises:
                reason = f"TTFT grows: median {ttft_first:.3f} s in the first third, {ttft_last:.3f} s in the last"
    return Stability(first, last, ttft_first, ttft_last, correlation, reason)


def _mean_level(times: Floats, level: NDArray[np.int64], begin: float, end: float) -> float:
    """Time average over ``[begin, end)`` of the step function that is ``level[i]`` from ``times[i]`` on."""
    if end <= begin or not len(times):
        return 0.0
    edges = np.concatenate([[begin], times[(times > begin) & (times < end)], [end]])
    before = np.searchsorted(times, edges[:-1], side="right") - 1
    held = np.where(before >= 0, level[before], 0)
    return float(np.sum(held * np.diff(edges)) / (end - begin))


def _spearman(x: Floats, y: Floats) -> float | None:
    ranks = [np.argsort(np.argsort(values)).astype(np.float64) for values in (x, y)]
    return float(np.corrcoef(ranks[0], ranks[1])[0, 1])
