"""The sections ``workload`` and ``cluster`` of a configuration: what may be written there, and what it means.

pydantic checks them (unknown keys refused, bandwidths positive and given); inside, everything is a frozen dataclass.
"""

import math
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from distserve.bench.arrivals import Gamma, TraceTimes
from distserve.bench.errors import WorkloadError
from distserve.bench.lengths import Fixed, LengthDistribution, Lognormal, Normal, parse_lengths
from distserve.bench.traces import FORMATS, read_trace
from distserve.bench.workload import WorkloadSpec
from distserve.core.topology import ClusterSpec
from simulator.latency.gpus import find_gpu

_LENGTH_FORMS = (
    "a number of tokens, {lognormal: {mean: 755, cv: 1, max: 2048}}, {normal: {mean: 1200, std: 360}} or "
    "lognormal:mean=755,sigma=0.8 as `distserve bench` takes it"
)

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=1, le=100_000)]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, arbitrary_types_allowed=True)


def _lengths(value: Any) -> LengthDistribution:
    """The forms a length can have.

    Raises ValueError, which pydantic reports with the key's place.
    """
    if isinstance(value, int | str) and not isinstance(value, bool):
        try:
            return parse_lengths(str(value))
        except WorkloadError as error:
            raise ValueError(str(error)) from error
    if not isinstance(value, dict) or len(value) != 1:
        raise ValueError(f"a length is {_LENGTH_FORMS}, not {value!r}")
    ((kind, given),) = value.items()
    if kind == "fixed" and isinstance(given, int) and given >= 1:
        return Fixed(given)
    spreads = {"lognormal": ("sigma", "cv"), "normal": ("std", "cv")}
    if kind not in spreads or not isinstance(given, dict):
        raise ValueError(f"a length is {_LENGTH_FORMS}, not {value!r}")
    unknown = sorted(set(given) - {"mean", "max", *spreads[kind]})
    if unknown:
        raise ValueError(f"{kind} has no {unknown[0]!r}; it has mean, {' or '.join(spreads[kind])}, and max")
    numbers: dict[str, float] = {}
    for key, number in given.items():
        if not isinstance(number, int | float) or isinstance(number, bool) or not 0 <= number < math.inf:
            raise ValueError(f"{kind}: {key} must be a number, 0 or more, not {number!r}")
        numbers[key] = float(number)
    if numbers.get("mean", 0) < 1 or numbers.get("max", 1) < 1:
        raise ValueError(f"{kind} needs a mean (and a max, if any) of at least 1 token")
    if sum(spread in numbers for spread in spreads[kind]) != 1:
        raise ValueError(f"{kind} needs one of {' and '.join(spreads[kind])}")
    maximum = int(numbers["max"]) if "max" in numbers else None
    if kind == "normal":
        return Normal(numbers["mean"], numbers.get("std", numbers.get("cv", 0) * numbers["mean"]), maximum)
    sigma = numbers["sigma"] if "sigma" in numbers else math.sqrt(math.log1p(numbers["cv"] ** 2))
    return Lognormal(numbers["mean"], sigma, maximum)


Lengths = Annotated[LengthDistribution, BeforeValidator(_lengths)]


class ArrivalsSection(_Section):
    """``workload.arrivals``: ``rate`` in requests/s, ``cv`` of the gaps (1: Poisson).

    Without ``cv`` a trace's own times are used, scaled to ``rate`` if that is given.
    """

    rate: Positive | None = None
    cv: Annotated[float, Field(ge=0, le=100)] | None = None


class WorkloadSection(_Section):
    """``workload``: lengths and arrivals as distributions, from a trace file, or mixed.

    ``fit_context`` scales a trace's lengths down, in proportion, until the longest request has so many tokens.
    """

    prompt: Lengths | None = None
    output: Lengths | None = None
    arrivals: ArrivalsSection = ArrivalsSection()
    trace: Path | None = None
    trace_format: Literal["auto", "azure", "mooncake", "sharegpt"] = "auto"
    length_scale: Positive = 1.0
    fit_context: Annotated[int, Field(ge=2)] | None = None

    @model_validator(mode="after")
    def _has_lengths(self) -> Self:
        missing = [name for name in ("prompt", "output") if getattr(self, name) is None]
        if missing and self.trace is None:
            raise ValueError(f"{' and '.join(missing)} missing: a length is {_LENGTH_FORMS}; or name a trace")
        return self

    def spec(self, base: Path) -> WorkloadSpec:
        """The workload; a trace's path is as given or, failing that, relative to ``base``.

        Raises WorkloadError for a trace that is missing, empty or malformed, with the line.
        """
        trace = None
        if self.trace is not None:
            path = self.trace if self.trace.exists() else base / self.trace
            trace = read_trace(path if path.exists() else self.trace, self.trace_format)
        own_times = trace is not None and trace.timestamps is not None and self.arrivals.cv is None
        if own_times:
            assert trace is not None
            assert trace.timestamps is not None
            arrivals: Gamma | TraceTimes = TraceTimes(trace.timestamps)
            if len(trace) < 2 or trace.timestamps[-1] <= trace.timestamps[0]:
                raise WorkloadError(
                    f"{self.trace}: its requests all arrive at once, so it has no rate: give arrivals: {{cv: 1}}"
                )
        else:
            arrivals = Gamma(1.0 if self.arrivals.cv is None else self.arrivals.cv)
        return WorkloadSpec(
            arrivals=arrivals,
            prompt=self.prompt,
            output=self.output,
            trace=trace,
            length_scale=self.length_scale,
            fit_context=self.fit_context,
        )


assert set(FORMATS) == {"azure", "mooncake", "sharegpt"}, "the section names every format"


class ClusterSection(_Section):
    """``cluster``: equal nodes of equal GPUs, bandwidths in bytes/s each way, and where the times of steps come from.

    ``intra_node_bandwidth`` is one GPU's within its node, ``inter_node_bandwidth`` one network card's. ``gpu_memory``
    (bytes) overrules the GPU table's. ``latency`` is ``analytic`` unless a ``profile`` is named.
    """

    gpu: str
    nodes: Count
    gpus_per_node: Annotated[int, Field(ge=1, le=1024)]
    intra_node_bandwidth: Positive
    inter_node_bandwidth: Positive
    nics_per_node: Annotated[int, Field(ge=1, le=1024)] = 1
    gpu_memory: Positive | None = None
    latency: Literal["analytic", "profile", "distserve-a100", "aiconfigurator"] | None = None
    profile: Path | None = None

    def spec(self) -> ClusterSpec:
        """The cluster, the GPU by its name in the table. Raises ConfigError for an unknown one, with the nearest."""
        return ClusterSpec(
            find_gpu(self.gpu).name,
            self.nodes,
            self.gpus_per_node,
            self.intra_node_bandwidth,
            self.inter_node_bandwidth,
            self.nics_per_node,
        )
