"""Fitted coefficients: what share of a data sheet's peaks kernels reach, and what an engine adds to a step."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Efficiency:
    """Coefficients of the kernels' formulas (:mod:`simulator.latency.kernels`): shares of a peak, and seconds."""

    gemm_compute: float = 0.75
    gemm_memory: float = 0.85
    gemm_small_tile: float = 0.6
    gemm_ramp: float = 300.0
    attention_compute: float = 0.55
    attention_ramp: float = 150.0
    decode_memory: float = 0.75
    decode_ramp: float = 8.0
    stream_memory: float = 0.75
    launch: float = 3e-6
    all_reduce_bandwidth: float = 0.7
    all_reduce_latency: float = 6e-6
    all_reduce_hop: float = 1e-6
    send_bandwidth: float = 0.8
    send_latency: float = 10e-6


@dataclass(frozen=True, slots=True)
class EngineOverhead:
    """What a serving engine adds to its kernels: seconds per step and per layer, and per sequence of the step."""

    step: float = 1e-3
    layer: float = 0.0
    sequence: float = 0.0


DEFAULT_EFFICIENCY = Efficiency()
DEFAULT_OVERHEAD = EngineOverhead()
