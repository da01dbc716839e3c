from dataclasses import dataclass

import numpy as np
import pytest

from distserve.bench.workload import Workload
from distserve.core.config import InstanceSpec, KvConfig, ParallelConfig, Role, SchedulerConfig
from distserve.core.latency import LinearStepTime, StepShape, StepTime
from simulator.model import ClusterModel, Delays, HostModel, InstanceModel
from simulator.results import Timelines
from simulator.simulation import Fault, FaultKind, simulate

STEP = LinearStepTime(base=0.01, per_token=1e-3, per_pair=0.0, per_context=0.0)


def cluster(
    roles: list[Role],
    host: HostModel | None,
    parallel: ParallelConfig = ParallelConfig(),
    delay: float = 0.0,
    step: StepTime = STEP,
) -> ClusterModel:
    scheduler = SchedulerConfig(max_in_flight=parallel.pp)
    specs = [InstanceSpec(f"{role}-{i}", role, KvConfig(512), scheduler, parallel) for i, role in enumerate(roles)]
    instances = tuple(InstanceModel(spec, step) for spec in specs)
    return ClusterModel(instances, delays=Delays(message=delay, pull_latency=0.0, seconds_per_block=0.0), host=host)


def run(
    roles: list[Role],
    host: HostModel | None,
    arrivals: list[float],
    prompt: int = 100,
    output: int = 1,
    delay: float = 0.0,
    parallel: ParallelConfig = ParallelConfig(),
    step: StepTime = STEP,
) -> Timelines:
    count = len(arrivals)
    workload = Workload(np.full(count, prompt), np.full(count, output), np.array(arrivals))
    return simulate(cluster(roles, host, parallel, delay, step), workload).timelines


SHARING = 0.92


def test_two_engines_on_one_core_take_twice_as_long_and_what_changing_places_costs():
    alone = run([Role.MIXED], HostModel(1), [1.0])
    together = run([Role.MIXED, Role.MIXED], HostModel(1), [1.0, 1.0])
    assert alone.ttft == pytest.approx([0.11])
    assert together.ttft == pytest.approx([0.22 / SHARING] * 2)


def test_who_comes_later_shares_what_is_left():
    # For 0.05 s the first computes alone, then both at half speed until its other 0.06 s are done, then the second.
    lines = run([Role.MIXED, Role.MIXED], HostModel(1), [1.0, 1.05])
    shared = 0.12 / SHARING
    assert lines.ttft == pytest.approx([0.05 + shared, shared + 0.05])


def test_three_engines_on_two_cores_all_get_on():
    # Without moving one of them now and then, the first would be done in 0.11 s and the others in twice that.
    lines = run([Role.MIXED] * 3, HostModel(2), [1.0, 1.0, 1.0])
    assert max(lines.ttft) < 1.2 * min(lines.ttft)
    assert 3 * 0.11 / 2 <= max(lines.ttft) < 0.22


def test_an_engine_that_wakes_takes_the_idle_core():
    lines = run([Role.MIXED] * 3, HostModel(2), [1.0, 1.0, 1.0, 1.5, 1.5])
    assert lines.ttft[3:] == pytest.approx([0.11, 0.11])


def test_a_core_that_falls_idle_takes_over_an_engine_that_shares():
    # The third joins 0.07 s after the others; 0.04 s later one core has nothing left to do.
    lines = run([Role.MIXED] * 3, HostModel(2), [1.0, 1.0, 1.07])
    shared = 0.04 / SHARING * 2
    assert min(lines.ttft) == pytest.approx(0.11)
    assert max(lines.ttft) < 0.11 + shared


def test_what_goes_on_without_requests_slows_engines_that_leave_no_core_free():
    assert run([Role.MIXED], HostModel(1, idle_cores=0.04), [1.0]).ttft == pytest.approx([0.11 / (1 - 0.04)])
    both = run([Role.MIXED] * 2, HostModel(2, idle_cores=0.04), [1.0, 1.0])
    assert both.ttft == pytest.approx([0.11 / (1 - 0.02)] * 2)
    assert run([Role.MIXED], HostModel(2, idle_cores=0.04), [1.0]).ttft == pytest.approx([0.11])


def test_an_engine_that_slept_wakes_slowly():
    # The second prompt comes while the first is computed, the third long after both.
    lines = run([Role.MIXED], HostModel(2, waking=0.02), [1.0, 1.05, 3.0])
    assert lines.ttft == pytest.approx([0.13, 0.08 + 0.11, 0.13])


def test_what_surrounds_the_engines_takes_its_share():
    # 0.05 core seconds of the request's own beside 0.11 of the step: they share until the former are done.
    lines = run([Role.MIXED], HostModel(1, cpu_per_request=0.03, cpu_per_prompt_token=2e-4), [1.0])
    assert lines.ttft == pytest.approx([0.16])
    # A token's work comes after its step: the next step shares the core with it.
    lines = run([Role.MIXED], HostModel(1, cpu_per_step=0.003, cpu_per_token=0.002), [1.0], output=3)
    assert lines.finish - lines.first_token == pytest.approx([2 * (0.011 + 0.005)])


def test_a_pull_takes_its_time_on_the_decode_instances_core():
    # Two steps of 0.011 s; the first pull ends long before, the second comes while they are computed.
    host = HostModel(2, cpu_per_pull=0.004, cpu_per_pulled_block=0.001)
    apart = run([Role.PREFILL, Role.DECODE], HostModel(2), [1.0, 1.12], output=30)
    lines = run([Role.PREFILL, Role.DECODE], host, [1.0, 1.12], output=30)
    assert lines.ttft == pytest.approx(apart.ttft)
    # Seven blocks of prompt: 0.011 s of work, all of it while the first request decodes.
    assert lines.finish[0] - apart.finish[0] == pytest.approx(0.011, abs=2e-3)


def test_light_work_keeps_away_from_engines_while_a_core_is_idle():
    lines = run([Role.MIXED], HostModel(2, cpu_per_request=10.0), [1.0])
    assert lines.ttft == pytest.approx([0.11])


def test_light_work_stays_where_it_was_when_all_cores_are_busy():
    # The second request's work and the third's find both cores computing, and slow the engine beside them alone.
    lines = run([Role.MIXED, Role.MIXED], HostModel(2, cpu_per_request=0.02), [1.0, 1.05])
    assert sorted(lines.ttft) == pytest.approx([0.11, 0.13])


@pytest.mark.parametrize("roles", [[Role.PREFILL, Role.DECODE], [Role.MIXED]])
@pytest.mark.parametrize(("prompt", "output"), [(41, 6), (137, 3), (290, 1)])
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_cores_for_all_are_no_host_at_all(seed, prompt, output, roles):
    # Fixed seeds: rounding decides between what happens at the very same time, and differs between the two.
    arrivals = np.cumsum(np.random.default_rng(seed).exponential(0.1, 12)).tolist()
    apart, shared = (
        run(roles, host, arrivals, prompt, output, delay=1e-4) for host in (None, HostModel(len(roles) + 1))
    )
    for name in ("first_token", "finish", "prefill_start", "decode_start"):
        assert getattr(shared, name) == pytest.approx(getattr(apart, name), abs=1e-6, nan_ok=True)


@dataclass(frozen=True)
class Staged:
    """A token takes 1 ms of each stage, and ``between`` of that from one to the next."""

    between: float = 0.0

    def seconds(self, shape: StepShape) -> float:
        return 1e-3 * (shape.num_prefill_tokens + shape.num_decodes)

    def handover(self, shape: StepShape) -> float:
        return self.between * self.seconds(shape)


TP, PP = ParallelConfig(tp=2), ParallelConfig(pp=2)


@pytest.mark.parametrize("parallel", [TP, PP, ParallelConfig(2, 2)])
@pytest.mark.parametrize("between", [0.1, 0.0, -0.3])
@pytest.mark.parametrize("roles", [[Role.PREFILL, Role.DECODE], [Role.MIXED]])
def test_ranks_with_cores_of_their_own_are_no_host_at_all(parallel, between, roles):
    arrivals = np.cumsum(np.random.default_rng(4).exponential(0.15, 12)).tolist()
    cores = len(roles) * parallel.num_ranks + 1
    step = Staged(between)
    apart, shared = (
        run(roles, host, arrivals, 90, 3, delay=1e-4, parallel=parallel, step=step) for host in (None, HostModel(cores))
    )
    for name in ("first_token", "finish", "prefill_start"):
        assert getattr(shared, name) == pytest.approx(getattr(apart, name), abs=1e-6, nan_ok=True)


def test_shards_compute_side_by_side_and_wait_for_the_slowest():
    assert run([Role.MIXED], HostModel(2), [1.0], parallel=TP, step=Staged()).ttft == pytest.approx([0.1])
    # The other instance's shards are on the same cores.
    both = run([Role.MIXED] * 2, HostModel(2), [1.0, 1.0], parallel=TP, step=Staged())
    assert both.ttft == pytest.approx([0.2 / SHARING] * 2)
    # Light work on one of the two cores holds up the shard there, and the other waits for it.
    lines = run([Role.MIXED], HostModel(2, cpu_per_step=0.05), [1.0], output=3, parallel=TP, step=Staged())
    assert lines.finish - lines.first_token == pytest.approx([2 * 0.002])


def test_stages_pass_a_prompt_on_and_take_the_next():
    lines = run([Role.MIXED], HostModel(2), [1.0, 1.01], 300, parallel=PP, step=Staged(0.1))
    assert lines.ttft == pytest.approx([0.63, 0.63 + 0.3 - 0.01])
    # The busiest stage takes 0.3 s of 0.48 in all.
    lines = run([Role.MIXED], HostModel(2), [1.0, 1.01], 300, parallel=PP, step=Staged(-0.4))
    assert lines.ttft == pytest.approx([0.48, 0.48 + 0.3 - 0.01])


def test_an_instance_with_more_ranks_than_cores_is_slowed_by_others_only():
    # What its ranks take from each other is in their times, measured on as many cores.
    four = ParallelConfig(2, 2)
    alone = run([Role.MIXED], HostModel(2), [1.0, 1.0], 300, parallel=four, step=Staged())
    assert alone.ttft == pytest.approx([0.6, 0.9])
    together = run([Role.MIXED] * 2, HostModel(2), [1.0, 1.0], 300, parallel=four, step=Staged())
    assert min(together.ttft) > 1.1


def test_a_lost_instance_of_several_ranks_frees_its_cores():
    model = cluster([Role.MIXED] * 2, HostModel(2), ParallelConfig(2, 2), 1e-4, Staged(0.1))
    workload = Workload(np.full(6, 100), np.full(6, 20), np.linspace(1.0, 1.5, 6))
    lost = simulate(model, workload, faults=[Fault(1.25, FaultKind.LOSS, "mixed-0")])
    assert (lost.timelines.status == 200).all()


def test_every_rank_takes_its_own_part_of_the_kv_in():
    host = HostModel(6, cpu_per_pull=0.16)
    roles = [Role.PREFILL, Role.DECODE]
    one, two = (run(roles, host, [1.0], output=100, parallel=p, step=Staged()) for p in (ParallelConfig(), TP))
    # Of 160 ms 100 pass while the prompt is computed; two cores do the rest in that time as well.
    assert one.finish[0] - two.finish[0] == pytest.approx(0.06, abs=2e-3)


def test_an_instance_that_starts_again_has_the_core_that_it_had():
    model = cluster([Role.MIXED] * 2, HostModel(2))
    workload = Workload(np.full(3, 100), np.full(3, 1), np.array([1.0, 9.0, 9.0]))
    faults = [Fault(2.0, FaultKind.LOSS, "mixed-1"), Fault(5.0, FaultKind.START, "mixed-1")]
    assert simulate(model, workload, faults=faults).timelines.ttft == pytest.approx([0.11] * 3)
