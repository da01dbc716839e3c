"""Fitted coefficients: the share of a data sheet's peaks that kernels reach, and what an engine adds to a step.

The numbers are in ``coefficients.toml`` beside this file; ``benchmarks/latency_models/fit.py`` writes it from public
measurements and says there which. They are ours: no measurement is copied.
"""

import tomllib
from dataclasses import dataclass, fields, replace
from functools import cache
from pathlib import Path
from typing import Any

from distserve.core.errors import ConfigError

COEFFICIENTS = Path(__file__).with_name("coefficients.toml")


@dataclass(frozen=True, slots=True)
class Efficiency:
    """Coefficients of the formulas in :mod:`simulator.latency.kernels`: shares of a peak, and seconds.

    Attributes:
        gemm_compute: Share of the arithmetic peak a matrix product reaches on full 256 x 128 tiles.
        gemm_medium: The same on 128 x 128 tiles, relative to it; ``gemm_narrow`` 128 x 64, ``gemm_small`` 64 x 64.
        gemm_narrow: See ``gemm_medium``.
        gemm_small: See ``gemm_medium``.
        gemm_ramp: Steps along the inner dimension that a tile loses to filling and draining its pipeline.
        gemm_split: How many SMs beyond the first a tile is spread over when there are fewer tiles than SMs.
        gemm_memory: Share of memory bandwidth a product reaches that is bound by it.
        gemm_overlap: Exponent of the norm that joins arithmetic and traffic: 1 their sum, infinity the larger.
        gemm_launch: Seconds of a product beside that.
        expert_compute: Share of ``gemm_compute`` that the grouped products of a layer of experts reach.
        expert_memory: Share of ``gemm_memory`` that they reach.
        expert_launch: Seconds of such a layer beside that: sorting tokens by expert, and adding the experts up.
        attention_compute: Share of the arithmetic peak that causal attention reaches.
        attention_ramp: Blocks of 128 queries and one head, per SM, at which it reaches half of that.
        attention_memory: Share of memory bandwidth for its queries, new keys and values and outputs.
        attention_launch: Seconds beside that.
        decode_memory: Share of memory bandwidth that paged decode attention reaches.
        decode_ramp: Sequences times KV heads at which it reaches half of that.
        decode_sequence: Bytes per sequence and query head beside the cache: queries, outputs, partial results.
        decode_launch: Seconds beside that.
        mixed_decode: How many times as long the decodes' attention takes in a step that has prompts too.
        stream_memory: Share of memory bandwidth of kernels that only move data.
        stream_launch: Seconds beside that.
        all_reduce_bandwidth: Share of a link's bandwidth that an all-reduce of two ranks reaches.
        all_reduce_latency: Seconds of the smallest all-reduce of two ranks, ``all_reduce_hop`` of each rank more.
        all_reduce_hop: See ``all_reduce_latency``.
        all_reduce_large: Seconds more of a large one: its ring is slower to start than the exchange of small ones.
        all_reduce_huge: How many times as long as at the link's full bandwidth each byte beyond 64 MB takes on top; an
            engine's (:class:`Engine`), nil in the kernels' own tables.
        all_reduce_sharing: Exponent by which pairs of ranks share that bandwidth; 0 where each has links of its own.
        send_bandwidth: Share of a link's bandwidth between two GPUs.
        send_latency: Seconds beside that.
    """

    gemm_compute: float
    gemm_medium: float
    gemm_narrow: float
    gemm_small: float
    gemm_ramp: float
    gemm_split: float
    gemm_memory: float
    gemm_overlap: float
    gemm_launch: float
    expert_compute: float
    expert_memory: float
    expert_launch: float
    attention_compute: float
    attention_ramp: float
    attention_memory: float
    attention_launch: float
    decode_memory: float
    decode_ramp: float
    decode_sequence: float
    decode_launch: float
    mixed_decode: float
    stream_memory: float
    stream_launch: float
    all_reduce_bandwidth: float
    all_reduce_latency: float
    all_reduce_hop: float
    all_reduce_large: float
    all_reduce_sharing: float
    send_bandwidth: float
    send_latency: float
    all_reduce_huge: float = 0.0


@dataclass(frozen=True, slots=True)
class Engine:
    """What a serving engine makes of the kernels: its host's work, and kernels slower or faster than the ones fitted.

    A step takes ``step`` + ``sequence`` for each sequence + per layer ``layer`` and the kernels' time, but no less than
    ``host_prefill`` (``host_decode`` in a step without prompts) per layer: the host launches them one by one. With CUDA
    graphs that floor is nil. All in seconds of one core of the machine it was measured on; :meth:`on_host` moves it.

    ``compute``, ``memory``, ``attention``, ``stream`` and ``link`` divide the time of products bound by arithmetic, of
    those bound by memory, of prompts' and
    of decodes' (``paged``) attention, of kernels that only move data, and of collectives'
    bytes; ``link_latency`` is in addition to what a collective takes, ``link_huge`` for each byte beyond 64 MB of one.
    """

    step: float = 0.0
    sequence: float = 0.0
    layer: float = 0.0
    host_prefill: float = 0.0
    host_decode: float = 0.0
    compute: float = 1.0
    memory: float = 1.0
    attention: float = 1.0
    paged: float = 1.0
    stream: float = 1.0
    link: float = 1.0
    link_latency: float = 0.0
    link_huge: float = 0.0

    def on_host(self, speed: float) -> "Engine":
        """The engine where one core of the host is ``speed`` times as fast: the machine's property, not its GPUs'."""
        return replace(
            self,
            step=self.step / speed,
            sequence=self.sequence / speed,
            layer=self.layer / speed,
            host_prefill=self.host_prefill / speed,
            host_decode=self.host_decode / speed,
        )

    def applied(self, efficiency: Efficiency) -> Efficiency:
        """The coefficients of this engine's kernels."""
        return replace(
            efficiency,
            gemm_compute=efficiency.gemm_compute * self.compute,
            gemm_memory=efficiency.gemm_memory * self.memory,
            attention_compute=efficiency.attention_compute * self.attention,
            decode_memory=efficiency.decode_memory * self.paged,
            stream_memory=efficiency.stream_memory * self.stream,
            stream_launch=efficiency.stream_launch / self.stream,
            all_reduce_bandwidth=efficiency.all_reduce_bandwidth * self.link,
            all_reduce_latency=efficiency.all_reduce_latency + self.link_latency,
            all_reduce_huge=efficiency.all_reduce_huge + self.link_huge,
        )


@cache
def _read() -> dict[str, Any]:
    with COEFFICIENTS.open("rb") as file:
        return tomllib.load(file)


def kernels_of(name: str) -> Efficiency:
    """The coefficients fitted on the card ``name`` (:attr:`GpuSpec.kernels`); ``default``: of all cards together."""
    return Efficiency(**_read()["kernels"][name])


def find_engine(name: str) -> Engine:
    """The engine called ``name``. Raises ConfigError that names the known ones."""
    engines = _read()["engines"]
    if name not in engines:
        raise ConfigError(f"unknown engine {name!r} for the analytic latency model. Known: {', '.join(engines)}")
    known = {field.name for field in fields(Engine)}
    return Engine(**{key: value for key, value in engines[name].items() if key in known})
