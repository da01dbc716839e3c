"""What the records of a run amount to.

Definitions. TTFT: scheduled arrival to first token. TPOT: (last - first token) / (n - 1), of requests with two or
more tokens. ITL: the gap between two token-bearing events (with one token per event, between two tokens). Attainment:
the share of requests *offered* that met both limits: those shed, failed or timed out missed; a one-token output meets
TPOT. Requests scheduled in the warm-up, and those that we cut off ourselves (Ctrl-C), are not counted at all.

Latency distributions are over the requests that succeeded; percentiles interpolate linearly (numpy's default).
"""

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from distserve.bench.records import RequestRecord, Status

FASTGEN_PROMPT_TOKENS_PER_SECOND = 512
FASTGEN_EMA_SPAN = 16
FASTGEN_RATES = (2, 4, 6)
"""Tokens/s of DeepSpeed-FastGen's three service levels."""

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class SLO:
    """Limits in seconds (infinite: no limit), and the share of offered requests that is to meet both."""

    ttft: float = math.inf
    tpot: float = math.inf
    attainment: float = 0.9

    def __str__(self) -> str:
        limits = [
            f"{name} {limit:g} s" for name, limit in (("TTFT", self.ttft), ("TPOT", self.tpot)) if limit < math.inf
        ]
        return f"{' and '.join(limits) or 'an answer'} for {self.attainment:.0%}"


@dataclass(frozen=True)
class Distribution:
    """Seconds over a sample; all None when it is empty."""

    num: int
    mean: float | None
    p50: float | None
    p90: float | None
    p95: float | None
    p99: float | None
    max: float | None

    @staticmethod
    def of(sample: Sequence[float] | Floats) -> "Distribution":
        """Summarise ``sample``."""
        if not len(sample):
            return Distribution(0, None, None, None, None, None, None)
        values = np.asarray(sample, np.float64)
        p50, p90, p95, p99 = np.percentile(values, (50, 90, 95, 99)).tolist()
        return Distribution(len(values), float(values.mean()), p50, p90, p95, p99, float(values.max()))


@dataclass(frozen=True)
class Attainment:
    """Shares of the ``num_offered`` counted requests that met each limit, and ``both``.

    ``low`` and ``high`` bound ``both`` with 95% confidence (Wilson's score interval, requests taken as independent).
    """

    both: float
    ttft: float
    tpot: float
    low: float
    high: float
    num_offered: int


@dataclass(frozen=True)
class Summary:
    """Figures of one run; rates per second of ``duration`` (first counted arrival to last end)."""

    num_offered: int
    num_ok: int
    num_shed: int
    num_failed: int
    num_timeout: int
    num_cancelled: int
    num_warmup: int
    duration: float
    offered_rate: float
    request_throughput: float
    prompt_token_throughput: float
    output_token_throughput: float
    mean_prompt_tokens: float
    mean_output_tokens: float
    mean_output_tokens_asked: float
    mean_in_flight: float
    max_in_flight: int
    ttft: Distribution
    tpot: Distribution
    itl: Distribution
    latency: Distribution
    send_lag: Distribution
    """Scheduled arrival to sending: how far the client itself was behind. Part of every latency."""
    attainment: Attainment | None
    slo_throughput: float | None
    """Requests per second that met both limits."""
    fastgen_effective_throughput: dict[str, float]
    """Requests per second meeting DeepSpeed-FastGen's limits, by its service level in tokens/s."""
    count_sources: dict[str, int]
    errors: dict[str, int]
    """The most frequent error messages with their number."""


def counted(records: Sequence[RequestRecord], warmup: float) -> list[RequestRecord]:
    """The records that figures are about: scheduled after the warm-up and not cut off by us."""
    return [r for r in records if r.scheduled >= warmup and r.status is not Status.CANCELLED]


def attainment(records: Sequence[RequestRecord], slo: SLO) -> Attainment | None:
    """Attainment over ``records``, all of which were offered; None without any."""
    num = len(records)
    if not num:
        return None
    both = sum(record.meets(slo.ttft, slo.tpot) for record in records)
    ttft = sum(record.meets(slo.ttft, math.inf) for record in records)
    tpot = sum(record.meets(math.inf, slo.tpot) for record in records)
    low, high = wilson_interval(both, num)
    return Attainment(both / num, ttft / num, tpot / num, low, high, num)


def wilson_interval(successes: int, num: int, z: float = 1.959964) -> tuple[float, float]:
    """Wilson's score interval of a proportion; 95% by default (Wilson 1927)."""
    share = successes / num
    centre = share + z * z / (2 * num)
    spread = z * math.sqrt(share * (1 - share) / num + z * z / (4 * num * num))
    scale = 1 + z * z / num
    # The share lies within, whatever rounding does where all or none succeeded.
    return min(max((centre - spread) / scale, 0.0), share), max(min((centre + spread) / scale, 1.0), share)


def meets_fastgen(record: RequestRecord, tokens_per_second: float) -> bool:
    """DeepSpeed-FastGen's criterion of an effective request (arXiv 2401.08671, section 4).

    The first token within prompt tokens / 512 seconds, and every point of the exponential moving average (span 16) of
    the later gaps below 1 / ``tokens_per_second``. Its benchmark averages with the weights of the gaps so far scaled to
    one (pandas' ``ewm``), so that early gaps count for more than in a recursion begun at the first one.
    """
    if record.status is not Status.OK or record.ttft is None:
        return False
    if record.ttft > (record.num_prompt_tokens or record.prompt_len) / FASTGEN_PROMPT_TOKENS_PER_SECOND:
        return False
    decay = 1 - 2 / (FASTGEN_EMA_SPAN + 1)
    total = weight = 0.0
    for gap in np.diff(record.event_times).tolist():
        total, weight = gap + decay * total, 1 + decay * weight
        if total / weight >= 1 / tokens_per_second:
            return False
    return True


def in_flight(records: Sequence[RequestRecord]) -> tuple[Floats, NDArray[np.int64]]:
    """Requests outstanding over time: change times, ascending, and the number from each of them on."""
    starts = np.array([r.scheduled for r in records], np.float64)
    ends = np.array([r.end for r in records], np.float64)
    times = np.concatenate([starts, ends])
    steps = np.concatenate([np.ones(len(starts), np.int64), -np.ones(len(ends), np.int64)])
    # At equal times arrivals first, so that the number never dips below zero.
    order = np.lexsort((-steps, times))
    return times[order], np.cumsum(steps[order])


def summarise(records: Sequence[RequestRecord], slo: SLO | None, warmup: float = 0.0) -> Summary:
    """The figures of ``records`` (one run, all ended), without those scheduled before ``warmup`` seconds."""
    kept = counted(records, warmup)
    ok = [r for r in kept if r.status is Status.OK]
    begin = min((r.scheduled for r in kept), default=0.0)
    duration = max((r.end for r in kept), default=0.0) - begin
    arrivals_span = max((r.scheduled for r in kept), default=0.0) - begin
    per_second = 1 / duration if duration > 0 else 0.0
    met = attainment(kept, slo) if slo else None
    prompt_tokens = sum(r.num_prompt_tokens if r.num_prompt_tokens is not None else r.prompt_len for r in ok)
    output_tokens = sum(r.num_output_tokens for r in ok)
    times, level = in_flight(kept)
    area = float(np.sum(np.diff(times) * level[:-1])) if len(times) else 0.0
    num = max(len(ok), 1)

    def count(status: Status) -> int:
        return sum(r.status is status for r in kept)

    return Summary(
        num_offered=len(kept),
        num_ok=len(ok),
        num_shed=count(Status.SHED),
        num_failed=count(Status.FAILED),
        num_timeout=count(Status.TIMEOUT),
        num_cancelled=sum(r.status is Status.CANCELLED for r in records),
        num_warmup=sum(r.scheduled < warmup and r.status is not Status.CANCELLED for r in records),
        duration=duration,
        offered_rate=(len(kept) - 1) / arrivals_span if arrivals_span > 0 else 0.0,
        request_throughput=len(ok) * per_second,
        prompt_token_throughput=prompt_tokens * per_second,
        output_token_throughput=output_tokens * per_second,
        mean_prompt_tokens=prompt_tokens / num,
        mean_output_tokens=output_tokens / num,
        mean_output_tokens_asked=sum(r.output_len for r in ok) / num,
        mean_in_flight=area * per_second,
        max_in_flight=int(level.max(initial=0)),
        ttft=Distribution.of([r.ttft for r in ok if r.ttft is not None]),
        tpot=Distribution.of([r.tpot for r in ok if r.tpot is not None]),
        itl=Distribution.of(np.concatenate([np.diff(r.event_times) for r in ok]) if ok else []),
        latency=Distribution.of([r.latency for r in ok if r.latency is not None]),
        send_lag=Distribution.of([r.sent - r.scheduled for r in kept if not math.isnan(r.sent)]),
        attainment=met,
        slo_throughput=met.both * len(kept) * per_second if met else None,
        fastgen_effective_throughput={
            str(rate): sum(meets_fastgen(r, rate) for r in kept) * per_second for rate in FASTGEN_RATES
        },
        count_sources=_tally(r.count_source for r in ok),
        errors=_tally(r.error for r in kept if r.error),
    )


def _tally(values: Iterable[str], keep: int = 5) -> dict[str, int]:
    return dict(Counter(values).most_common(keep))
