"""What prefix caching is worth on Mooncake's conversation trace, in simulation: hit rates and times to first token.

    python -m benchmarks.prefix_caching.run --trace mooncake_conversation.jsonl

The whole trace with its own arrivals, as they are and sped up, on one node of 8 H200 that serves Llama-3.1-8B:
4 prefill + 4 decode instances, and 8 mixed ones. Each without caching; with it and a router that looks at loads alone;
and with a router that counts hits. The trace says which blocks of 512 tokens prompts have in common; of answers it says
nothing, so that none is found again, which a live deployment would.
"""

import argparse
import json
import time
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from distserve.bench.arrivals import TraceTimes
from distserve.bench.traces import MOONCAKE_BLOCK_TOKENS, Trace, read_trace
from distserve.bench.workload import Workload, WorkloadSpec
from distserve.core.config import InstanceSpec, KvConfig, ParallelConfig, Role, SchedulerConfig
from distserve.core.router import RouterConfig
from distserve.core.topology import ClusterSpec, Gpu
from simulator.latency.analytic import AnalyticModel
from simulator.latency.gpus import find_gpu
from simulator.latency.memory import kv_config
from simulator.latency.shape import ModelShape
from simulator.model import ClusterModel, InstanceModel
from simulator.results import Simulation
from simulator.simulation import simulate

HERE = Path(__file__).parent
CLUSTER = ClusterSpec("h200", 1, 8, intra_node_bandwidth=450e9, inter_node_bandwidth=50e9)
LLAMA_8B = ModelShape(
    name="Llama-3.1-8B",
    num_layers=32,
    hidden=4096,
    num_heads=32,
    num_kv_heads=8,
    head_dim=128,
    intermediate=14336,
    vocab=128256,
    num_positions=131072,
)
POOLS = {
    "4 prefill + 4 decode": (Role.PREFILL,) * 4 + (Role.DECODE,) * 4,
    "8 mixed": (Role.MIXED,) * 8,
}
VARIANTS = {"none": (False, False), "caching, by load": (True, False), "caching, by hits": (True, True)}
BATCH_TOKENS = {Role.PREFILL: 8192, Role.DECODE: 8192, Role.MIXED: 2048}
SPEEDS = (1.0, 2.5)


@dataclass(frozen=True, slots=True)
class Result:
    """One run. ``hit_rate`` is the share of prompt tokens not computed, ``not_pulled`` the decode side's.

    ``busy`` is the share of the time that the instances with prompts computed. Times in seconds.
    """

    pools: str
    variant: str
    speed: float
    requests_per_second: float
    answered: float
    hit_rate: float
    not_pulled: float
    ttft_mean: float
    ttft_p50: float
    ttft_p90: float
    ttft_p99: float
    tpot_p90: float
    busy: float
    wall: float


def deployment(pools: str, variant: str) -> ClusterModel:
    """The instances, and the router of the variant."""
    caching, counts_hits = VARIANTS[variant]
    latency = AnalyticModel(LLAMA_8B, CLUSTER)
    step_time = latency.step_time(ParallelConfig())
    instances = []
    for index, role in enumerate(POOLS[pools]):
        scheduler = SchedulerConfig(
            max_batch_tokens=BATCH_TOKENS[role], max_batch_size=256, max_model_len=131072, prefix_caching=caching
        )
        spec = InstanceSpec(f"{role}-{index}", role, memory(role), scheduler)
        instances.append(InstanceModel(spec, step_time, (Gpu(0, index),)))
    router = RouterConfig(max_wait=float("inf"), counts_hits=counts_hits)
    return ClusterModel(tuple(instances), CLUSTER, LLAMA_8B.kv, router=router)


def memory(role: Role) -> KvConfig:
    """What weights and workspace leave of a card."""
    gpu, tokens = find_gpu(CLUSTER.gpu), BATCH_TOKENS[role]
    kv = kv_config(LLAMA_8B, gpu, ParallelConfig(), block_size=64, max_batch_tokens=tokens)
    assert kv is not None
    return kv


def workload(trace: Trace, speed: float) -> Workload:
    """The whole trace, its gaps divided by ``speed``."""
    assert trace.timestamps is not None
    spec = WorkloadSpec(TraceTimes(trace.timestamps), None, None, trace, time_scale=1 / speed)
    return spec.at(None)


def run(trace: Trace, pools: str, variant: str, speed: float) -> Result:
    """Simulate one case."""
    offered = workload(trace, speed)
    begin = time.monotonic()
    simulation = simulate(deployment(pools, variant), offered)
    wall = time.monotonic() - begin
    lines = simulation.timelines
    ok = lines.status == 200
    ttft = lines.ttft[ok]
    several = ok & (lines.output_tokens > 1)
    assert offered.arrivals is not None
    span = float(offered.arrivals[-1])
    return Result(
        pools=pools,
        variant=variant,
        speed=speed,
        requests_per_second=len(offered) / span,
        answered=float(ok.mean()),
        hit_rate=share(simulation, {Role.PREFILL, Role.MIXED}),
        not_pulled=share(simulation, {Role.DECODE}),
        ttft_mean=float(ttft.mean()),
        ttft_p50=float(np.percentile(ttft, 50)),
        ttft_p90=float(np.percentile(ttft, 90)),
        ttft_p99=float(np.percentile(ttft, 99)),
        tpot_p90=float(np.percentile(lines.tpot[several], 90)),
        busy=float(np.mean([usage.busy for usage in simulation.instances if usage.role is not Role.DECODE]))
        / simulation.duration,
        wall=wall,
    )


def share(simulation: Simulation, roles: set[Role]) -> float:
    """Hit tokens of queried ones, 0 if none were."""
    usages = [usage for usage in simulation.instances if usage.role in roles]
    queried = sum(usage.num_queried_tokens for usage in usages)
    return sum(usage.num_hit_tokens for usage in usages) / queried if queried else 0.0


def ceilings(trace: Trace) -> dict[str, float]:
    """The hit rate of one LRU cache of all instances' memory together, and of one without end."""
    sizes = {name: sum(memory(r).num_tokens for r in roles if r is not Role.DECODE) for name, roles in POOLS.items()}
    found = {name: lru_hit_rate(trace, size // MOONCAKE_BLOCK_TOKENS) for name, size in sizes.items()}
    return {**found, "endless": lru_hit_rate(trace, None)}


def lru_hit_rate(trace: Trace, capacity: int | None) -> float:
    """Share of prompt tokens that an LRU cache of ``capacity`` of the trace's blocks would have."""
    assert trace.prefix_blocks is not None
    known: OrderedDict[int, None] = OrderedDict()
    num_hits = 0
    for ids, length in zip(trace.prefix_blocks, trace.prompt_lens.tolist(), strict=True):
        num_found = next((index for index, one in enumerate(ids) if one not in known), len(ids))
        num_hits += min(num_found * MOONCAKE_BLOCK_TOKENS, length)
        for one in reversed(ids):
            known[one] = None
            known.move_to_end(one)
        while capacity is not None and len(known) > capacity:
            known.popitem(last=False)
    return num_hits / int(trace.prompt_lens.sum())


COLUMNS = (
    *("instances", "requests/s", "caching", "hit rate", "not pulled", "TTFT mean, s", "p50", "p90", "p99"),
    *("mean, gain", "p90, gain", "TPOT p90, ms", "busy"),
)


def report(results: Sequence[Result], limits: dict[str, float], num_requests: int) -> str:
    """The table, with gains against no caching at the same load."""
    rows = [COLUMNS, ["---" if name in {"instances", "caching"} else "---:" for name in COLUMNS]]
    for one in results:
        base = next(r for r in results if (r.pools, r.speed, r.variant) == (one.pools, one.speed, "none"))
        ttft = [f"{seconds:.3g}" for seconds in (one.ttft_mean, one.ttft_p50, one.ttft_p90, one.ttft_p99)]
        gains = [f"{base.ttft_mean / one.ttft_mean:.2f}x", f"{base.ttft_p90 / one.ttft_p90:.2f}x"]
        first = [
            one.pools,
            f"{one.requests_per_second:.2f}",
            one.variant,
            f"{one.hit_rate:.1%}",
            f"{one.not_pulled:.1%}",
        ]
        rows.append([*first, *ttft, *gains, f"{1000 * one.tpot_p90:.1f}", f"{one.busy:.0%}"])
    table = "\n".join(f"| {' | '.join(row)} |" for row in rows)
    sizes = ", ".join(f"{name} {value:.1%}" for name, value in limits.items())
    return f"""# Prefix caching on Mooncake's conversation trace, simulated

{num_requests:,} requests, Llama-3.1-8B on 8 H200, `python -m benchmarks.prefix_caching.run --trace
mooncake_conversation.jsonl --output DIR`. Hit rate: prompt tokens not computed. Gains: against no caching at the same
load. Busy: instances that compute prompts.

{table}

What one LRU cache would hit that had all the memory there is for prompts, and nothing else in it; endless: were memory
no limit. {sizes}.

![TTFT over load, hit rates](ttft.png)
"""


def plot(results: Sequence[Result]) -> Figure:
    """Mean and 90th percentile of TTFT over the load, and hit rates."""
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    axes = figure.subplots(1, 3)
    styles = dict(zip(VARIANTS, ("tab:gray", "tab:orange", "tab:green"), strict=True))
    for axis, pools in zip(axes, POOLS, strict=False):
        for variant, colour in styles.items():
            mine = [one for one in results if (one.pools, one.variant) == (pools, variant)]
            loads = [one.requests_per_second for one in mine]
            axis.plot(loads, [one.ttft_mean for one in mine], "-o", color=colour, label=f"{variant}, mean")
            axis.plot(loads, [one.ttft_p90 for one in mine], "--o", color=colour, label=f"{variant}, p90", alpha=0.6)
        axis.set(title=pools, xlabel="requests/s", ylabel="TTFT, s", ylim=(0, None))
    axes[0].legend(fontsize=7)
    for pools, marker in zip(POOLS, "os", strict=True):
        for variant, colour in list(styles.items())[1:]:
            mine = [one for one in results if (one.pools, one.variant) == (pools, variant)]
            loads = [one.requests_per_second for one in mine]
            rates = [one.hit_rate for one in mine]
            axes[2].plot(loads, rates, "-" + marker, color=colour, label=f"{pools}, {variant.partition(', ')[2]}")
    axes[2].set(title="prompt tokens not computed", xlabel="requests/s", ylim=(0, None))
    axes[2].legend(fontsize=7)
    return figure


def cases(speeds: Sequence[float]) -> Iterator[tuple[str, str, float]]:
    """Every pools, load and variant."""
    for pools in POOLS:
        for speed in speeds:
            for variant in VARIANTS:
                yield pools, variant, speed


def main() -> None:
    """Run, print and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trace", type=Path, required=True, help="mooncake_conversation.jsonl")
    parser.add_argument("--requests", type=int, help="only the first so many")
    parser.add_argument("--speeds", type=float, nargs="+", default=SPEEDS, help="how many times faster they arrive")
    parser.add_argument("--workers", type=int, default=1, help="cases at a time")
    parser.add_argument("--output", type=Path, help="directory of the results; printed only if not given")
    options = parser.parse_args()
    trace = read_trace(options.trace, "mooncake")
    if options.requests is not None:
        assert trace.timestamps is not None
        trace = trace.window(0.0, float(trace.timestamps[min(options.requests, len(trace) - 1)]))
    results = []
    with ProcessPoolExecutor(options.workers) as pool:
        for one in pool.map(run, *zip(*((trace, *case) for case in cases(options.speeds)), strict=True)):
            print(json.dumps(asdict(one)), flush=True)
            results.append(one)
    text = report(results, ceilings(trace), len(trace))
    print(text)
    if options.output is not None:
        options.output.mkdir(parents=True, exist_ok=True)
        (options.output / "report.md").write_text(text, encoding="utf-8")
        rows = [asdict(replace(one, wall=round(one.wall, 1))) for one in results]
        (options.output / "result.json").write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
        plot(results).savefig(options.output / "ttft.png", dpi=110)


if __name__ == "__main__":
    main()
