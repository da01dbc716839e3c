"""Goodput: the largest rate at which attainment is at the target in a steady state, by bisection over simulated rates.

Attainment is taken to fall with the rate, and the rates of one search share their random numbers, so a rate that fails
bounds all above it. The interval of a goodput comes from the intervals of attainment: it reaches down to the largest
rate whose whole interval is at the target, and up to the smallest of which no part is.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

from distserve.core.config import SLO
from placement.measure import Effort, Measurement, Runs, measure
from placement.plan import Interval

_FLOOR = 0.01
"""Below this share of the ceiling a placement counts as serving nothing."""
_STEP = 1.12
_BELOW_SERVED = 0.93
_OVERLOADED = 0.9
"""A run that served less than this share of what was offered shows its capacity."""
_MAX_PROBES = 16
_STEPS_DOWN = ((0.1, 0.94), (0.3, 0.85), (math.inf, 0.5))
"""(attainment missing, up to; step), while no rate has held; after ``_FEW`` rates only the largest step."""
_FEW = 5
_DOWN = (0.95, 0.9, 0.85, 0.78, 0.65, 0.5, 0.35, 0.2)
_UP = (1.05, 1.12, 1.25)
"""Where an interval's ends are looked for, beside the bracket: far down where attainment hardly falls with the rate.
Upwards the ceiling, which no rate exceeds, ends it."""


@dataclass(frozen=True)
class Goodput:
    """``interval`` in requests/s, ``measured`` every rate tried in ascending order.

    ``low`` is the largest rate that held and ``high`` the smallest that did not, by their estimates (``ceiling`` if
    none failed).
    """

    interval: Interval
    low: float
    high: float
    measured: tuple[Measurement, ...]
    num_before: int = 0
    """Requests simulated to know where to look."""

    @property
    def num_simulated(self) -> int:
        """Requests simulated."""
        return self.num_before + sum(measurement.num_simulated for measurement in self.measured)

    def nearest(self, rate: float) -> Measurement:
        """The measurement closest to ``rate``."""
        return min(self.measured, key=lambda measurement: abs(measurement.point.rate - rate))


def find_goodput(
    runs: Runs,
    slo: SLO,
    cv: float,
    ceiling: float,
    effort_at: Callable[[float], Effort],
    *,
    tolerance: float,
    start: float | None = None,
    floor: float = 0.0,
    with_interval: bool = False,
) -> Goodput:
    """Bracket the goodput below ``ceiling`` (requests/s) to within ``tolerance`` of itself.

    ``start`` is a guess. A goodput below ``floor`` is of no interest: one probe there may end the search (``low`` 0).
    ``with_interval`` looks on until rates that surely hold and surely fail are known close by.
    """
    measured: dict[float, Measurement] = {}
    low, high = 0.0, ceiling

    def probe(rate: float, *, surely: bool = False) -> bool:
        nonlocal low, high
        effort = effort_at(rate)
        if surely and effort.sure_requests is not None:
            effort = replace(effort, max_requests=effort.sure_requests)
        measured[rate] = measure(runs, rate, slo, cv, effort)
        holds = measured[rate].point.holds(slo.attainment)
        if holds and rate < high:
            low = max(low, rate)
        elif not holds and rate > low:
            high = min(high, rate)
        return holds

    rate = min(start if start is not None else ceiling, (1 - tolerance / 2) * ceiling)
    if 0 < floor < ceiling and not probe(floor):
        return Goodput(Interval(0.0, 0.0, floor), 0.0, floor, tuple(measured.values()))
    rate = max(rate, min(low * _STEP, high))
    while len(measured) < _MAX_PROBES:
        probe(rate)
        if high - low <= tolerance * high or high < _FLOOR * ceiling:
            break
        rate = _next(measured, low, high, slo.attainment)
    estimate = _crossing(measured, low, high, slo.attainment)
    if with_interval and low > 0:
        below, above = low, high
        for factor in _DOWN:
            if any(m.point.surely_holds(slo.attainment) for at, m in measured.items() if factor * below <= at <= below):
                break
            probe(factor * below, surely=True)
        for factor in _UP:
            if any(m.point.surely_fails(slo.attainment) for at, m in measured.items() if above <= at <= factor * above):
                break
            if factor * above >= ceiling:
                break
            probe(factor * above, surely=True)
    points = [measurement.point for measurement in measured.values()]
    fails = min((p.rate for p in points if p.surely_fails(slo.attainment) and p.rate >= estimate), default=ceiling)
    sure = max((p.rate for p in points if p.surely_holds(slo.attainment) and p.rate <= estimate), default=0.0)
    ordered = tuple(measured[rate] for rate in sorted(measured))
    return Goodput(Interval(estimate, sure, max(fails, estimate)), low, high, ordered)


def _next(measured: dict[float, Measurement], low: float, high: float, target: float) -> float:
    """Where to look next.

    While nothing held: below what the first overloaded run served, else a step down as large as what is missing. While
    nothing failed: ever larger steps up. Then between the two.
    """
    if low == 0:
        served = measured[high].throughput
        if len(measured) == 1 and 0.05 * high < served < _OVERLOADED * high:
            return _BELOW_SERVED * served
        missing = target - measured[high].point.attainment.estimate
        return high * (0.5 if len(measured) > _FEW else next(step for most, step in _STEPS_DOWN if missing < most))
    if high not in measured:
        return min(low * math.pow(_STEP, 1 << (len(measured) - 1)), (low + high) / 2)
    served = _BELOW_SERVED * measured[high].throughput
    if low * _STEP < served < _OVERLOADED * high:
        return served
    above = measured[low].point.attainment.estimate - target
    below = target - measured[high].point.attainment.estimate
    share = above / (above + below) if above + below > 0 and below > 0 else 0.5
    return low + min(max(share, 0.3), 0.7) * (high - low)


def _crossing(measured: dict[float, Measurement], low: float, high: float, target: float) -> float:
    """Where attainment crosses the target, linear between the bracket's ends."""
    if low == 0 or high not in measured:
        return low
    above = measured[low].point.attainment.estimate - target
    below = target - measured[high].point.attainment.estimate
    if below <= 0 or above < 0:
        return low
    return low + above / (above + below) * (high - low) if above + below > 0 else low
