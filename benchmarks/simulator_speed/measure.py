"""One core simulates two traces, in the sources that are on the path: how fast, and where the time goes.

Run by ``run.py``, in the folder of the sources to be measured. Prints JSON.
"""

import argparse
import cProfile
import json
import pstats
import resource
import time
from pathlib import Path
from typing import Any

import numpy as np

from distserve.bench.arrivals import TraceTimes
from distserve.bench.traces import Trace, read_trace
from distserve.bench.workload import Workload, WorkloadSpec
from distserve.core.config import InstanceSpec, KvConfig, ParallelConfig, Role, SchedulerConfig
from distserve.core.latency import StepTime
from distserve.core.topology import ClusterSpec, Gpu
from simulator.latency.analytic import AnalyticModel
from simulator.latency.distserve_profile import DistServeProfile
from simulator.latency.shape import ModelShape
from simulator.model import ClusterModel, InstanceModel, KvGeometry
from simulator.simulation import simulate

NUM_EACH = 4
OPT_KV_TOKENS = 66_144
"""KV capacity of OPT-13B on one A100-80G, as DistServe's profile states it."""
LLAMA = {
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
    "torch_dtype": "bfloat16",
}


def deployment(step_time: StepTime, kv: KvConfig, geometry: KvGeometry, max_len: int, batch: int) -> ClusterModel:
    """4 prefill and 4 decode instances on the eight GPUs of one node."""
    instances = tuple(
        InstanceModel(
            InstanceSpec(
                f"{role}-{index}",
                role,
                kv,
                SchedulerConfig(max_batch_tokens=batch, max_batch_size=256, max_model_len=max_len),
            ),
            step_time,
            (Gpu(0, index + NUM_EACH * (role is Role.DECODE)),),
        )
        for role in (Role.PREFILL, Role.DECODE)
        for index in range(NUM_EACH)
    )
    return ClusterModel(instances, ClusterSpec("a100-80g-sxm", 1, 2 * NUM_EACH, 300e9, 25e9), geometry)


def cases(data: Path, fits: Path) -> dict[str, tuple[ClusterModel, Trace]]:
    """What is simulated, by name."""
    opt = DistServeProfile.load(fits, "facebook/opt-13b").step_time(ParallelConfig())
    azure = deployment(opt, KvConfig(OPT_KV_TOKENS // 16), KvGeometry(40, 40, 512), 16_384, 2048)
    llama = ModelShape.from_config(LLAMA, name="llama-3.1-8b")
    node = ClusterSpec("h200", 1, 2 * NUM_EACH, 450e9, 50e9)
    analytic = AnalyticModel(llama, node).step_time(ParallelConfig())
    mooncake = deployment(analytic, KvConfig(850_000 // 16), llama.kv, 200_000, 8192)
    return {
        "azure": (azure, read_trace(data / "azure2023_conv.csv")),
        "mooncake": (mooncake, read_trace(data / "mooncake_conversation.jsonl")),
    }


def replay(trace: Trace, rate: float | None, num_requests: int | None = None) -> Workload:
    """The trace, or its first requests, sped up to ``rate`` requests/s; at its own rate by default."""
    assert trace.timestamps is not None
    return WorkloadSpec(TraceTimes(trace.timestamps), None, None, trace, num_requests=num_requests).at(rate)


def sustained(model: ClusterModel, trace: Trace) -> float:
    """The highest rate (requests/s, to 3%) at which waits do not grow over a quarter of the trace.

    The median TTFT of its last fifth is at most twice that of its first.
    """
    low, high = 1.0, 64.0
    while high / low > 1.03:
        rate = (low * high) ** 0.5
        ttft = simulate(model, replay(trace, rate, len(trace) // 4)).timelines.ttft
        fifth = len(ttft) // 5
        is_stable = np.nanmedian(ttft[-fifth:]) <= 2 * np.nanmedian(ttft[:fifth])
        low, high = (rate, high) if is_stable else (low, rate)
    return low


def measure(model: ClusterModel, trace: Trace, rate: float | None) -> dict[str, Any]:
    """One run over the whole trace, in seconds of processor time."""
    workload = replay(trace, rate)
    assert workload.arrivals is not None
    begin = time.process_time()
    result = simulate(model, workload)
    seconds = time.process_time() - begin
    busy = {
        role: float(np.mean([usage.busy / result.duration for usage in result.instances if usage.role is role]))
        for role in (Role.PREFILL, Role.DECODE)
    }
    return {
        "requests": len(workload),
        "rate": rate or len(workload) / float(workload.arrivals[-1]),
        "requests_per_second": len(workload) / seconds,
        "events_per_request": result.num_events / len(workload),
        "answered": float((result.timelines.status == 200).mean()),
        "prefill_busy": busy[Role.PREFILL],
        "decode_busy": busy[Role.DECODE],
        "decode_batch": float(np.mean([u.mean_batch for u in result.instances if u.role is Role.DECODE])),
        "peak_kv": max(u.peak_kv_blocks / u.num_kv_blocks for u in result.instances),
        "peak_rss_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3,
    }


def max_of(repeats: int, model: ClusterModel, trace: Trace, rate: float | None) -> dict[str, Any]:
    """The fastest of several runs: what else the machine does only ever slows one down."""
    return max((measure(model, trace, rate) for _ in range(repeats)), key=lambda row: row["requests_per_second"])


def profile(model: ClusterModel, trace: Trace, rate: float) -> str:
    """The functions that take the most time, over 3,000 requests."""
    workload = replay(trace, rate, 3000)
    profiler = cProfile.Profile()
    profiler.runcall(simulate, model, workload)
    stats = pstats.Stats(profiler).stats  # type: ignore[attr-defined]  # typeshed leaves it out
    total = sum(own for _, _, own, _, _ in stats.values())
    lines = ["| share of time | calls a request | function |", "|---|---|---|"]
    for (file, _, name), (_, calls, own, _, _) in sorted(stats.items(), key=lambda item: -item[1][2])[:20]:
        path = Path(file)
        where = path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path.name
        lines.append(f"| {own / total:.1%} | {calls / 3000:.1f} | {where}: {name} |")
    return "\n".join(lines)


def main() -> None:
    """Measure, and profile if asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--opt-fits", type=Path, required=True)
    parser.add_argument("--repeats", type=int, required=True)
    parser.add_argument("--limit", type=float, help="sustained rate, if known")
    parser.add_argument("--profile", action="store_true")
    args = parser.parse_args()
    known = cases(args.data, args.opt_fits)
    model, trace = known["azure"]
    limit = args.limit or sustained(model, trace)
    rows = {
        "azure at 80% of the sustained rate": max_of(args.repeats, model, trace, 0.8 * limit),
        "azure at 1.05 requests/s (decode computes 80% of the time)": max_of(args.repeats, model, trace, 1.05),
        "mooncake, its own timestamps": max_of(args.repeats, *known["mooncake"], None),
    }
    found: dict[str, Any] = {"sustained_rate": limit, "rows": rows}
    if args.profile:
        found["profile"] = profile(model, trace, 0.8 * limit)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
