"""What is asked and what is kept of a run: lengths, objectives, and one column for each fact of its requests.

Seconds and tokens throughout. Measured and simulated runs have the same columns and the same figures.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.fidelity_cpu.predict import Mix
from distserve.bench.lengths import Lengths, parse_lengths
from distserve.bench.workload import Workload
from distserve.core.config import SLO
from simulator.results import Timelines

Floats = NDArray[np.float64]
TARGET = 0.9
OBJECTIVES = {
    "tight TPOT": SLO(ttft=1.0, tpot=0.015, attainment=TARGET),
    "balanced": SLO(ttft=1.0, tpot=0.06, attainment=TARGET),
    "tight TTFT": SLO(ttft=0.4, tpot=0.15, attainment=TARGET),
}
WORKLOADS = {
    mix.name: mix
    for mix in (
        Mix("chat", "lognormal:mean=300,sigma=0.8,max=1500", "lognormal:mean=60,sigma=0.6,max=256"),
        Mix("summarisation", "lognormal:mean=900,sigma=0.4,max=1800", "lognormal:mean=45,sigma=0.5,max=150"),
        Mix("code", "lognormal:mean=170,sigma=0.4,max=600", "lognormal:mean=100,sigma=0.5,max=300"),
    )
}
"""Chat-like is what the other benchmarks use; long in and short out; short in and longer out, as HumanEval's 171/98."""
_DIGITS = 6
_DRAWN = 100_000


def balanced(mix: Mix, rate: float, seconds: float, seed: int) -> Workload:
    """Requests of ``mix`` whose number and lengths are what is expected of them: seeds differ in their order alone.

    Arrivals are a Poisson process given its number, which is ``rate * seconds``; lengths are equidistant quantiles,
    shuffled. Drawn freely, some dozens of requests are often a tenth more or less work than others.
    """
    num = max(round(rate * seconds), 1)
    rng = np.random.default_rng(seed)
    arrivals = np.sort(rng.random(num)) * seconds

    def shuffled(distribution: str) -> Lengths:
        drawn = parse_lengths(distribution).draw(np.random.default_rng(0), _DRAWN)
        quantiles = np.quantile(drawn, (np.arange(num) + 0.5) / num)
        return rng.permutation(np.rint(quantiles).astype(np.int64))

    return Workload(shuffled(mix.prompt_len), shuffled(mix.output_len), arrivals)


@dataclass(frozen=True)
class Requests:
    """A run's requests in order of arrival, one entry each; NaN is what did not happen.

    ``tpot`` is 0 for answers of one token, which are within any limit.
    """

    arrival: Floats
    prompt_tokens: Floats
    output_tokens: Floats
    ttft: Floats
    tpot: Floats
    latency: Floats
    ok: NDArray[np.bool_]

    @classmethod
    def measured(cls, requests: Sequence[Mapping[str, Any]]) -> "Requests":
        """From the requests of a ``distserve bench`` document; those that failed keep the lengths they asked for."""

        def column(name: str) -> Floats:
            return np.array([np.nan if r[name] is None else r[name] for r in requests], np.float64)

        ok = np.array([r["status"] == "ok" for r in requests], np.bool_)
        tpot = column("tpot")
        return cls(
            arrival=column("scheduled"),
            prompt_tokens=column("prompt_len"),
            output_tokens=column("output_len"),
            ttft=column("ttft"),
            tpot=np.where(ok & np.isnan(tpot), 0.0, tpot),
            latency=column("latency"),
            ok=ok,
        )

    @classmethod
    def simulated(cls, timelines: Timelines) -> "Requests":
        """From a simulated run."""
        return cls(
            arrival=timelines.arrival,
            prompt_tokens=timelines.prompt_tokens.astype(np.float64),
            output_tokens=timelines.output_tokens.astype(np.float64),
            ttft=timelines.ttft,
            tpot=timelines.tpot,
            latency=timelines.latency,
            ok=timelines.status == 200,
        )

    @classmethod
    def from_json(cls, columns: Mapping[str, Sequence[float | None]]) -> "Requests":
        """What :meth:`to_json` gave."""
        floats = {
            name: np.array([np.nan if value is None else value for value in values], np.float64)
            for name, values in columns.items()
            if name != "ok"
        }
        return cls(ok=np.array(columns["ok"], np.bool_), **floats)

    def to_json(self) -> dict[str, list[float | bool | None]]:
        """Columns by name, to the microsecond."""

        def plain(column: NDArray[Any]) -> list[float | bool | None]:
            if column.dtype == np.bool_:
                return [bool(value) for value in column]
            return [None if np.isnan(value) else round(float(value), _DIGITS) for value in column]

        return {name: plain(column) for name, column in vars(self).items()}

    def attainments(self, warmup: float) -> list[float]:
        """By objective, the share that was answered within its limits, of what arrived after ``warmup`` seconds."""
        kept = self.arrival >= warmup
        with np.errstate(invalid="ignore"):
            met = [self.ok & (self.ttft <= slo.ttft) & (self.tpot <= slo.tpot) for slo in OBJECTIVES.values()]
        return [float(one[kept].mean()) if kept.any() else 0.0 for one in met]

    def figures(self, warmup: float) -> dict[str, Any]:
        """Attainments and latencies of what arrived after ``warmup`` seconds; None where nothing was answered.

        ``token_latency`` is the mean of latency over output tokens.
        """
        kept = (self.arrival >= warmup) & self.ok
        several = kept & (self.output_tokens > 1)
        return {
            "attainments": self.attainments(warmup),
            "ttft_p50": _percentile(self.ttft[kept], 50),
            "ttft_p90": _percentile(self.ttft[kept], 90),
            "tpot_p50": _percentile(self.tpot[several], 50),
            "tpot_p90": _percentile(self.tpot[several], 90),
            "token_latency": float(np.mean(self.latency[kept] / self.output_tokens[kept])) if kept.any() else None,
        }


def _percentile(values: Floats, percent: float) -> float | None:
    return float(np.percentile(values, percent)) if len(values) else None
