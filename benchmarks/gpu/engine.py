"""The engine against its rooflines and against transformers' continuous batching, on one card in one run.

Bounds are measured beside: a device copy for decode steps, a matrix product for prompts.
"""

import gc
import sys
from collections.abc import Callable
from dataclasses import dataclass

import torch

from benchmarks.gpu.decode import decode_bytes, decode_seconds, prefill_operations, prefill_seconds
from benchmarks.gpu.model import TINY, EngineSizes, build, make_requests, start
from benchmarks.gpu.rows import Row
from benchmarks.gpu.throughput import our_rate, transformers_rate
from benchmarks.gpu.timing import Stopwatch

_SLOWEST_DECODE = 1.35
"""Times what reading the weights and the KV takes at the bandwidth of a copy."""
_LEAST_PREFILL = 0.55
_LEAST_SPEEDUP = 2.0


@dataclass(frozen=True)
class DecodePoint:
    """A decode step of the plot: seconds measured, and what its bytes take at a copy's bandwidth."""

    batch_size: int
    context: int
    seconds: float
    roofline_seconds: float


def measure_engine(device: torch.device, *, tiny: bool, repetitions: int) -> tuple[list[Row], list[DecodePoint]]:
    """All rows and the decode curve, each reported on stderr as it is done."""
    sizes = TINY if tiny else EngineSizes()
    watch = Stopwatch(device, repetitions)
    bandwidth, rate = copy_bandwidth(sizes, watch, device), matrix_rate(sizes, watch, device)
    rows: list[Row] = []

    def add(what: str, achieved: float, ceiling: float, unit: str, against: str, wanted: float | None) -> None:
        rows.append(Row(what, achieved, ceiling, unit, against, achieved / ceiling, wanted))
        print(f"{what}: {achieved / ceiling:.2f} of {against}", file=sys.stderr, flush=True)

    module = build(sizes, device)
    requests = make_requests(sizes)
    # As ours below: once to compile and to warm up.
    transformers_rate(module, sizes, requests, tiny=tiny)
    theirs = transformers_rate(module, sizes, requests, tiny=tiny)
    _release(device)
    runner = start(module, sizes, device)
    points = []
    for batch_size in sizes.batches:
        seconds = decode_seconds(runner, sizes, batch_size, max(repetitions // 6, 1))
        num_bytes = decode_bytes(sizes, batch_size)
        points.append(DecodePoint(batch_size, sizes.context, seconds, num_bytes / bandwidth))
        wanted = 1 / _SLOWEST_DECODE if batch_size in sizes.wanted_batches else None
        what = f"decode step, batch {batch_size}, context {sizes.context}"
        add(what, num_bytes / seconds, bandwidth, "B/s", "device copy", wanted)
    prefill = prefill_operations(sizes) / prefill_seconds(runner, sizes, max(repetitions // 3, 1))
    add(f"prefill, 1 x {sizes.prompt} tokens", prefill, rate, "FLOP/s", "torch matmul", _LEAST_PREFILL)
    our_rate(runner, sizes, requests)  # once to compile for the load's shapes
    ours = our_rate(runner, sizes, requests)
    what = f"output tokens, {sizes.num_requests} requests of {sizes.prompts[0]} to {sizes.prompts[1]} tokens at once"
    add(what, ours, theirs, "tokens/s", "transformers' continuous batching", _LEAST_SPEEDUP)
    return rows, points


def copy_bandwidth(sizes: EngineSizes, watch: Stopwatch, device: torch.device) -> float:
    """Bytes read and written per second by torch's copy."""
    source, target = torch.zeros(2, sizes.ceiling_bytes // 2, dtype=torch.uint8, device=device)
    return sizes.ceiling_bytes / _seconds(watch, lambda: target.copy_(source))


def matrix_rate(sizes: EngineSizes, watch: Stopwatch, device: torch.device) -> float:
    """Floating point operations per second of torch's product of square matrices in the model's data type."""
    dtype: torch.dtype = getattr(torch, sizes.dtype)
    size = sizes.ceiling_matrix
    left, right = (torch.randn(2, size, size, device=device) / size**0.5).to(dtype)
    return 2 * size**3 / _seconds(watch, lambda: left @ right)


def _seconds(watch: Stopwatch, call: Callable[[], object]) -> float:
    return watch.compare(call, lambda: None)[0]


def _release(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
