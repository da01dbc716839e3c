"""Simulated deployments against what queueing theory and conservation say of them.

Statistical comparisons use fixed seeds and allow four standard errors, estimated from the means of 40 batches of
consecutive requests (nearly independent: a batch is hundreds of requests, far longer than the queue's memory). Each
test also bounds the standard error itself, so that a loose comparison cannot pass for a tight one.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np
import pytest

from distserve.bench.arrivals import Gamma
from distserve.bench.lengths import Fixed, Lognormal
from distserve.bench.workload import Workload, WorkloadSpec
from distserve.core.config import InstanceSpec, KvConfig, ParallelConfig, Role, SchedulerConfig
from distserve.core.latency import LinearStepTime, StepShape, StepTime
from distserve.core.router import RouterConfig
from distserve.core.topology import ClusterSpec, Gpu
from simulator.model import ClusterModel, Delays, InstanceModel, KvGeometry
from simulator.results import Floats, Simulation
from simulator.simulation import Fault, FaultKind, simulate

PROMPT = 100
INSTANT = Delays(message=0.0, pull_latency=0.0, seconds_per_block=0.0)
ZERO_TIME = LinearStepTime(0.0, 0.0, 0.0, 0.0)
PATIENT = RouterConfig(max_wait=float("inf"))
PLENTY = KvConfig(num_blocks=1_000_000)


@dataclass(frozen=True)
class Stages:
    """Every step takes ``stage`` seconds in each pipeline stage and ``between`` seconds from one to the next."""

    stage: float
    between: float = 0.0

    def seconds(self, shape: StepShape) -> float:
        return self.stage

    def handover(self, shape: StepShape) -> float:
        return self.between


@dataclass
class Steps:
    """A recorder's rows: (instance, stage, start, end, shape)."""

    rows: list[tuple[str, int, float, float, StepShape]] = field(default_factory=list)

    def on_step(self, instance_id: str, stage: int, start: float, end: float, shape: StepShape) -> None:
        self.rows.append((instance_id, stage, start, end, shape))

    def on_pull(
        self, request_id: str, source_id: str, puller_id: str, start: float, end: float, num_bytes: int
    ) -> None:
        pass

    def on_links(self, start: float, end: float, num_bytes: Sequence[float]) -> None:
        pass

    def of(self, instance_id: str) -> list[tuple[int, float, float, StepShape]]:
        """One instance's steps."""
        return [row[1:] for row in self.rows if row[0] == instance_id]


def instance(
    role: Role,
    step_time: StepTime,
    *,
    index: int = 0,
    parallel: ParallelConfig = ParallelConfig(),
    kv: KvConfig = PLENTY,
    batch_tokens: int = PROMPT,
    batch_size: int = 10_000,
    gpus: tuple[Gpu, ...] = (),
) -> InstanceModel:
    config = SchedulerConfig(
        max_batch_tokens=batch_tokens,
        max_batch_size=batch_size,
        max_in_flight=parallel.pp,
        headroom=0.0,
        pull_timeout=1e9,
        max_model_len=1_000_000,
    )
    return InstanceModel(InstanceSpec(f"{role}-{index}", role, kv, config, parallel), step_time, gpus)


def prefill_alone(step_time: StepTime, parallel: ParallelConfig = ParallelConfig()) -> ClusterModel:
    """One prefill instance that takes one prompt at a time, and a decode instance for form's sake."""
    return ClusterModel(
        (instance(Role.PREFILL, step_time, parallel=parallel), instance(Role.DECODE, ZERO_TIME)),
        delays=INSTANT,
        router=PATIENT,
    )


def poisson(rate: float, num: int, seed: int, output: int = 1) -> Workload:
    return WorkloadSpec(Gamma(), Fixed(PROMPT), Fixed(output), num_requests=num, seed=seed).at(rate)


def mean_and_error(values: Floats, warm_up: int) -> tuple[float, float]:
    """Mean, and its standard error from the means of 40 batches, of what comes after ``warm_up`` values."""
    kept = values[warm_up:]
    batches = kept[: len(kept) // 40 * 40].reshape(40, -1).mean(axis=1)
    return float(batches.mean()), float(batches.std(ddof=1) / np.sqrt(40))


def assert_mean_ttft(model: ClusterModel, rate: float, expected: float, seed: int) -> None:
    simulation = simulate(model, poisson(rate, 24_000, seed))
    assert (simulation.timelines.status == 200).all()
    mean, error = mean_and_error(simulation.timelines.ttft, 2_000)
    assert error < 0.02 * expected
    assert mean == pytest.approx(expected, abs=4 * error)


# -- queues --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("load", "seed"), [(0.3, 1), (0.6, 2)])
def test_a_prefill_instance_is_an_mdl_queue(load: float, seed: int) -> None:
    """Mean TTFT D + R D^2 / (2 (1 - R D)): Pollaczek and Khinchine for a constant service time D at rate R."""
    service = 0.05
    rate = load / service
    expected = service + rate * service**2 / (2 * (1 - rate * service))
    assert_mean_ttft(prefill_alone(Stages(service)), rate, expected, seed)


@pytest.mark.parametrize(("load", "seed"), [(0.6, 4), (1.4, 5)])
def test_two_stages_halve_what_a_prompt_waits_for(load: float, seed: int) -> None:
    """DistServe's formula for 2-way inter-op parallelism: D + R D^2 / (4 (2 - R D)); ``load`` may be up to 2."""
    service = 0.05
    rate = load / service
    expected = service + rate * service**2 / (4 * (2 - rate * service))
    assert_mean_ttft(prefill_alone(Stages(service / 2), ParallelConfig(pp=2)), rate, expected, seed)


@pytest.mark.parametrize(("load", "seed"), [(0.5, 6), (1.1, 7)])
def test_tensor_parallelism_with_a_speedup(load: float, seed: int) -> None:
    """DistServe's formula for 2-way intra-op parallelism of speedup K: D / K + R D^2 / (2 K (K - R D))."""
    service, speedup = 0.05, 1.7
    rate = load / service
    expected = service / speedup + rate * service**2 / (2 * speedup * (speedup - rate * service))
    assert_mean_ttft(prefill_alone(Stages(service / speedup), ParallelConfig(tp=2)), rate, expected, seed)


def test_the_papers_crossing_of_inter_and_intra_op_parallelism() -> None:
    """At low rates the shorter execution wins, at high rates the shorter queue; the formulas cross in between."""
    service, speedup = 0.05, 1.7

    def mean(step_time: StepTime, parallel: ParallelConfig, load: float) -> float:
        simulation = simulate(prefill_alone(step_time, parallel), poisson(load / service, 4_000, 8))
        return float(simulation.timelines.ttft.mean())

    inter, intra = (Stages(service / 2), ParallelConfig(pp=2)), (Stages(service / speedup), ParallelConfig(tp=2))
    assert mean(*intra, 0.2) < mean(*inter, 0.2)
    assert mean(*inter, 1.55) < mean(*intra, 1.55)


# -- conservation ----------------------------------------------------------------------------------------------------


def test_littles_law_and_the_utilisation_law_on_a_whole_deployment() -> None:
    """What the steps' own record says of the time spent is what the requests' timelines say.

    In a decode instance: sequences per step, integrated over the steps' time, is the sum of the requests' times from
    first step to last token (L = lambda W times the duration); busy time is the sum of service times.
    """
    step_time = LinearStepTime(base=0.004, per_token=2e-5, per_pair=1e-9, per_context=1e-7)
    model = ClusterModel(
        tuple(
            instance(role, step_time, index=index, batch_tokens=2048)
            for role in (Role.PREFILL, Role.DECODE)
            for index in range(2)
        ),
        delays=INSTANT,
    )
    spec = WorkloadSpec(Gamma(), Lognormal(600, 0.8), Lognormal(120, 0.7), num_requests=3_000, seed=9)
    steps = Steps()
    simulation = simulate(model, spec.at(20.0), recorder=steps)
    lines = simulation.timelines
    assert (lines.status == 200).all()
    for number, usage in enumerate(simulation.instances):
        rows = steps.of(usage.instance_id)
        assert usage.busy == pytest.approx(sum(end - start for _, start, end, _ in rows), rel=1e-9)
        if usage.role is Role.PREFILL:
            computed = sum(shape.num_prefill_tokens for _, _, _, shape in rows)
            assert computed == lines.prompt_tokens[lines.prefill_id == number].sum()
            continue
        mine = (lines.decode_id == number) & (lines.output_tokens > 1)
        tokens = sum(shape.num_decodes for _, _, _, shape in rows)
        assert tokens == (lines.output_tokens[mine] - 1).sum()
        population = sum((end - start) * shape.num_decodes for _, start, end, shape in rows)
        residence = (lines.finish[mine] - lines.decode_start[mine]).sum()
        assert population == pytest.approx(residence, rel=1e-9)


# -- pipelines -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("between", [0.0, 0.003])
def test_a_decode_pipeline_keeps_a_batch_in_every_stage(between: float) -> None:
    """With two batches in two stages a token takes two stage times and the hand-over; both stages work at once."""
    stage = 0.01
    model = ClusterModel(
        (
            instance(Role.PREFILL, ZERO_TIME, batch_tokens=10_000),
            instance(Role.DECODE, Stages(stage, between), parallel=ParallelConfig(pp=2)),
        ),
        delays=INSTANT,
    )
    num, output = 8, 200
    steps = Steps()
    workload = Workload(np.full(num, PROMPT), np.full(num, output), np.zeros(num))
    lines = simulate(model, workload, recorder=steps).timelines
    # The two batches take their first steps one after the other; from then on each token takes one round.
    assert lines.tpot == pytest.approx(np.full(num, 2 * stage + between), rel=0.02)
    rows = steps.of("decode-0")
    for number in range(2):
        spans = sorted((start, end) for stage_id, start, end, _ in rows if stage_id == number)
        assert all(first[1] <= second[0] + 1e-12 for first, second in pairwise(spans))
    middle = [shape for _, start, _, shape in rows if 10 * stage < start < lines.finish.min() - 10 * stage]
    assert {shape.num_decodes for shape in middle} == {num // 2}
    busy = sum(end - start for _, start, end, _ in rows)
    assert busy / lines.finish.max() == pytest.approx(2 * 2 * stage / (2 * stage + between), rel=0.02)


def test_a_saturated_prefill_pipeline_ends_a_prompt_every_stage_time() -> None:
    stage, num = 0.02, 500
    workload = Workload(np.full(num, PROMPT), np.full(num, 1), np.zeros(num))
    model = prefill_alone(Stages(stage), ParallelConfig(pp=4))
    lines = simulate(model, workload).timelines
    assert lines.finish.max() == pytest.approx((num + 3) * stage)


# -- memory and links --------------------------------------------------------------------------------------------------


def test_a_full_decode_instance_holds_prefill_back() -> None:
    """Decode memory for ``c`` sequences of n tokens at t seconds a token serves c / ((n - 1) t) requests/s, no more.

    The prompts that wait for it are those whose KV the prefill instance has memory for: further ones do not start.
    """
    output, step, in_decode, in_prefill, num = 60, 0.01, 5, 3, 400
    blocks = KvConfig(1, 16).blocks_for(PROMPT + output)
    decode_kv = KvConfig(in_decode * blocks)
    prefill_kv = KvConfig(in_prefill * KvConfig(1, 16).blocks_for(PROMPT))
    model = ClusterModel(
        (
            instance(Role.PREFILL, Stages(0.01), kv=prefill_kv),
            instance(Role.DECODE, Stages(step), kv=decode_kv, batch_size=in_decode),
        ),
        delays=INSTANT,
        router=PATIENT,
    )
    workload = Workload(np.full(num, PROMPT), np.full(num, output), np.linspace(0.0, 4.0, num))
    simulation = simulate(model, workload)
    lines = simulation.timelines
    assert (lines.status == 200).all()
    assert simulation.instances[1].num_preempted == 0
    rate = (num - 100) / (np.sort(lines.finish)[-1] - np.sort(lines.finish)[99])
    assert rate == pytest.approx(in_decode / ((output - 1) * step), rel=0.02)
    started, left = np.sort(lines.prefill_start), np.sort(lines.migration_end)
    held = np.arange(1, num + 1) - np.searchsorted(left, started, side="right")
    assert held.max() == in_prefill
    assert simulation.instances[0].peak_kv_blocks == prefill_kv.num_blocks


def test_a_link_offered_eighty_times_what_it_carries_sets_the_pace() -> None:
    """0.5 GB/s under 43 GB/s of KV: requests pass at the link's rate, and no byte travels faster."""
    capacity, offered, prompt, num = 0.5e9, 43e9, 4000, 60
    geometry = KvGeometry(num_layers=64, num_kv_heads=8, token_bytes=2 * 128 * 2)
    per_request = prompt * geometry.bytes_per_token
    cluster = ClusterSpec("h200", 2, 1, intra_node_bandwidth=450e9, inter_node_bandwidth=capacity)
    model = ClusterModel(
        (
            instance(Role.PREFILL, Stages(0.001), batch_tokens=prompt, gpus=(Gpu(0, 0),)),
            instance(Role.DECODE, Stages(0.001), gpus=(Gpu(1, 0),)),
        ),
        cluster=cluster,
        kv=geometry,
        delays=INSTANT,
        router=PATIENT,
    )
    arrivals = np.arange(num) * per_request / offered
    workload = Workload(np.full(num, prompt), np.full(num, 20), arrivals)
    simulation = simulate(model, workload)
    lines = simulation.timelines
    assert (lines.status == 200).all()
    assert num / lines.finish.max() == pytest.approx(capacity / per_request, rel=0.01)
    carried = [link for link in simulation.links if link.num_bytes > 0]
    assert len(carried) >= 1
    for link in carried:
        assert link.num_bytes == pytest.approx(num * per_request, rel=1e-6)
        assert link.num_bytes <= link.capacity * simulation.duration * (1 + 1e-9)
        assert link.busy <= simulation.duration
    # As much of the KV as had arrived by any time fits through the link until then.
    done = np.sort(lines.migration_end)
    assert (np.arange(1, num + 1) * per_request <= capacity * done * (1 + 1e-9)).all()


def test_a_run_ends_though_the_decode_pool_never_comes_back() -> None:
    """What waits for it fails when the router's patience is over, computed prompts included."""
    patience = 20.0
    model = ClusterModel(
        (instance(Role.PREFILL, Stages(0.01)), instance(Role.DECODE, Stages(0.01))),
        router=RouterConfig(patience=patience),
    )
    workload = Workload(np.full(60, PROMPT), np.full(60, 40), np.linspace(0.0, 3.0, 60))
    simulation = simulate(model, workload, faults=[Fault(1.0, FaultKind.LOSS, "decode-0")])
    status = simulation.timelines.status
    assert set(status.tolist()) == {200, 503}
    # Known at 2 s; then the router looks once a second, and what it gives up may have a patience left elsewhere.
    assert simulation.duration < 2.0 + 2 * patience + 5.0


# -- reproducibility ---------------------------------------------------------------------------------------------------


def columns(simulation: Simulation) -> bytes:
    lines = simulation.timelines
    return b"".join(getattr(lines, name).tobytes() for name in sorted(vars(lines)))


def test_the_same_seed_gives_the_same_bytes() -> None:
    step_time = LinearStepTime(base=0.004, per_token=2e-5, per_pair=1e-9, per_context=1e-7)
    model = ClusterModel(
        (
            instance(Role.PREFILL, step_time, batch_tokens=2048, gpus=(Gpu(0, 0),)),
            instance(Role.DECODE, step_time, kv=KvConfig(1200), gpus=(Gpu(1, 0),)),
        ),
        cluster=ClusterSpec("h200", 2, 1, intra_node_bandwidth=450e9, inter_node_bandwidth=10e9),
        kv=KvGeometry(num_layers=32, num_kv_heads=8, token_bytes=512),
    )

    def run(seed: int) -> bytes:
        spec = WorkloadSpec(Gamma(1.5), Lognormal(500, 1.0), Lognormal(150, 0.8), num_requests=800, seed=seed)
        return columns(simulate(model, spec.at(12.0)))

    assert run(1) == run(1)
    assert run(1) != run(2)
