"""What of a run counts: the window between filling and draining, and whether a backlog grows within it.

An empty system serves its first requests too well, and a run's last requests see batches thin out. A rate above
capacity meets any objective for a while: so a window must show that its backlog does not grow.
"""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from distserve.core.config import SLO
from simulator.results import Floats, Timelines

_BACKLOG_SIGMAS = 3.0
_BACKLOG_RATIO = 1.5
_MIN_REQUESTS = 20


@dataclass(frozen=True)
class Window:
    """The measured requests of one run, in order of arrival. Times in seconds; NaN: not answered.

    ``tpot`` of an answer of one token is 0: it meets any limit. ``has_tpot``: answered, with two tokens or more.
    ``throughput``: requests answered per second of the window, whenever they arrived.
    """

    ttft: Floats
    tpot: Floats
    has_tpot: NDArray[np.bool_]
    met: NDArray[np.bool_]
    instability: str
    throughput: float
    begin: float
    end: float


def measure_window(timelines: Timelines, slo: SLO, cv: float = 1.0) -> Window:
    """Cut warm-up and drain by the requests' own residence: two medians of it at the start, one at the end.

    At most 30% and 15% of the arrivals' span, at least 10% and nothing. ``cv``: the arrivals' coefficient of variation.
    """
    arrival = timelines.arrival
    span = float(arrival[-1] - arrival[0]) if len(arrival) else 0.0
    latency = timelines.latency
    answered = latency[np.isfinite(latency)]
    residence = float(np.median(answered)) if len(answered) else span
    begin = float(arrival[0]) + max(0.1 * span, min(2 * residence, 0.3 * span))
    end = float(arrival[0]) + span - min(residence, 0.15 * span)
    inside = (arrival >= begin) & (arrival <= end)
    finish = timelines.finish
    is_answered = timelines.status == 200
    return Window(
        ttft=timelines.ttft[inside],
        tpot=np.where(is_answered, timelines.tpot, np.nan)[inside],
        has_tpot=(is_answered & (timelines.output_tokens > 1))[inside],
        met=timelines.meets(slo)[inside],
        instability=_growth(timelines, inside, begin, end, slo, cv),
        throughput=float(((finish >= begin) & (finish < end)).sum()) / (end - begin) if end > begin else 0.0,
        begin=begin,
        end=end,
    )


def _growth(timelines: Timelines, inside: NDArray[np.bool_], begin: float, end: float, slo: SLO, cv: float) -> str:
    """Why the backlog counts as growing, empty if it does not.

    The criterion of the backlog is that of :mod:`distserve.bench.steady`; medians of TTFT are compared with the whole
    limit. Requests that are refused or fail leave at an unknown time, soon: they are no backlog.
    """
    if int(inside.sum()) < _MIN_REQUESTS or end <= begin:
        return ""
    third = (end - begin) / 3
    stays = (timelines.status == 200) | (timelines.status == 0)
    arrive = timelines.arrival[stays]
    leave = np.where(np.isfinite(timelines.finish), timelines.finish, np.inf)[stays]
    first = _mean_level(arrive, leave, begin, begin + third)
    last = _mean_level(arrive, leave, end - third, end)
    if last - first > _BACKLOG_SIGMAS * math.sqrt(max(first, 1.0)) * max(cv, 1.0) and last > _BACKLOG_RATIO * first:
        return f"the backlog grows: {first:.0f} requests in the first third, {last:.0f} in the last"
    ttft, at = timelines.ttft, timelines.arrival
    early = ttft[inside & (at < begin + third) & np.isfinite(ttft)]
    late = ttft[inside & (at >= end - third) & np.isfinite(ttft)]
    if len(early) and len(late):
        before, after = float(np.median(early)), float(np.median(late))
        if after > 2 * before and after - before > slo.ttft:
            return f"TTFT grows: median {before:.3f} s in the first third, {after:.3f} s in the last"
    return ""


def _mean_level(arrive: Floats, leave: Floats, begin: float, end: float) -> float:
    """Mean number of requests present over ``[begin, end)``: overlap of each stay with the interval."""
    overlap = np.minimum(leave, end) - np.maximum(arrive, begin)
    return float(np.maximum(overlap, 0.0).sum() / (end - begin))
