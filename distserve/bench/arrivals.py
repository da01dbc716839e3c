"""When requests arrive: the gaps of open-loop load.

Arrivals are drawn as gaps with mean one and then divided by the rate, so that the same seed at two rates gives the
same pattern, denser or thinner: rates are compared on common random numbers.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from distserve.bench.errors import WorkloadError

Times = NDArray[np.float64]


@dataclass(frozen=True)
class Gamma:
    """Independent gamma gaps with coefficient of variation ``cv``; ``cv = 1`` is a Poisson process, 0 a metronome."""

    cv: float = 1.0

    def times(self, rng: np.random.Generator, rate: float, num: int | None, duration: float | None) -> Times:
        """Arrival times in seconds from the start, float64, ascending: at most ``num``, all before ``duration``.

        At least one of the two bounds must be given. Raises WorkloadError otherwise, or for a rate not above 0.
        """
        if not rate > 0:
            raise WorkloadError(f"the rate must be positive, not {rate}")
        if num is None and duration is None:
            raise WorkloadError("open-loop load needs a bound: a number of requests or a duration")
        if num is not None:
            times = np.cumsum(self._unit_gaps(rng, num)) / rate
        else:
            assert duration is not None
            times = np.empty(0)
            while not len(times) or times[-1] < duration:
                # Drawn in blocks of a fixed size: the numbers do not depend on the rate.
                block = np.cumsum(self._unit_gaps(rng, 1024)) / rate
                times = np.concatenate([times, block + (times[-1] if len(times) else 0.0)])
        return times if duration is None else times[times < duration]

    def _unit_gaps(self, rng: np.random.Generator, num: int) -> Times:
        if self.cv == 0:
            return np.ones(num)
        shape = 1 / self.cv**2
        return rng.gamma(shape, 1 / shape, num)


@dataclass(frozen=True)
class TraceTimes:
    """A trace's own arrival times (seconds, ascending), shifted so that the first is at zero."""

    timestamps: Times

    def scaled(self, factor: float) -> Times:
        """The times ``factor`` times as far apart: 2 halves the rate."""
        if not factor > 0:
            raise WorkloadError(f"the time scale must be positive, not {factor}")
        times: Times = (self.timestamps - self.timestamps[0]) * factor
        return times

    def factor_for_rate(self, rate: float) -> float:
        """The factor at which the trace's mean rate becomes ``rate`` requests/s."""
        if not rate > 0:
            raise WorkloadError(f"the rate must be positive, not {rate}")
        span = float(self.timestamps[-1] - self.timestamps[0])
        if len(self.timestamps) < 2 or span <= 0:
            raise WorkloadError("the trace's requests all arrive at once: it has no rate to scale")
        return (len(self.timestamps) - 1) / span / rate
