import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from distserve.bench.arrivals import Gamma
from distserve.bench.lengths import Lognormal
from distserve.bench.workload import WorkloadSpec
from distserve.core.config import InstanceSpec, KvConfig, Role, SchedulerConfig
from distserve.core.latency import LinearStepTime, StepShape
from simulator.load import BatchRecorder, kv_use, stages
from simulator.model import ClusterModel, InstanceModel
from simulator.results import Simulation
from simulator.simulation import Fault, FaultKind, simulate

SCHEDULER = SchedulerConfig(max_batch_tokens=2048, max_batch_size=64, max_model_len=4096)


def small_run() -> tuple[Simulation, ClusterModel]:
    step_time = LinearStepTime(base=0.01, per_token=1e-5, per_pair=0.0, per_context=1e-7)
    model = ClusterModel(
        tuple(
            InstanceModel(InstanceSpec(f"{role}-0", role, KvConfig(2000), SCHEDULER), step_time)
            for role in (Role.PREFILL, Role.DECODE)
        )
    )
    spec = WorkloadSpec(Gamma(), Lognormal(300, 0.8, 2000), Lognormal(40, 0.6, 300), num_requests=200, seed=3)
    return simulate(model, spec.at(10.0)), model


@given(st.lists(st.tuples(st.floats(0, 2), st.floats(1e-3, 3), st.integers(1, 9)), min_size=1, max_size=30))
def test_batches_over_time_keep_what_was_computed_however_long_the_run(steps: list[tuple[float, float, int]]) -> None:
    recorder = BatchRecorder()
    time = weighted = 0.0
    for gap, seconds, size in steps:
        start = time + gap
        time = start + seconds
        recorder.on_step("decode-0", 0, start, time, StepShape(num_decodes=size))
        recorder.on_step("decode-0", 1, start, time, StepShape(num_decodes=size))
        weighted += size * seconds
    batch = recorder.batch("decode-0")
    assert recorder.times[-1] + recorder.width / 2 > time
    assert batch.sum() * recorder.width == pytest.approx(weighted)
    assert batch.max() <= 9 + 1e-9


def test_an_instance_that_never_worked_has_no_batch() -> None:
    assert not BatchRecorder().batch("decode-0").any()


def test_requests_by_stage_add_up_to_those_in_the_system() -> None:
    simulation, _ = small_run()
    timelines = simulation.timelines
    found = stages(timelines, simulation.duration, 101)
    for i, time in enumerate(found.times):
        inside = int(((timelines.arrival <= time) & (timelines.finish > time)).sum())
        counts = [int(part[i]) for part in (found.waiting, found.prefill, found.moving, found.decode)]
        assert min(counts) >= 0
        assert sum(counts) == inside


def test_kv_memory_is_what_the_requests_hold() -> None:
    simulation, model = small_run()
    timelines = simulation.timelines
    times = np.linspace(0, simulation.duration, 57) + 1e-7
    held = kv_use(simulation, model.instances[1], 1, times)
    for time, share in zip(times, held, strict=True):
        tokens = 0.0
        for i in np.flatnonzero(timelines.decode_id == 1):
            start, end = timelines.migration_start[i], timelines.finish[i]
            if start <= time < end:
                begin = max(timelines.first_token[i], timelines.decode_start[i])
                tokens += timelines.prompt_tokens[i]
                tokens += timelines.output_tokens[i] * max(time - begin, 0.0) / (end - begin)
        assert share * 2000 * 16 == pytest.approx(tokens, abs=1e-3)
    assert 0 < held.max() <= math.nextafter(1.0, 2.0)


def test_kv_memory_is_held_by_what_an_instance_did_and_not_by_the_role_it_began_with() -> None:
    """A decode instance that becomes a prefill one holds prompts until they are pulled, and what failed is not held."""
    step_time = LinearStepTime(base=0.01, per_token=1e-5, per_pair=0.0, per_context=1e-7)
    model = ClusterModel(
        tuple(
            InstanceModel(InstanceSpec(f"{role}-{number}", role, KvConfig(4000), SCHEDULER), step_time)
            for role, number in ((Role.PREFILL, 0), (Role.DECODE, 0), (Role.DECODE, 1))
        )
    )
    spec = WorkloadSpec(Gamma(), Lognormal(300, 0.8, 2000), Lognormal(100, 0.6, 300), num_requests=200, seed=3)
    changed = simulate(model, spec.at(10.0), faults=[Fault(5.0, FaultKind.PREFILL, "decode-1")])
    lines = changed.timelines
    times = np.linspace(0, changed.duration, 301) + 1e-7
    late = times[times > lines.finish[lines.decode_id == 2].max()]
    mine = lines.prefill_id == 2
    assert (lines.decode_id[mine] == 1).sum() > 20
    until = np.where(lines.decode_id[mine] == 1, lines.migration_end[mine], lines.finish[mine])
    is_held = (lines.prefill_start[mine] <= late[:, None]) & (late[:, None] < until)
    held = kv_use(changed, model.instances[2], 2, late)
    assert held * 4000 * 16 == pytest.approx((is_held * lines.prompt_tokens[mine]).sum(axis=1), abs=1e-3)
    lost = simulate(model, spec.at(10.0), faults=[Fault(5.0, FaultKind.LOSS, f"decode-{i}") for i in range(2)])
    assert (lost.timelines.status == 503).any()
    assert kv_use(lost, model.instances[0], 0, np.array([lost.duration])) == 0
