"""What the simulator says of a deployment of this machine: from a profile, before or without running it."""

from collections.abc import Iterator, Mapping
from dataclasses import astuple, dataclass

import numpy as np

from benchmarks.fidelity_cpu.speed import PROFILED, Speed, StepTimeAt
from distserve.bench.arrivals import Gamma
from distserve.bench.lengths import parse_lengths
from distserve.bench.workload import Workload, WorkloadSpec
from distserve.core.config import SLO, InstanceSpec, KvConfig, ParallelConfig, Role, SchedulerConfig
from distserve.core.latency import StepShape, StepTime
from distserve.core.router import RouterConfig
from simulator.latency.measured import ProfileLatencyModel
from simulator.model import ClusterModel, InstanceModel
from simulator.results import Timelines
from simulator.simulation import simulate

KV_TOKENS = 32768
SCHEDULER = SchedulerConfig(max_batch_tokens=512, max_batch_size=64, max_model_len=2048)
_GOODPUT_REQUESTS = 400
_GOODPUT_SEEDS = (101, 102)
"""Seeds of the search for the goodput: none of them is measured."""
_TOLERANCE = 0.03
_NUM_VARIANTS = 9
_JITTER = 0.005
"""Seconds: the standard deviation by which arrivals are shifted."""


@dataclass(frozen=True)
class Mix:
    """Lengths as ``distserve bench`` takes them, and the SLO as multiples of what an idle machine does."""

    name: str
    prompt_len: str
    output_len: str
    ttft_factor: float = 3.0
    tpot_factor: float = 4.0

    @property
    def mean_prompt(self) -> float:
        """Tokens, of what is drawn."""
        return float(parse_lengths(self.prompt_len).draw(np.random.default_rng(0), 10_000).mean())

    def spec(self, num_requests: int, seed: int) -> WorkloadSpec:
        """Poisson arrivals with these lengths."""
        prompt, output = parse_lengths(self.prompt_len), parse_lengths(self.output_len)
        return WorkloadSpec(Gamma(), prompt, output, num_requests=num_requests, seed=seed)


MIXES = (
    Mix("chat", "lognormal:mean=300,sigma=0.8,max=1500", "lognormal:mean=60,sigma=0.6,max=256"),
    Mix("documents", "lognormal:mean=500,sigma=0.5,max=1500", "lognormal:mean=40,sigma=0.5,max=128"),
)


@dataclass(frozen=True)
class Figures:
    """What is compared: the share of requests within the SLO, and medians in seconds."""

    attainment: float
    ttft: float
    tpot: float


def objective(model: ProfileLatencyModel, mix: Mix) -> SLO:
    """Multiples of a mean prompt's TTFT and of one sequence's TPOT with nothing else under way, in two digits."""
    step_time = model.step_time(ParallelConfig())
    delays = model.delays((), mix.mean_prompt)
    prompt = round(mix.mean_prompt)
    ttft = step_time.seconds(StepShape(prompt, prompt * (prompt + 1) // 2, num_prefills=1)) + 4 * delays.message
    tpot = step_time.seconds(StepShape(num_decodes=1, decode_context=prompt))
    return SLO(ttft=_two_digits(mix.ttft_factor * ttft), tpot=_two_digits(mix.tpot_factor * tpot), attainment=0.9)


def _two_digits(seconds: float) -> float:
    return float(f"{seconds:.2g}")


def cluster_model(
    model: ProfileLatencyModel,
    pools: Mapping[Role, int],
    mean_prompt: float,
    *,
    scheduler: SchedulerConfig = SCHEDULER,
    kv_tokens: int = KV_TOKENS,
    router: RouterConfig | None = None,
    speed: Speed = PROFILED,
) -> ClusterModel:
    """``pools`` instances of each role on this machine's cores, at the ``speed`` it has now."""
    profile = model.profile
    specs = [
        InstanceSpec(f"{role}-{index}", role, KvConfig(kv_tokens // profile.block_size, profile.block_size), scheduler)
        for role, count in pools.items()
        for index in range(count)
    ]
    step_time: StepTime = model.step_time(ParallelConfig())
    if speed != PROFILED:
        step_time = StepTimeAt(step_time, speed)
    return ClusterModel(
        instances=tuple(InstanceModel(spec, step_time) for spec in specs),
        delays=model.delays(tuple(spec.instance_id for spec in specs), mean_prompt),
        router=router or RouterConfig(),
        host=model.host(),
    )


def predict(model: ClusterModel, workload: Workload, slo: SLO) -> Figures:
    """The median of what is simulated for ``workload`` as it is and with arrivals that are some milliseconds off.

    Which request meets which in a queue hangs on less than anyone can know, and moves the median TTFT of one simulated
    run by 2 to 3% (a standard deviation).
    """
    found = [figures(simulate(model, shifted).timelines, slo) for shifted in variants(workload)]
    attainment, ttft, tpot = np.median([astuple(one) for one in found], axis=0).tolist()
    return Figures(attainment, ttft, tpot)


def variants(workload: Workload) -> Iterator[Workload]:
    """``workload`` as it is, and with arrivals that are some milliseconds off."""
    assert workload.arrivals is not None
    yield workload
    rng = np.random.default_rng(0)
    for _ in range(_NUM_VARIANTS - 1):
        arrivals = np.maximum(0.0, workload.arrivals + rng.normal(0.0, _JITTER, len(workload.arrivals)))
        order = np.argsort(arrivals, kind="stable")
        yield Workload(workload.prompt_lens[order], workload.output_lens[order], arrivals[order])


def figures(timelines: Timelines, slo: SLO) -> Figures:
    """Of a simulated run; medians are over requests that were answered, of TPOT over those with two tokens or more."""
    ok = timelines.status == 200
    several = ok & (timelines.output_tokens > 1)
    return Figures(
        attainment=float(timelines.meets(slo).mean()),
        ttft=float(np.median(timelines.ttft[ok])),
        tpot=float(np.median(timelines.tpot[several])),
    )


def find_goodput(model: ClusterModel, mix: Mix, slo: SLO) -> float:
    """The largest rate, in requests/s, at which the simulated attainment is that of the SLO."""

    def attainment(rate: float) -> float:
        runs = [simulate(model, mix.spec(_GOODPUT_REQUESTS, seed).at(rate)) for seed in _GOODPUT_SEEDS]
        return float(np.mean([run.timelines.meets(slo).mean() for run in runs]))

    low, high = 1.0, 2.0
    while attainment(high) >= slo.attainment:
        low, high = high, 2 * high
    while high / low > 1 + _TOLERANCE:
        middle = (low * high) ** 0.5
        low, high = (middle, high) if attainment(middle) >= slo.attainment else (low, middle)
    return low
