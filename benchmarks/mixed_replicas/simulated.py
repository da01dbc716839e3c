"""How mixed replicas behind the router scale, in simulation: load at equal latency, and who idles while others queue.

Replicas of Llama-2-70B on 4 A100 each (TP 4), Dynamic SplitFuse with a budget of 768 tokens as DeepSpeed-FastGen has
it, prompts of 2600 and outputs of 60 tokens, normal with a deviation of 30%, Poisson arrivals. One replica's load is
what it is at ``BUSY`` of the rate that it can just keep up with. Many replicas serve as much as they can without the
mean or the 95th percentile of TTFT or latency exceeding the one replica's.

Round-robin is the same replicas, each given every n-th request.
"""

from dataclasses import dataclass, replace
from itertools import chain

import numpy as np

from distserve.bench.arrivals import Gamma
from distserve.bench.lengths import Lognormal, Normal
from distserve.bench.workload import Workload, WorkloadSpec
from distserve.core.config import InstanceSpec, ParallelConfig, Role, SchedulerConfig
from distserve.core.router import RouterConfig
from distserve.core.topology import ClusterSpec
from simulator.latency.analytic import AnalyticModel
from simulator.latency.gpus import find_gpu
from simulator.latency.memory import kv_config
from simulator.latency.shape import ModelShape
from simulator.model import ClusterModel, InstanceModel
from simulator.results import Timelines
from simulator.simulation import simulate

LLAMA_2_70B = {
    "model_type": "llama",
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "vocab_size": 32000,
    "max_position_embeddings": 4096,
    "torch_dtype": "bfloat16",
}
BUSY = 0.8
WARM_UP = 0.2
"""Share of the requests, from the first on, that is left out of the figures."""

_STEP = 0.25
"""Seconds; no step of these replicas takes longer (768 tokens: 0.18 s)."""


@dataclass(frozen=True)
class Latencies:
    """Seconds over the requests of a run: mean and 95th percentile of TTFT and of the whole request."""

    ttft: float
    ttft_p95: float
    latency: float
    latency_p95: float

    def within(self, other: "Latencies") -> bool:
        """Whether none of the four exceeds the other's."""
        return (
            self.ttft <= other.ttft
            and self.ttft_p95 <= other.ttft_p95
            and self.latency <= other.latency
            and self.latency_p95 <= other.latency_p95
        )


def replicas(count: int) -> ClusterModel:
    """``count`` equal mixed instances; nothing is shed."""
    shape, parallel = ModelShape.from_config(LLAMA_2_70B, name="llama-2-70b"), ParallelConfig(4)
    node = ClusterSpec("a100-80g-sxm", 1, 4, 300e9, 25e9)
    step_time = AnalyticModel(shape, node).step_time(parallel)
    kv = kv_config(shape, find_gpu(node.gpu), parallel, max_batch_tokens=768)
    assert kv is not None
    scheduler = SchedulerConfig(max_batch_tokens=768, max_batch_size=256, max_model_len=16384)
    instances = tuple(
        InstanceModel(InstanceSpec(f"mixed-{i:02}", Role.MIXED, kv, scheduler, parallel), step_time)
        for i in range(count)
    )
    return ClusterModel(instances, router=RouterConfig(max_wait=float("inf")))


def even(rate: float, num_requests: int, seed: int = 0) -> Workload:
    """FastGen's lengths."""
    lengths = Normal(2600, 780, 4000), Normal(60, 18, 96)
    return WorkloadSpec(Gamma(), *lengths, num_requests=num_requests, seed=seed).at(rate)


def skewed(rate: float, num_requests: int, seed: int = 0) -> Workload:
    """Most requests short, some very long; few tokens out, so that replicas do run out of work."""
    lengths = Lognormal(1200, 1.5, 12000), Lognormal(20, 1.2, 400)
    return WorkloadSpec(Gamma(), *lengths, num_requests=num_requests, seed=seed).at(rate)


def latencies(timelines: Timelines) -> Latencies:
    """The figures of one run, the warm-up left out."""
    assert (timelines.status == 200).all(), "every request is answered"
    kept = slice(int(WARM_UP * len(timelines)), None)
    ttft, latency = timelines.ttft[kept], timelines.latency[kept]
    return Latencies(
        float(ttft.mean()), float(np.quantile(ttft, 0.95)), float(latency.mean()), float(np.quantile(latency, 0.95))
    )


def kept_up_rate(num_requests: int) -> float:
    """Requests/s that one replica serves when all come at once: what it can just keep up with."""
    workload = even(1.0, num_requests)
    result = simulate(replicas(1), replace(workload, arrivals=np.zeros(num_requests)))
    return num_requests / result.duration


def load_within(count: int, bound: Latencies, one_rate: float, num_requests: int) -> float:
    """The highest rate (requests/s, to half a percent) at which ``count`` replicas stay within ``bound``."""
    model = replicas(count)
    low, high = 0.5 * count * one_rate, 1.4 * count * one_rate
    while high / low > 1.005:
        rate = (low * high) ** 0.5
        is_within = latencies(simulate(model, even(rate, num_requests * count)).timelines).within(bound)
        low, high = (rate, high) if is_within else (low, rate)
    return low


def idle_beside_queue(runs: list[Timelines], count: int) -> float:
    """Share of the time in which a prompt waits to be started on one replica while another has nothing at all.

    ``runs`` are one timeline of ``count`` replicas, or one for each replica. A prompt that comes in the course of a
    step is started with the next one: waiting less than ``_STEP`` is no queue.
    """
    events: list[tuple[float, int, int, int]] = []
    for index, run in enumerate(runs):
        instance = run.prefill_id if len(runs) == 1 else np.full(len(run), index)
        for name, arrival, start, finish in zip(instance, run.arrival, run.prefill_start, run.finish, strict=True):
            if start > arrival + _STEP:
                events += [(arrival + _STEP, name, 1, 0), (start, name, -1, 0)]
            events += [(arrival, name, 0, 1), (finish, name, 0, -1)]
    queued, present = [0] * count, [0] * count
    last, lost, end = 0.0, 0.0, max(float(run.arrival[-1]) for run in runs)
    for time, name, queue, presence in sorted(events):
        if time > end:
            break
        if any(queued) and not all(present):
            lost += time - last
        last = time
        queued[name] += queue
        present[name] += presence
    return lost / end


def round_robin(workload: Workload, count: int) -> list[Timelines]:
    """``count`` replicas, each given every n-th request."""
    assert workload.arrivals is not None
    parts = [
        Workload(workload.prompt_lens[i::count], workload.output_lens[i::count], workload.arrivals[i::count])
        for i in range(count)
    ]
    return [simulate(replicas(1), part).timelines for part in parts]


def quantile(runs: list[Timelines], share: float) -> float:
    """Of the TTFT over all runs, seconds."""
    return float(np.quantile(np.array(list(chain.from_iterable(run.ttft for run in runs))), share))
