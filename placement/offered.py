"""The planned workload as the planner's runs offer it: any rate, any seed, any length.

Every placement is offered the same requests at the same seed, and the same seed at two rates is the same pattern,
denser or thinner: differences are differences of placements (common random numbers). A trace has one course only; its
seeds are stretches of it that begin at different requests, the same ones whatever a stretch's length: a shorter run is
the beginning of a longer one, unless that would end beyond the trace and so begins earlier.
"""

from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from distserve.bench.arrivals import Gamma, TraceTimes
from distserve.bench.errors import WorkloadError
from distserve.bench.lengths import Lengths, scale_lengths
from distserve.bench.traces import Trace
from distserve.bench.workload import Workload, WorkloadSpec

_SAMPLE = 20_000
_GOLDEN = 0.6180339887498949
"""Multiples of it, modulo one, spread starting points evenly over a trace however many there are."""


@dataclass(frozen=True)
class Offered:
    """Makes workloads of ``spec`` (open loop); ``seed`` is the first of the seeds."""

    spec: WorkloadSpec
    seed: int = 0

    @cached_property
    def sample(self) -> tuple[Lengths, Lengths]:
        """Prompt and output lengths by which bounds are computed: the trace's own, or a large draw."""
        trace = self.spec.trace
        work = self.at(1.0, 0, _SAMPLE if trace is None else max(len(trace), _SAMPLE))
        return work.prompt_lens, work.output_lens

    @property
    def cv(self) -> float:
        """The arrivals' coefficient of variation (a trace's own, measured)."""
        arrivals = self.spec.arrivals
        if isinstance(arrivals, TraceTimes):
            gaps = np.diff(arrivals.timestamps)
            return float(gaps.std() / gaps.mean()) if len(gaps) and gaps.mean() > 0 else 1.0
        return arrivals.cv if arrivals is not None else 1.0

    @property
    def natural_rate(self) -> float | None:
        """Requests/s of a trace's own times; None for a random process."""
        arrivals = self.spec.arrivals
        return arrivals.factor_for_rate(1.0) if isinstance(arrivals, TraceTimes) else None

    def at(self, rate: float, run: int, num_requests: int) -> Workload:
        """The ``run``-th workload at ``rate`` requests/s: ``num_requests`` of them (a trace's stretch may be shorter).

        Raises WorkloadError for closed-loop load.
        """
        if self.spec.arrivals is None:
            raise WorkloadError("a placement is planned for arrivals over time; a closed loop has none")
        spec = replace(self.spec, seed=self.seed + run, num_requests=num_requests, duration=None)
        if spec.trace is not None:
            # The factor to fit a context is that of the whole trace, whatever stretch is offered.
            spec = replace(spec, length_scale=spec.length_scale * self.spec.fitting, fit_context=None)
        if isinstance(spec.arrivals, TraceTimes):
            return self._stretch(spec, spec.arrivals, rate, run, num_requests)
        if self._has_trace_lengths:
            start = self._start(run, len(spec.trace)) if spec.trace is not None else 0
            spec = replace(spec, trace=_rolled(spec.trace, start)) if spec.trace is not None else spec
        return spec.at(rate)

    def _stretch(self, spec: WorkloadSpec, arrivals: TraceTimes, rate: float, run: int, num_requests: int) -> Workload:
        """Consecutive requests of the trace, its mean rate scaled to ``rate``: the stretch keeps its own burstiness."""
        total = len(arrivals.timestamps)
        num = min(num_requests, total)
        start = min(self._start(run, total), total - num)
        times = (arrivals.timestamps[start : start + num] - arrivals.timestamps[start]) * arrivals.factor_for_rate(rate)
        trace = spec.trace
        if trace is not None:
            blocks = trace.prefix_blocks
            part = slice(start, start + num)
            trace = Trace(
                trace.prompt_lens[part], trace.output_lens[part], times, None if blocks is None else blocks[part]
            )
        # Gaps of the Gamma process are never looked at: the times are put in place of its own.
        made = replace(spec, trace=trace, arrivals=Gamma(0.0), num_requests=num).at(1.0)
        return replace(made, arrivals=times)

    def _start(self, run: int, total: int) -> int:
        return int((self.seed + run) * _GOLDEN % 1.0 * total)

    @property
    def _has_trace_lengths(self) -> bool:
        return self.spec.trace is not None and (self.spec.prompt is None or self.spec.output is None)


@dataclass(frozen=True)
class ScaledOffered(Offered):
    """The same requests, longer or shorter."""

    prompt_factor: float = 1.0
    output_factor: float = 1.0

    def at(self, rate: float, run: int, num_requests: int) -> Workload:
        """See :class:`Offered`."""
        workload = super().at(rate, run, num_requests)
        return replace(
            workload,
            prompt_lens=scale_lengths(workload.prompt_lens, self.prompt_factor),
            output_lens=scale_lengths(workload.output_lens, self.output_factor),
        )


def _rolled(trace: Trace, start: int) -> Trace:
    """The trace's requests from ``start`` on, then those before; without times, which no longer ascend."""
    blocks = trace.prefix_blocks
    return Trace(
        np.roll(trace.prompt_lens, -start),
        np.roll(trace.output_lens, -start),
        None,
        None if blocks is None else blocks[start:] + blocks[:start],
    )
