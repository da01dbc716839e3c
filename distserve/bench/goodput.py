"""Goodput: the largest rate whose attainment is at the target in a steady state, found by bisection.

The search knows nothing of HTTP: ``probe`` measures one rate. It is bounded by a number of probes, and its result says
what interval was bracketed, however it ended.
"""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from distserve.bench.steady import Stability


@dataclass(frozen=True)
class Probe:
    """One rate, measured.

    ``attainment``: the share that met the SLO, or, when ``decided_early``, the most it could still have become.
    ``verdict``: a sentence. ``stability`` is None for a probe that was decided early or interrupted.
    """

    rate: float
    passed: bool
    verdict: str
    attainment: float
    decided_early: bool = False
    complete: bool = True
    """False when it was interrupted or the server died: then it decides nothing."""
    stability: Stability | None = None


@dataclass(frozen=True)
class Goodput:
    """The search's result: the goodput lies in ``[low, high)`` requests/s.

    ``low``: the largest rate that passed, 0 if none did. ``high``: the smallest that failed, None if none did.
    ``closed``: the interval is as narrow as was asked for. ``reason``: how the search ended.
    """

    low: float
    high: float | None
    closed: bool
    reason: str
    probes: tuple[Probe, ...]


async def find_goodput(
    probe: Callable[[float], Awaitable[Probe]],
    *,
    start: float,
    min_rate: float,
    max_rate: float,
    tolerance: float = 0.05,
    max_probes: int = 12,
) -> Goodput:
    """Bracket the goodput to within ``tolerance`` (relative to the upper end).

    From ``start`` the rate doubles or halves until one rate passed and one failed, then the interval is halved. A rate
    that failed bounds all above it: attainment is taken to fall with the rate.
    """
    low, high = 0.0, None
    probes: list[Probe] = []

    def result(closed: bool, reason: str) -> Goodput:
        return Goodput(low, high, closed, reason, tuple(probes))

    rate = min(max(start, min_rate), max_rate)
    while len(probes) < max_probes:
        outcome = await probe(rate)
        probes.append(outcome)
        if not outcome.complete:
            return result(False, outcome.verdict)
        if outcome.passed:
            low = rate
        else:
            high = rate
        if high is None:
            if low >= max_rate:
                return result(False, f"the SLO is still met at the highest rate allowed, {max_rate:g}/s")
            rate = min(low * 2, max_rate)
        elif low == 0:
            if high <= min_rate:
                return result(False, f"the SLO is missed even at the lowest rate allowed, {min_rate:g}/s")
            rate = max(high / 2, min_rate)
        elif high - low <= tolerance * high:
            return result(True, f"bracketed to {100 * (high - low) / high:.1f}%")
        else:
            rate = (low + high) / 2
    return result(False, f"the limit of {max_probes} probes was reached")
