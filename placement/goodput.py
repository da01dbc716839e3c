"""Goodput: the largest rate at which attainment is at the target in a steady state, by bisection over simulated rates.

Attainment is taken to fall with the rate, and the rates of one search share their random numbers, so a rate that fails
bounds all above it. The interval of a goodput comes from the intervals of attainment: it reaches down to the largest
rate whose whole interval is at the target, and up to the smallest of which no part is.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

from distserve.core.config import SLO
from placement.measure import Effort, Measurement, Run, measure
from placement.plan import Interval

_FLOOR = 0.01
"""Below this share of the ceiling a placement counts as serving nothing."""
_STEP = 1.12
_BELOW_SERVED = 0.93
_OVERLOADED = 0.9
"""A run that served less than this share of what was offered shows its capacity."""
_MAX_PROBES = 16
_DOWN = (1.0, 0.97, 0.94, 0.9, 0.8, 0.65, 0.5, 0.35, 0.2)
_UP = (1.0, 1.03, 1.06, 1.1, 1.2)
"""Where an interval is looked for, beside the bracket: far down where attainment hardly falls with the rate. Upwards
the ceiling, which no rate exceeds, ends it."""


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

    @property
    def num_simulated(self) -> int:
        """Requests simulated."""
        return sum(measurement.num_simulated for measurement in self.measured)

    def nearest(self, rate: float) -> Measurement:
        """The measurement closest to ``rate``."""
        return min(self.measured, key=lambda measurement: abs(measurement.point.rate - rate))


def find_goodput(
    run: Run,
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

    def probe(rate: float) -> bool:
        nonlocal low, high
        measured[rate] = measure(run, rate, slo, cv, effort_at(rate))
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
        for factor in _DOWN:
            if factor * low not in measured:
                probe(factor * low)
            if measured[factor * low].point.surely_holds(slo.attainment):
                break
        for factor in _UP:
            if factor * high >= ceiling:
                break
            if factor * high not in measured:
                probe(factor * high)
            if measured[factor * high].point.surely_fails(slo.attainment):
                break
    points = [measurement.point for measurement in measured.values()]
    fails = min((p.rate for p in points if p.surely_fails(slo.attainment) and p.rate >= estimate), default=ceiling)
    sure = max((p.rate for p in points if p.surely_holds(slo.attainment) and p.rate <= estimate), default=0.0)
    ordered = tuple(measured[rate] for rate in sorted(measured))
    return Goodput(Interval(estimate, sure, max(fails, estimate)), low, high, ordered)


def _next(measured: dict[float, Measurement], low: float, high: float, target: float) -> float:
    """Where to look next.

    While nothing held: below what the first overloaded run served, then ever larger steps down. While nothing failed:
    ever larger steps up. Then between the two.
    """
    if low == 0:
        served = measured[high].throughput
        if len(measured) == 1 and 0.05 * high < served < _OVERLOADED * high:
            return _BELOW_SERVED * served
        return high * (0.8 if len(measured) == 2 else 0.5)
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
