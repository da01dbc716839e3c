import numpy as np
import pytest

from distserve.bench.workload import Workload
from distserve.core.config import InstanceSpec, KvConfig, ParallelConfig, Role, SchedulerConfig
from distserve.core.errors import ConfigError
from distserve.core.latency import LinearStepTime
from simulator.model import ClusterModel, Delays, HostModel, InstanceModel
from simulator.results import Timelines
from simulator.simulation import simulate

STEP = LinearStepTime(base=0.01, per_token=1e-3, per_pair=0.0, per_context=0.0)


def cluster(roles: list[Role], host: HostModel | None, tp: int = 1, delay: float = 0.0) -> ClusterModel:
    specs = [
        InstanceSpec(f"{role}-{index}", role, KvConfig(512), SchedulerConfig(), ParallelConfig(tp=tp))
        for index, role in enumerate(roles)
    ]
    instances = tuple(InstanceModel(spec, STEP) for spec in specs)
    return ClusterModel(instances, delays=Delays(message=delay, pull_latency=0.0, seconds_per_block=0.0), host=host)


def run(
    roles: list[Role],
    host: HostModel | None,
    arrivals: list[float],
    prompt: int = 100,
    output: int = 1,
    delay: float = 0.0,
) -> Timelines:
    count = len(arrivals)
    workload = Workload(np.full(count, prompt), np.full(count, output), np.array(arrivals))
    return simulate(cluster(roles, host, delay=delay), workload).timelines


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


def test_a_crowded_step_is_slower_than_its_light_work():
    model = {"cpu_per_step": 0.003, "crowding": 0.002}
    lines = run([Role.MIXED], HostModel(1, **model), [1.0], output=3)
    assert lines.finish - lines.first_token == pytest.approx([2 * (0.011 + 0.005)])
    # With a core to spare there is no crowd.
    lines = run([Role.MIXED], HostModel(2, **model), [1.0], output=3)
    assert lines.finish - lines.first_token == pytest.approx([2 * 0.011])


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


def test_several_ranks_on_a_shared_host_are_refused():
    workload = Workload(np.array([1]), np.array([1]), np.array([0.0]))
    with pytest.raises(ConfigError, match="one rank each"):
        simulate(cluster([Role.MIXED], HostModel(2), tp=2), workload)
