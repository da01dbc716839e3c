"""Whole runs: what befalls instances, what a client does about it, what is counted."""

from dataclasses import replace

import numpy as np
import pytest

from distserve.bench.arrivals import Gamma
from distserve.bench.lengths import Fixed, Lognormal
from distserve.bench.workload import Workload, WorkloadSpec
from distserve.core.commands import RunStep
from distserve.core.config import SLO, InstanceSpec, KvConfig, ParallelConfig, Role, SchedulerConfig
from distserve.core.errors import ConfigError
from distserve.core.latency import LinearStepTime, StepShape
from distserve.core.topology import ClusterSpec, Gpu
from simulator.model import ClusterModel, Delays, InstanceModel, KvGeometry
from simulator.simulation import Fault, FaultKind, simulate
from tests.core.harness import STEP_TIME as HARNESS_STEP_TIME
from tests.core.harness import Deployment, make_request

STEP_TIME = LinearStepTime(base=0.01, per_token=0.0001, per_pair=1e-8, per_context=1e-7)


def deployment(num_blocks: int = 500, **pools: int) -> ClusterModel:
    instances = tuple(
        InstanceModel(
            InstanceSpec(f"{role}-{index}", Role(role), KvConfig(num_blocks, 16), SchedulerConfig(max_model_len=9000)),
            STEP_TIME,
        )
        for role, count in pools.items()
        for index in range(count)
    )
    return ClusterModel(instances)


def poisson(rate: float, num: int, seed: int = 0) -> Workload:
    lengths = Lognormal(200, 0.8, 1000), Lognormal(60, 0.8, 300)
    return WorkloadSpec(Gamma(), *lengths, num_requests=num, seed=seed).at(rate)


def test_same_seed_same_bytes() -> None:
    first, second, other = (simulate(deployment(prefill=2, decode=2), poisson(20, 200, seed)) for seed in (1, 1, 2))
    assert first.timelines.finish.tobytes() == second.timelines.finish.tobytes()
    assert first.instances == second.instances
    assert first.timelines.finish.tobytes() != other.timelines.finish.tobytes()


def test_a_timeline_is_in_order_and_tokens_are_counted() -> None:
    offered = poisson(15, 200)
    result = simulate(deployment(prefill=1, decode=1), offered)
    times = result.timelines
    assert (times.status == 200).all()
    has_decode = times.output_tokens > 1
    for earlier, later in (
        ("arrival", "prefill_start"),
        ("prefill_start", "prefill_end"),
        ("prefill_end", "first_token"),
        ("first_token", "finish"),
    ):
        assert (getattr(times, earlier) <= getattr(times, later)).all(), (earlier, later)
    for earlier, later in (("migration_start", "migration_end"), ("migration_end", "decode_start")):
        assert (getattr(times, earlier) <= getattr(times, later))[has_decode].all(), (earlier, later)
    prefill, decode = result.instances
    assert prefill.num_tokens == offered.prompt_lens.sum()
    assert decode.num_tokens == (offered.output_lens - 1).sum()
    assert 0 < decode.peak_kv_blocks <= decode.num_kv_blocks


def test_a_lost_instance_costs_attempts_and_no_request() -> None:
    model = deployment(prefill=2, decode=2)
    faults = [Fault(3.0, FaultKind.LOSS, "decode-1"), Fault(5.0, FaultKind.LOSS, "prefill-0")]
    calm, struck = simulate(model, poisson(15, 200)), simulate(model, poisson(15, 200), faults=faults)
    assert (calm.timelines.num_attempts == 1).all()
    assert (struck.timelines.status == 200).all()
    assert (struck.timelines.num_attempts > 1).any()
    late = struck.timelines.arrival > 8.0
    assert (struck.timelines.decode_id[late & (struck.timelines.output_tokens > 1)] == 2).all()
    assert (struck.timelines.prefill_id[late] == 1).all()


def test_what_had_been_said_is_not_said_again() -> None:
    """A request whose decode instance dies goes on from its last token, on the one that is left."""
    one = Workload(np.array([100]), np.array([200]), np.array([0.0]))
    model = deployment(prefill=1, decode=2)
    calm = simulate(model, one)
    (used,) = (usage.instance_id for usage in calm.instances if usage.role is Role.DECODE and usage.num_steps)
    struck = simulate(model, one, faults=[Fault(1.5, FaultKind.LOSS, used)])
    steps = [usage.num_steps for usage in struck.instances if usage.role is Role.DECODE]
    # 200 tokens: two came from prefills, and the step under way at the loss was lost with its instance.
    assert sum(steps) in {198, 199}
    assert struck.timelines.num_attempts[0] == 2
    assert struck.timelines.first_token[0] == calm.timelines.first_token[0]


def test_a_draining_instance_ends_what_it_has_and_takes_nothing_new() -> None:
    model = deployment(prefill=2, decode=1)
    result = simulate(model, poisson(15, 200), faults=[Fault(4.0, FaultKind.DRAIN, "prefill-0")])
    assert (result.timelines.status == 200).all()
    assert (result.timelines.prefill_id[result.timelines.arrival > 4.01] == 1).all()
    assert (result.timelines.prefill_id[result.timelines.arrival < 4.0] == 0).any()


def test_an_instance_that_starts_late_is_used_from_then_on() -> None:
    model = deployment(mixed=2)
    result = simulate(model, poisson(15, 300), faults=[Fault(6.0, FaultKind.START, "mixed-1")])
    used = result.timelines.prefill_id
    assert (used[result.timelines.arrival < 6.0] == 0).all()
    assert (used[result.timelines.arrival > 6.5] == 1).any()


def test_without_a_pool_requests_are_refused() -> None:
    result = simulate(deployment(prefill=1), poisson(5, 10))
    assert (result.timelines.status == 503).all()
    assert not result.timelines.meets(SLO(1e9, 1e9)).any()


def test_requests_beyond_memory_are_refused_and_the_others_served() -> None:
    offered = Workload(np.array([100, 9000, 100]), np.array([5, 5, 5]), np.array([0.0, 0.1, 0.2]))
    assert simulate(deployment(prefill=1, decode=1), offered).timelines.status.tolist() == [200, 400, 200]


def test_a_run_can_be_cut_off() -> None:
    result = simulate(deployment(prefill=1, decode=1), poisson(15, 200), until=5.0)
    ended = result.timelines.status == 200
    assert 0 < ended.sum() < 200
    assert result.timelines.finish[ended].max() <= 5.0
    assert np.isnan(result.timelines.finish[~ended]).all()


def test_closed_loop_load_and_unknown_instances_are_refused() -> None:
    closed = WorkloadSpec(None, Fixed(5), Fixed(5), num_requests=3).at(None)
    with pytest.raises(ConfigError, match="arrival times"):
        simulate(deployment(mixed=1), closed)
    with pytest.raises(ConfigError, match=r"mixed-7.*mixed-0"):
        simulate(deployment(mixed=1), poisson(5, 3), faults=[Fault(1.0, FaultKind.LOSS, "mixed-7")])


def test_pipeline_stages_work_on_several_batches() -> None:
    """Two stages of half the time each double what a saturated prefill instance gets done, not how fast."""

    class Half:
        def seconds(self, shape: StepShape) -> float:
            return STEP_TIME.seconds(shape) / 2

        def handover(self, shape: StepShape) -> float:
            return 0.001

    one = deployment(prefill=1, decode=1)
    spec = one.instances[0].spec
    piped = replace(spec, parallel=ParallelConfig(1, 2), scheduler=replace(spec.scheduler, max_in_flight=2))
    two = replace(one, instances=(InstanceModel(piped, Half()), one.instances[1]))
    burst = Workload(np.full(40, 512), np.ones(40, np.int64), np.zeros(40))
    alone = Workload(np.array([512]), np.array([1]), np.array([0.0]))
    ends = [simulate(model, burst).timelines.finish.max() for model in (one, two)]
    # A batch comes back after both stages and the hand-over; the pipeline takes half a step to fill.
    assert ends[1] == pytest.approx(ends[0] / 2 + 20 * 0.001 + ends[0] / 80, rel=0.01)
    firsts = [simulate(model, alone).timelines.ttft[0] for model in (one, two)]
    assert firsts[1] == pytest.approx(firsts[0] + 0.001)


def test_a_pull_overlaps_with_the_step_that_makes_its_layers() -> None:
    """Over a link that takes half a step for the KV, a quarter of it is left when the step ends."""
    roles = (Role.PREFILL, Role.DECODE)
    instances = tuple(
        InstanceModel(
            InstanceSpec(role, role, KvConfig(500, 16), SchedulerConfig(max_model_len=9000)),
            STEP_TIME,
            (Gpu(0, index),),
        )
        for index, role in enumerate(roles)
    )
    step = STEP_TIME.seconds(StepShape(num_prefill_tokens=512, prefill_pairs=512 * 513 // 2, num_prefills=1))
    kv = KvGeometry(num_layers=4, num_kv_heads=2, token_bytes=100)
    bandwidth = 512 * kv.bytes_per_token / (step / 2)
    model = ClusterModel(instances, ClusterSpec("cpu", 1, 2, bandwidth, bandwidth), kv, Delays(pull_latency=0.0))
    times = simulate(model, Workload(np.array([512]), np.array([5]), np.array([0.0]))).timelines
    assert times.migration_end[0] - times.prefill_end[0] == pytest.approx(step / 8, rel=1e-6)


def test_the_client_makes_instances_do_what_an_owner_makes_them_do() -> None:
    """Steps, by instance, of one workload behind a real owner and behind the simulator's client."""
    requests = [(f"{index}", 30 + 7 * index, 0.03 * index) for index in range(12)]
    kv, config = KvConfig(40, 4), SchedulerConfig(max_batch_tokens=64, max_batch_size=6, headroom=0.0)
    owned = Deployment(prefill=1, decode=1, kv=kv, config=config)
    for name, prompt, arrival in requests:
        owned.submit(make_request(name, prompt, seed=22, max_tokens=20, arrival=arrival))
    trace = owned.run().trace
    steps = [
        sum(isinstance(command, RunStep) for entry in trace if entry.part == part for command in entry.commands)
        for part in ("prefill-0", "decode-0")
    ]
    instances = tuple(
        InstanceModel(InstanceSpec(f"{role}-0", role, kv, config), HARNESS_STEP_TIME)
        for role in (Role.PREFILL, Role.DECODE)
    )
    prompts, arrivals = [prompt for _, prompt, _ in requests], [arrival for *_, arrival in requests]
    result = simulate(ClusterModel(instances), Workload(np.array(prompts), np.full(12, 20), np.array(arrivals)))
    assert [usage.num_steps for usage in result.instances] == steps
    assert result.instances[1].num_preempted == owned.schedulers["decode-0"].totals.num_preempted > 0


@pytest.mark.parametrize("pause", [0.2, 3.0])
def test_an_instance_that_starts_again_serves_again_and_both_its_lives_count(pause: float) -> None:
    """Also where it starts before its loss is noticed."""
    model, offered = deployment(mixed=2), poisson(15, 300)
    loss = Fault(12.0, FaultKind.LOSS, "mixed-1")
    lost = simulate(model, offered, faults=[loss])
    back = simulate(model, offered, faults=[loss, Fault(12.0 + pause, FaultKind.START, "mixed-1")])
    assert (back.timelines.status == 200).all()
    assert (back.timelines.prefill_id[back.timelines.arrival > 16.0] == 1).any()
    assert back.instances[1].num_tokens > lost.instances[1].num_tokens
    assert back.instances[1].busy > lost.instances[1].busy
