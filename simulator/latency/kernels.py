"""The time of one kernel on one GPU: the larger of its arithmetic and its traffic, each at a fitted share of the peak.

Everything is vectorised over the number of tokens (or sequences), so that a whole table is one call. Knows no model.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from simulator.latency.efficiency import Efficiency
from simulator.latency.gpus import GpuSpec

Array = NDArray[np.float64]

_TILES = ((128, 128, 1.0), (64, 64, 0.0))


@dataclass(frozen=True, slots=True)
class Cost:
    """Seconds of one kernel, with the operations and bytes its shape demands."""

    seconds: Array
    flops: Array
    bytes: Array


def gemm(gpu: GpuSpec, eff: Efficiency, m: Array, n: int, k: int, item: int, groups: Array | float = 1.0) -> Cost:
    """``groups`` products [m, k] x [k, n] of ``item``-byte numbers in one launch.

    Output tiles run in waves over the SMs; the last wave counts as a whole one, which is what makes small and odd
    shapes slow. The faster tile is taken, and the ramp is what a tile loses to filling its pipeline along ``k``.
    """
    flops = 2.0 * groups * m * n * k
    traffic = groups * (m * k + k * n + m * n) * item
    compute = np.full(np.shape(m), np.inf)
    for tile_m, tile_n, share in _TILES:
        tiles = groups * np.ceil(m / tile_m) * np.ceil(n / tile_n)
        waves = np.ceil(tiles / gpu.num_sms)
        rate = gpu.flops / gpu.num_sms * (share or eff.gemm_small_tile) * eff.gemm_compute
        compute = np.minimum(compute, waves * 2.0 * tile_m * tile_n * (k + eff.gemm_ramp) / rate)
    seconds = np.maximum(compute, traffic / (gpu.memory_bandwidth * eff.gemm_memory)) + eff.launch
    return Cost(seconds, flops, traffic)


def stream(gpu: GpuSpec, eff: Efficiency, traffic: Array) -> Cost:
    """A kernel that only moves ``traffic`` bytes: norms, activations, rotary embedding, sampling."""
    seconds = traffic / (gpu.memory_bandwidth * eff.stream_memory) + eff.launch
    return Cost(seconds, np.zeros_like(traffic), traffic)


def prefill_attention(
    gpu: GpuSpec, eff: Efficiency, tokens: Array, pairs: Array, heads: int, kv_heads: int, dim: int, item: int
) -> Cost:
    """Causal attention of ``tokens`` queries over ``pairs`` (query, key) pairs."""
    flops = 4.0 * heads * dim * pairs
    traffic = tokens * (2 * heads + 2 * kv_heads) * dim * item
    rate = gpu.flops * eff.attention_compute * tokens / (tokens + eff.attention_ramp)
    seconds = flops / rate + traffic / (gpu.memory_bandwidth * eff.stream_memory) + eff.launch
    return Cost(seconds, flops, traffic)


def decode_attention(
    gpu: GpuSpec, eff: Efficiency, batch: Array, context: Array, heads: int, kv_heads: int, dim: int, item: int
) -> Cost:
    """One query of each of ``batch`` sequences over ``context`` cached tokens in all."""
    flops = 4.0 * heads * dim * context
    traffic = 2.0 * kv_heads * dim * item * context
    streams = batch * kv_heads
    rate = gpu.memory_bandwidth * eff.decode_memory * streams / (streams + eff.decode_ramp)
    return Cost(traffic / rate + eff.launch, flops, traffic)


def all_reduce(bandwidth: float, eff: Efficiency, size: Array, ranks: int) -> Cost:
    """Sum ``size`` bytes over ``ranks`` GPUs: a ring moves 2 (ranks - 1) / ranks of them through each link."""
    traffic = 2.0 * (ranks - 1) / ranks * size
    latency = eff.all_reduce_latency + eff.all_reduce_hop * (ranks - 1)
    return Cost(traffic / (bandwidth * eff.all_reduce_bandwidth) + latency, np.zeros_like(size), traffic)


def send(bandwidth: float, eff: Efficiency, size: Array) -> Cost:
    """Point to point: ``size`` bytes to another GPU."""
    return Cost(size / (bandwidth * eff.send_bandwidth) + eff.send_latency, np.zeros_like(size), size)
