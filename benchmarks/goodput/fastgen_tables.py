"""DeepSpeed-FastGen's tables in simulation: SplitFuse against whole prompts, Llama-2-70B on four A100.

    python -m benchmarks.goodput.fastgen_tables        # about 3 minutes of one core

The load is that of its benchmark scripts: prompts and outputs normal with a deviation of 30%, prompts cut at 4,000
tokens, 512 requests in all, 1 to 32 clients that each wait for their answer. Throughput is clients by mean latency,
effective throughput what ``distserve bench`` computes (arXiv 2401.08671, section 4). The paper compared two engines,
not two policies, so each policy is run at two speeds: with today's kernels, and as fast as the vLLM of 2023 was at this
very model on this very card (Splitwise's measurements, simulator/latency/coefficients.toml).
"""

import argparse
import csv
import json
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.common.machine import describe_run
from benchmarks.goodput.closed_loop import closed_loop
from benchmarks.goodput.fastgen_report import Claims, Point, draw, report
from benchmarks.mixed_replicas.simulated import LLAMA_2_70B
from distserve.bench.lengths import Lengths
from distserve.bench.metrics import meets_fastgen, summarise
from distserve.core.config import InstanceSpec, ParallelConfig, PrefillPolicy, Role, SchedulerConfig
from distserve.core.latency import StepTime
from distserve.core.topology import ClusterSpec
from simulator.latency.analytic import AnalyticModel
from simulator.latency.gpus import find_gpu
from simulator.latency.memory import kv_config
from simulator.latency.shape import ModelShape
from simulator.model import InstanceModel

NODE = ClusterSpec("a100-80g-sxm", 1, 4, 300e9, 25e9)
TP4 = ParallelConfig(4)
SHAPE = ModelShape.from_config(LLAMA_2_70B, name="llama-2-70b")
CLIENTS = (1, 2, 4, 6, 8, 12, 16, 20, 24, 28, 32)
LENGTHS = ((1200, 60), (1200, 128), (2600, 60), (2600, 128))
NUM_REQUESTS = 512
LONGEST_PROMPT = 4000
DEVIATION = 0.3
SEED = 42


@dataclass(frozen=True)
class System:
    """A policy with its tokens per step, at the speed of an engine of ``coefficients.toml``."""

    policy: PrefillPolicy
    max_batch_tokens: int
    engine: str


# 768 tokens are FastGen's default. vLLM 0.2 took the longer of 2,048 tokens and the model's context of 4,096.
SYSTEMS = {
    "SplitFuse": System(PrefillPolicy.SPLITFUSE, 768, "vllm"),
    "whole prompts": System(PrefillPolicy.WHOLE_PROMPT, 4096, "vllm"),
    "SplitFuse, speed of 2023": System(PrefillPolicy.SPLITFUSE, 768, "vllm-2023-azure"),
    "whole prompts, speed of 2023": System(PrefillPolicy.WHOLE_PROMPT, 4096, "vllm-2023-azure"),
}


@cache
def step_time(engine: str) -> StepTime:
    """Of the model on the node."""
    return AnalyticModel(SHAPE, NODE, engine=engine).step_time(TP4)


def instance(system: System) -> InstanceModel:
    """One mixed instance on the four GPUs."""
    kv = kv_config(SHAPE, find_gpu(NODE.gpu), TP4, max_batch_tokens=system.max_batch_tokens)
    assert kv is not None
    scheduler = SchedulerConfig(
        max_batch_tokens=system.max_batch_tokens, max_batch_size=256, max_model_len=8192, policy=system.policy
    )
    return InstanceModel(InstanceSpec("mixed-0", Role.MIXED, kv, scheduler, TP4), step_time(system.engine))


def lengths(mean_prompt: int, mean_output: int, num: int) -> tuple[Lengths, Lengths]:
    """Prompts and outputs as FastGen's client draws them."""
    rng = np.random.default_rng(SEED)
    prompts = np.minimum(rng.normal(mean_prompt, DEVIATION * mean_prompt, num).astype(np.int64), LONGEST_PROMPT)
    outputs = rng.normal(mean_output, DEVIATION * mean_output, num).astype(np.int64)
    return np.maximum(prompts, 1), np.maximum(outputs, 1)


def measure(name: str, mean_prompt: int, mean_output: int, clients: int, num_requests: int) -> Point:
    """One point of its figures."""
    prompts, outputs = lengths(mean_prompt, mean_output, num_requests)
    starts = (0.01 * np.random.default_rng((SEED, 1)).uniform(0, clients, clients)).tolist()
    records = closed_loop(instance(SYSTEMS[name]), prompts, outputs, starts)
    summary = summarise(records, None)
    # Its percentiles leave out each request's last gap, and the first and the last request.
    gaps = np.concatenate([np.diff(record.event_times)[:-1] for record in records[1:-1]])
    p50, p90, p95 = np.percentile(gaps, (50, 90, 95)).tolist()
    assert summary.latency.mean is not None
    assert summary.ttft.p50 is not None
    return Point(
        system=name,
        prompt=mean_prompt,
        output=mean_output,
        clients=clients,
        throughput=clients / summary.latency.mean,
        latency=summary.latency.mean,
        ttft_p50=summary.ttft.p50,
        effective=summary.fastgen_effective_throughput,
        met={rate: sum(meets_fastgen(r, int(rate)) for r in records) / len(records) for rate in ("2", "4", "6")},
        gap_p50=p50,
        gap_p90=p90,
        gap_p95=p95,
    )


def sweep(clients: Iterable[int], num_requests: int) -> list[Point]:
    """Every system, lengths and number of clients."""
    points = []
    counts = list(clients)
    for mean_prompt, mean_output in LENGTHS:
        for name in SYSTEMS:
            began = time.perf_counter()
            points += [measure(name, mean_prompt, mean_output, count, num_requests) for count in counts]
            say(f"{mean_prompt} in, {mean_output} out: {name}, {time.perf_counter() - began:.0f} s")
    return points


def write_csv(points: Sequence[Point], file: Path) -> None:
    """One line for each point."""
    rows = []
    for point in points:
        row: dict[str, Any] = asdict(point)
        for name in ("effective", "met"):
            row |= {f"{name}_{rate}": value for rate, value in row.pop(name).items()}
        rows.append({key: round(value, 5) if isinstance(value, float) else value for key, value in row.items()})
    with file.open("w", encoding="utf-8", newline="") as opened:
        writer = csv.DictWriter(opened, rows[0].keys(), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def say(what: str) -> None:
    """Progress."""
    print(what, file=sys.stderr, flush=True)


def main() -> None:
    """Run, print and write the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="to rehearse: fewer clients and requests")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results", help="directory")
    options = parser.parse_args()
    facts = describe_run("benchmarks.goodput.fastgen_tables")
    facts["command"] = "python -m benchmarks.goodput.fastgen_tables" + " --quick" * options.quick
    clients, num_requests = ((1, 8, 16, 32), 64) if options.quick else (CLIENTS, NUM_REQUESTS)
    points = sweep(clients, num_requests)
    claims = Claims(points)
    options.output.mkdir(parents=True, exist_ok=True)
    write_csv(points, options.output / "fastgen.csv")
    document = {"facts": facts, "requests": num_requests, "claims": claims.table()}
    (options.output / "fastgen.json").write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    draw(points, options.output)
    text = report(claims, facts, num_requests)
    (options.output / "fastgen.md").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
