"""The time of one kernel on one GPU: its arithmetic and its traffic, each at a fitted share of the data sheet's peak.

Everything is vectorised over the number of tokens (or sequences), so that a whole table is one call. Knows no model.
"""

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from simulator.latency.efficiency import Efficiency
from simulator.latency.gpus import GpuSpec

Array = NDArray[np.float64]
Number = Array | float

# Queries that one block of an attention kernel works on.
_QUERY_BLOCK = 128
# Bytes of an all-reduce at which a ring takes over from exchanging everything at once, and above which an engine's
# collectives may lose bandwidth (`Efficiency.all_reduce_huge`).
_LARGE_MESSAGE = 2e6
_HUGE_MESSAGE = 64e6


@dataclass(frozen=True, slots=True)
class Cost:
    """Seconds of one kernel, with the operations and bytes its shape demands."""

    seconds: Array
    flops: Array
    bytes: Array


def gemm(
    gpu: GpuSpec,
    eff: Efficiency,
    m: Array,
    n: Number,
    k: Number,
    item: int,
    groups: Number = 1.0,
    *,
    weight_item: float | None = None,
) -> Cost:
    """``groups`` products [m, k] x [k, n] of ``item``-byte numbers in one launch.

    ``weight_item``: bytes of a number of the second matrix, if it is quantised. Such are read faster and multiplied at
    the rate of 16 bits, as by kernels that widen them first; a card's faster 8-bit arithmetic is not counted.

    Output tiles run in waves over the SMs, and a started wave takes as long as a full one: that makes odd shapes slow.
    With fewer tiles than SMs the inner dimension is split over some of the idle ones. The fastest tile counts.
    """
    flops = 2.0 * groups * m * n * k
    traffic = groups * ((m * k + m * n) * item + k * n * (weight_item or item))
    compute = np.full(np.broadcast_shapes(np.shape(m), np.shape(n)), np.inf)
    tiles = ((256, 128, 1.0), (128, 128, eff.gemm_medium), (128, 64, eff.gemm_narrow), (64, 64, eff.gemm_small))
    for tile_m, tile_n, share in tiles:
        waves = groups * np.ceil(m / tile_m) * np.ceil(n / tile_n) / gpu.num_sms
        waves = np.where(waves < 1, np.maximum(waves, 1 / (1 + eff.gemm_split)), np.ceil(waves))
        rate = gpu.flops / gpu.num_sms * eff.gemm_compute * share
        compute = np.minimum(compute, waves * (2.0 * tile_m * tile_n * (k + eff.gemm_ramp) / rate))
    memory = traffic / (gpu.memory_bandwidth * eff.gemm_memory)
    # The larger one factored out: powers of microseconds are small numbers.
    larger, smaller = np.maximum(compute, memory), np.minimum(compute, memory)
    joined = larger * (1 + (smaller / larger) ** eff.gemm_overlap) ** (1 / eff.gemm_overlap)
    return Cost(joined + eff.gemm_launch, flops, traffic)


def experts(
    gpu: GpuSpec,
    eff: Efficiency,
    tokens: Array,
    hidden: Number,
    inner: Number,
    num_experts: Number,
    per_token: Number,
    item: int,
    gates: int = 2,
    weight_item: float | None = None,
) -> Cost:
    """A layer of experts: ``tokens`` go to ``per_token`` of ``num_experts`` MLPs of ``inner`` columns each.

    Tokens choose evenly and independently of each other, so that few of them leave most experts, and their weights,
    untouched. Both products are one grouped launch each.
    """
    grouped = replace(
        eff,
        gemm_compute=eff.gemm_compute * eff.expert_compute,
        gemm_memory=eff.gemm_memory * eff.expert_memory,
        gemm_launch=0.0,
    )
    touched = -num_experts * np.expm1(tokens * np.log1p(-np.minimum(per_token / num_experts, 1 - 1e-12)))
    each = tokens * per_token / touched
    up = gemm(gpu, grouped, each, gates * inner, hidden, item, touched, weight_item=weight_item)
    down = gemm(gpu, grouped, each, hidden, inner, item, touched, weight_item=weight_item)
    inside = stream(gpu, eff, (gates + 1) * inner * item * tokens * per_token)
    return Cost(
        up.seconds + inside.seconds + down.seconds + eff.expert_launch,
        up.flops + down.flops,
        up.bytes + inside.bytes + down.bytes,
    )


def stream(gpu: GpuSpec, eff: Efficiency, traffic: Array) -> Cost:
    """A kernel that only moves ``traffic`` bytes: norms, activations, rotary embedding, sampling."""
    seconds = traffic / (gpu.memory_bandwidth * eff.stream_memory) + eff.stream_launch
    return Cost(seconds, np.zeros_like(traffic), traffic)


def prefill_attention(
    gpu: GpuSpec, eff: Efficiency, tokens: Array, pairs: Array, heads: Number, kv_heads: Number, dim: int, item: int
) -> Cost:
    """Causal attention of ``tokens`` queries over ``pairs`` (query, key) pairs. Affine in ``pairs``."""
    flops = 4.0 * heads * dim * pairs
    traffic = tokens * (2.0 * heads + 2.0 * kv_heads) * dim * item
    blocks_per_sm = tokens * heads / (_QUERY_BLOCK * gpu.num_sms)
    slowdown = 1 + eff.attention_ramp / blocks_per_sm
    seconds = flops / (gpu.flops * eff.attention_compute) * slowdown
    seconds = seconds + traffic / (gpu.memory_bandwidth * eff.attention_memory) + eff.attention_launch
    return Cost(seconds, flops, traffic)


def decode_attention(
    gpu: GpuSpec, eff: Efficiency, batch: Array, context: Array, heads: Number, kv_heads: Number, dim: int, item: int
) -> Cost:
    """One query of each of ``batch`` sequences over ``context`` cached tokens in all. Affine in ``context``."""
    flops = 4.0 * heads * dim * context
    traffic = 2.0 * kv_heads * dim * item * context
    slowdown = 1 + eff.decode_ramp / (batch * kv_heads)
    bandwidth = gpu.memory_bandwidth * eff.decode_memory
    # Where many query heads share what is read, arithmetic may take longer than reading.
    work = np.maximum(traffic / bandwidth * slowdown, flops / (gpu.flops * eff.attention_compute))
    seconds = work + eff.decode_sequence * batch * heads / bandwidth + eff.decode_launch
    return Cost(seconds, flops, traffic)


def all_reduce(bandwidth: float, eff: Efficiency, size: Array, ranks: Number) -> Cost:
    """Sum ``size`` bytes over ``ranks`` GPUs: a ring moves 2 (ranks - 1) / ranks of them through each link.

    Over PCIe the links of a node share switches and sockets, so that more ranks get less each.
    """
    traffic = 2.0 * (ranks - 1) / ranks * size
    latency = eff.all_reduce_latency + eff.all_reduce_hop * (ranks - 2)
    latency = latency + eff.all_reduce_large * size / (size + _LARGE_MESSAGE)
    rate = bandwidth * eff.all_reduce_bandwidth / (ranks / 2.0) ** eff.all_reduce_sharing
    beyond = 2.0 * (ranks - 1) / ranks * np.maximum(size - _HUGE_MESSAGE, 0.0)
    seconds = traffic / rate + beyond / bandwidth * eff.all_reduce_huge + latency
    return Cost(seconds, np.zeros_like(size), traffic)


def send(bandwidth: float, eff: Efficiency, size: Array) -> Cost:
    """Point to point: ``size`` bytes to another GPU."""
    return Cost(size / (bandwidth * eff.send_bandwidth) + eff.send_latency, np.zeros_like(size), size)
