"""The load of one run, fixed before it starts: who arrives when, with which lengths."""

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from distserve.bench.arrivals import Gamma, Times, TraceTimes
from distserve.bench.errors import WorkloadError
from distserve.bench.lengths import LengthDistribution, Lengths, factor_to_fit, scale_lengths
from distserve.bench.traces import MOONCAKE_BLOCK_TOKENS, Trace

_POOL = 100_000
"""Lengths drawn ahead for closed-loop load bounded by time alone; used again from the start beyond that."""


@dataclass(frozen=True)
class Workload:
    """Requests with their lengths, and their arrivals for open-loop load (None: closed loop).

    ``length_factor`` is what every length was multiplied by. ``prefix_blocks`` are the identities of each prompt's
    blocks of ``tokens_per_block`` tokens (before lengths were multiplied): equal ones stand for equal tokens up to the
    block's end. All arrays have one entry per request.
    """

    prompt_lens: Lengths
    output_lens: Lengths
    arrivals: Times | None
    length_factor: float = 1.0
    prefix_blocks: tuple[tuple[int, ...], ...] | None = None
    tokens_per_block: int = MOONCAKE_BLOCK_TOKENS

    def __len__(self) -> int:
        return len(self.prompt_lens)

    @property
    def block_tokens(self) -> float:
        """Tokens that one of ``prefix_blocks`` stands for, at the scaled lengths."""
        return self.tokens_per_block * self.length_factor


@dataclass(frozen=True)
class WorkloadSpec:
    """How to make a workload, at any rate.

    ``arrivals``: a random process, a trace's own times, or None for closed loop. ``trace`` gives the lengths, in its
    order and from the start again when it runs out, unless ``prompt`` or ``output`` overrule it. ``num_requests`` and
    ``duration`` (seconds of arrivals) bound it; at least one must, or the trace's end does. ``fit_context``, for a
    trace's lengths alone, scales them so that the longest prompt and output have so many tokens together; raises
    WorkloadError for others.
    """

    arrivals: Gamma | TraceTimes | None
    prompt: LengthDistribution | None
    output: LengthDistribution | None
    trace: Trace | None = None
    num_requests: int | None = None
    duration: float | None = None
    time_scale: float = 1.0
    length_scale: float = 1.0
    fit_context: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.fit_context is not None and (self.trace is None or self.prompt or self.output):
            raise WorkloadError(
                "a context is fitted by scaling the lengths of a trace; drawn lengths take a limit of their own, "
                "as in lognormal:mean=300,sigma=0.8,max=1500"
            )

    def at(self, rate: float | None) -> Workload:
        """The workload at ``rate`` requests/s (for a trace's own times: scaled to that mean rate; None: as they are).

        Raises WorkloadError for a spec that makes no requests.
        """
        arrivals = self._arrival_times(rate)
        num = len(arrivals) if arrivals is not None else (self.num_requests or _POOL)
        if not num:
            raise WorkloadError("no request arrives: raise the rate, the duration or the number of requests")
        prompts = self._lengths(0, num)
        outputs = self._lengths(1, num)
        factor = self.length_scale * self.fitting
        if factor != 1.0:
            prompts, outputs = scale_lengths(prompts, factor), scale_lengths(outputs, factor)
        blocks = self.trace.prefix_blocks if self.trace is not None and self.prompt is None else None
        if blocks is not None:
            blocks = tuple(blocks[i % len(blocks)] for i in range(num))
        return Workload(prompts, outputs, arrivals, factor, blocks)

    def _arrival_times(self, rate: float | None) -> Times | None:
        if self.arrivals is None:
            return None
        if isinstance(self.arrivals, Gamma):
            if rate is None:
                raise WorkloadError("random arrivals need a rate")
            return self.arrivals.times(np.random.default_rng((self.seed, 0)), rate, self.num_requests, self.duration)
        factor = self.time_scale if rate is None else self.arrivals.factor_for_rate(rate)
        times = self.arrivals.scaled(factor)[: self.num_requests]
        return times if self.duration is None else times[times < self.duration]

    def _lengths(self, which: int, num: int) -> Lengths:
        distribution = (self.prompt, self.output)[which]
        if distribution is not None:
            return distribution.draw(np.random.default_rng((self.seed, 1 + which)), num)
        if self.trace is None:
            raise WorkloadError(f"the {('prompt', 'output')[which]} length is missing: give it or a trace")
        lens = (self.trace.prompt_lens, self.trace.output_lens)[which]
        return np.resize(lens, num)

    @cached_property
    def fitting(self) -> float:
        """What lengths are multiplied with, beside ``length_scale``, for ``fit_context``.

        Of the whole trace, so that every rate of a sweep has the same requests.
        """
        if self.fit_context is None:
            return 1.0
        assert self.trace is not None
        # From the lengths before any rounding: both factors are applied at once, and rounded once.
        factor = factor_to_fit(self.trace.prompt_lens, self.trace.output_lens, self.fit_context, self.length_scale)
        return factor / self.length_scale
