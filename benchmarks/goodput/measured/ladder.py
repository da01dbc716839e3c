"""Which rate to measure next: a curve that brackets, for each objective, the rate at which its target is missed.

Pure: what was measured goes in, a rate comes out. A curve is the attainment of every objective by rate, in requests/s.
Expected attainment falls as the rate rises, what some dozens of requests attain scatters around it: limits are those of
the falling curve that is closest to what was measured (least squares, weighted by requests).
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from scipy.optimize import isotonic_regression

Curve = Mapping[float, Sequence[float]]
"""By rate, the share of requests that met each objective."""
Bracket = tuple[float | None, float | None]
"""Of a falling curve, the largest rate that passes and the next one, which fails; None for what there is not."""
_ROUNDING = 1e-9
_RATIO_ROUNDING = 0.02
"""What rounding rates to hundredths may add to the ratio of two."""
_FEW = 2 / 3
"""Requests/s below which a run lasts longer, to have as many requests: at 30 s of arrivals, 20."""


@dataclass(frozen=True)
class Ladder:
    """Rates from ``start``, each ``step`` times the last, between ``least`` and ``most``; brackets end at ``width``.

    Downwards a step is twice as long: little is served there. ``width``: the ratio of a rate that fails to one that
    passes at which a bracket is narrow enough.
    """

    target: float = 0.9
    start: float = 1.0
    step: float = 2**0.5
    width: float = 1.2
    least: float = 0.25
    most: float = 16.0

    def next_rate(self, curve: Curve) -> float | None:
        """The next rate of a whole curve; None when every objective is bracketed."""
        if not curve:
            return self.start
        top, bottom = max(curve), min(curve)
        if any(share >= self.target for share in curve[top]) and top < self.most:
            return self._rounded(min(top * self.step, self.most))
        num_objectives = len(curve[top])
        brackets = [bracket(curve, index, self.target) for index in range(num_objectives)]
        if any(low is None for low, _ in brackets) and bottom > self.least:
            return self._rounded(max(bottom / self.step**2, self.least))
        for low, high in brackets:
            if low is not None and high is not None and high / low > self.width:
                middle = self._rounded(math.sqrt(low * high))
                if middle not in curve:
                    return middle
        return None

    def next_challenge(self, curve: Curve, best: Sequence[float | None]) -> float | None:
        """The next rate of a curve that only counts where it beats another; None when it does no more.

        ``best``: by objective, the lowest rate at which the other one missed it (None: it missed nowhere).
        """
        for index, rate in enumerate(best):
            while rate is not None and rate in curve and curve[rate][index] >= self.target and rate < self.most:
                rate = self._rounded(min(rate * self.width, self.most))  # noqa: PLW2901  it climbs
            if rate is not None and rate not in curve:
                return rate
        return None

    def next_repetition(self, curve: Curve, brackets: Mapping[int, Bracket]) -> float | None:
        """The next rate of a curve under another seed, around the ``brackets`` that the first one found of objectives.

        A bracket that the seed moved is followed, and narrowed to what it was or to ``width``; None when each is
        measured.
        """
        for index, ends in brackets.items():
            for end in ends:
                if end is not None and end not in curve:
                    return end
            low, high = bracket(curve, index, self.target)
            if low is None and curve and min(curve) > self.least:
                return self._rounded(max(min(curve) / self.width, self.least))
            if high is None and curve and max(curve) < self.most:
                return self._rounded(min(max(curve) * self.width, self.most))
            before, after = ends
            width = max(self.width, after / before) if before is not None and after is not None else self.width
            if low is not None and high is not None and high / low > width + _RATIO_ROUNDING:
                return self._rounded(math.sqrt(low * high))
        return None

    @staticmethod
    def _rounded(rate: float) -> float:
        return round(rate, 2)


def bracket(curve: Curve, objective: int, target: float) -> Bracket:
    """What ``curve`` says of one objective."""
    low: float | None = None
    for rate, share in falling(curve, objective).items():
        if share < target - _ROUNDING:
            return low, rate
        low = rate
    return low, None


def falling(curve: Curve, objective: int) -> dict[float, float]:
    """The attainment of one objective by rate, rates ascending, as it may be if it never rises."""
    rates = sorted(curve)
    if not rates:
        return {}
    shares, weights = [curve[rate][objective] for rate in rates], [max(rate, _FEW) for rate in rates]
    fitted = isotonic_regression(shares, weights=weights, increasing=False).x
    return dict(zip(rates, fitted.tolist(), strict=True))


def goodput(curve: Curve, objective: int, target: float) -> float:
    """The rate at which the attainment falls to ``target``, on the straight line between the bracket's ends.

    0 if no rate passes; the highest rate measured if all do.
    """
    low, high = bracket(curve, objective, target)
    if low is None:
        return 0.0
    if high is None:
        return low
    shares = falling(curve, objective)
    above, below = max(shares[low], target), shares[high]
    return low + (high - low) * (above - target) / (above - below)
