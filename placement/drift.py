"""Does the load that comes in still look like the one that was planned for?

Three quantities are compared: the rate of arrivals, prompt lengths and output lengths. A finding has to be both
significant (it would be chance once in ten thousand looks) and large enough to matter (a tenth), for with enough
requests every difference is significant. What was found stands until it has clearly gone (half of what mattered), so
that a quantity at the edge is not announced again and again.

Rate: the exact Poisson interval (Garwood 1936), with counts divided by the arrivals' index of dispersion, which widens
it for bursty processes. Lengths: the two-sample Kolmogorov-Smirnov test; size is judged by mean and upper percentiles.

Pure: times and lengths in, findings out.
"""

from collections.abc import Collection
from dataclasses import dataclass
from enum import StrEnum

import numpy as np
from numpy.typing import NDArray
from scipy.stats import chi2, ks_2samp

from distserve.bench.arrivals import Gamma, TraceTimes
from distserve.bench.lengths import Lengths
from distserve.bench.workload import WorkloadSpec
from placement.offered import Offered

Times = NDArray[np.float64]

_SIGNIFICANCE = 1e-4
_MARGIN = 0.1
"""Relative difference from which on a plan is worth making again; the planner's own goodput is bracketed to 4%."""
_FEWEST_LENGTHS = 50
_FEWEST_ARRIVALS = 20
_LARGEST_SAMPLE = 20_000


class Quantity(StrEnum):
    """What is compared."""

    RATE = "rate"
    PROMPT = "prompt"
    OUTPUT = "output"


@dataclass(frozen=True)
class Expected:
    """The planned load: ``rate`` requests/s, the arrivals' index of dispersion, and samples of the lengths."""

    rate: float
    dispersion: float
    prompt_lens: Lengths
    output_lens: Lengths

    @staticmethod
    def of(workload: WorkloadSpec, rate: float, window: float) -> "Expected":
        """What ``workload`` at ``rate`` should look like through a window of so many seconds."""
        prompts, outputs = Offered(workload).sample
        return Expected(rate, _dispersion(workload, rate, window), _thin(prompts), _thin(outputs))


@dataclass(frozen=True)
class Observed:
    """Arrivals within ``span`` seconds and their lengths; ``full``: the span is the whole window.

    ``output_lens`` must be of requests chosen by arrival: of those that have just ended, the short ones are too many.
    """

    span: float
    num_arrivals: int
    prompt_lens: Lengths
    output_lens: Lengths
    full: bool


@dataclass(frozen=True, slots=True)
class Finding:
    """One quantity that differs: ``is_more`` than planned or less; ``text`` says by how much."""

    quantity: Quantity
    is_more: bool
    text: str


def judge(expected: Expected, observed: Observed, standing: Collection[Finding] = ()) -> tuple[Finding, ...]:
    """What differs from the plan now, given what was said to differ before.

    An idle service is no news, and a few lengths no distribution: what was said of such a quantity stands.
    """
    stood = {(finding.quantity, finding.is_more) for finding in standing}
    kept = [finding for finding in standing if not _can_tell(finding.quantity, observed)]
    found = [_judge_rate(expected, observed, stood)] if _can_tell(Quantity.RATE, observed) else []
    for quantity, planned, seen in (
        (Quantity.PROMPT, expected.prompt_lens, observed.prompt_lens),
        (Quantity.OUTPUT, expected.output_lens, observed.output_lens),
    ):
        if _can_tell(quantity, observed):
            found.append(_judge_lengths(quantity, planned, seen, stood))
    return (*(finding for finding in found if finding is not None), *kept)


def _can_tell(quantity: Quantity, observed: Observed) -> bool:
    match quantity:
        case Quantity.RATE:
            return observed.span > 0 and observed.num_arrivals > 0
        case Quantity.PROMPT:
            return len(observed.prompt_lens) >= _FEWEST_LENGTHS
        case Quantity.OUTPUT:
            return len(observed.output_lens) >= _FEWEST_LENGTHS


def rate_interval(num_arrivals: int, span: float, dispersion: float, significance: float) -> tuple[float, float]:
    """Requests/s that ``num_arrivals`` in ``span`` seconds are compatible with (Garwood 1936, overdispersed)."""
    effective = num_arrivals / dispersion
    low = chi2.ppf(significance / 2, 2 * effective) / 2 if effective else 0.0
    high = chi2.ppf(1 - significance / 2, 2 * effective + 2) / 2
    return float(low) * dispersion / span, float(high) * dispersion / span


def _judge_rate(expected: Expected, observed: Observed, stood: set[tuple[Quantity, bool]]) -> Finding | None:
    rate = observed.num_arrivals / observed.span
    change = rate / expected.rate - 1
    low, high = rate_interval(observed.num_arrivals, observed.span, expected.dispersion, _SIGNIFICANCE)
    is_more = change > 0
    significant = (
        (low > expected.rate and observed.num_arrivals >= _FEWEST_ARRIVALS)
        if is_more
        else (high < expected.rate and observed.full)
    )
    if not _stands((Quantity.RATE, is_more), abs(change), significant, stood):
        return None
    return Finding(
        Quantity.RATE, is_more, f"{rate:.3g} requests/s arrive ({change:+.0%}), planned were {expected.rate:.3g}"
    )


def _judge_lengths(
    quantity: Quantity, planned: Lengths, seen: Lengths, stood: set[tuple[Quantity, bool]]
) -> Finding | None:
    sizes, planned_sizes = _sizes(seen), _sizes(planned)
    changes = sizes / planned_sizes - 1
    # A longer tail is more, whatever the mean: a few long prompts are what the others wait for.
    is_more = bool(changes.max() > (_MARGIN / 2 if (quantity, True) in stood else _MARGIN))
    change = float(changes.max() if is_more else -changes.min())
    significant = float(ks_2samp(planned, seen, method="asymp").pvalue) < _SIGNIFICANCE
    if not _stands((quantity, is_more), change, significant, stood):
        return None
    return Finding(
        quantity,
        is_more,
        f"{quantity}s are {_in_words(sizes)} tokens long, planned were {_in_words(planned_sizes)}",
    )


def _sizes(lens: Lengths) -> NDArray[np.float64]:
    """Mean, 90th and 99th percentile."""
    return np.array([lens.mean(), *np.percentile(lens, (90, 99))])


def _in_words(sizes: NDArray[np.float64]) -> str:
    mean, p90, p99 = sizes
    return f"{mean:.0f} (90%: {p90:.0f}, 99%: {p99:.0f})"


def _stands(what: tuple[Quantity, bool], change: float, significant: bool, stood: set[tuple[Quantity, bool]]) -> bool:
    return change > _MARGIN / 2 if what in stood else significant and change > _MARGIN


def _thin(lens: Lengths) -> Lengths:
    """At most so many of them, evenly: the test's time grows with the sample."""
    return lens[:: -(-len(lens) // _LARGEST_SAMPLE)]


def _dispersion(workload: WorkloadSpec, rate: float, window: float) -> float:
    """Variance over mean of the arrivals in ``window`` seconds: 1 for a Poisson process, cv^2 for a renewal process.

    A trace's own is measured, over as many windows as it has; its slow changes of rate count in as dispersion.
    """
    match workload.arrivals:
        case Gamma(cv):
            return max(cv**2, 0.01)
        case TraceTimes() as trace:
            times = trace.scaled(trace.factor_for_rate(rate))
            num_windows = int(times[-1] // window)
            if num_windows < 4:
                gaps = np.diff(times)
                return max(float((gaps.std() / gaps.mean()) ** 2), 1.0)
            counts = np.histogram(times, bins=num_windows, range=(0.0, num_windows * window))[0]
            return max(float(counts.var(ddof=1) / counts.mean()), 1.0)
        case _:
            return 1.0
