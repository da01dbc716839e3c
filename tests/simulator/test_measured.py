from dataclasses import replace
from pathlib import Path

import pytest

from distserve.core.config import ParallelConfig
from distserve.core.errors import ConfigError
from distserve.core.latency import StepShape
from distserve.core.profile import FORMAT, ClusterCosts, Profile, ShapeProfile, StepFit, Surface, Table
from distserve.core.scheduler import ROUTER
from simulator.latency.interface import LatencyModel
from simulator.latency.measured import ProfileLatencyModel
from simulator.simulation import CLIENT

COSTS = ClusterCosts(
    step=1e-3, step_per_sequence=1e-5, message=5e-4, request=2e-3, request_per_token=1e-5, token=3e-4, pull=1e-3,
    pull_per_byte=1e-9, cpu_per_request=1e-3, cpu_per_prompt_token=1e-6, cpu_per_step=1e-4, cpu_per_token=1e-5,
    cpu_per_pull=2e-3, cpu_per_pulled_token=1e-6,    idle_cores=0.1,
)  # fmt: skip


FIT = StepFit(Surface((1, 8), (10, 100), ((0.01, 0.02), (0.02, 0.03))), Table((1, 64), (0.01, 0.05)), 0, 0, 0, 0, 0)
ONE = ShapeProfile(ParallelConfig(), FIT)


def make_profile(costs: ClusterCosts | None = COSTS, *shapes: ShapeProfile) -> Profile:
    machine = {"cpu": "a processor"}
    return Profile(
        FORMAT, "2026-11-21T00:00:00", machine, "tiny", "", "float32", 2, 16, 128, {}, shapes or (ONE,), costs
    )


def test_a_profile_is_a_source_of_latencies():
    model: LatencyModel = ProfileLatencyModel(make_profile())
    assert "tiny" in model.source
    assert "2 threads of a processor" in model.source
    assert "2026-11-21" in model.source
    step_time = model.step_time(ParallelConfig())
    assert step_time.seconds(StepShape(num_decodes=8, decode_context=80)) == pytest.approx(0.02 + 1e-3 + 8e-5)
    assert step_time.handover(StepShape()) == 0


def test_shapes_it_never_saw_are_refused_with_the_command_that_measures_them():
    model = ProfileLatencyModel(make_profile(COSTS, ONE, ShapeProfile(ParallelConfig(2, 1), FIT)))
    assert "tp x pp 1x1, 2x1" in model.source
    with pytest.raises(
        ConfigError, match=r"has instances of tp x pp 1x1, 2x1, not 1x2.*--shape 1x1 --shape 2x1 --shape 1x2"
    ):
        model.step_time(ParallelConfig(pp=2))


def test_every_measured_shape_has_its_own_times():
    through = FIT.raised(0.015, 0.0)
    model = ProfileLatencyModel(make_profile(COSTS, ONE, ShapeProfile(ParallelConfig(1, 2), FIT, through=through)))
    step = StepShape(num_decodes=8, decode_context=80)
    time = model.step_time(ParallelConfig(1, 2))
    cluster = 1e-3 + 8e-5
    assert time.seconds(step) == pytest.approx(0.02 + cluster)
    # A lone step takes what it took through both stages, and what a cluster adds once.
    assert 2 * time.seconds(step) + time.handover(step) == pytest.approx(0.035 + cluster)
    with pytest.raises(ConfigError, match="between nodes"):
        model.step_time(ParallelConfig(1, 2), stages_share_node=False)


def test_delays_as_measured():
    delays = ProfileLatencyModel(make_profile()).delays(("prefill-0", "decode-0"), mean_prompt=100)
    assert delays.message == COSTS.message
    assert delays.pairs[CLIENT, ROUTER] == pytest.approx(5e-4 + 2e-3 + 1e-3)
    assert delays.pairs["decode-0", CLIENT] == pytest.approx(5e-4 + 3e-4)
    assert delays.seconds_per_block == pytest.approx(16 * 128 * 1e-9)
    with pytest.raises(ConfigError, match="without --engine-only"):
        ProfileLatencyModel(make_profile(None)).delays(())


def test_a_missing_file_is_named(tmp_path: Path):
    with pytest.raises(ConfigError, match=r"nothing\.json"):
        ProfileLatencyModel.read(tmp_path / "nothing.json")


def test_the_host_as_measured():
    host = ProfileLatencyModel(replace(make_profile(), machine={"cores": 4})).host()
    # Two threads each: an instance's share of the machine is half as many cores, twice as fast.
    assert host.num_cores == 2
    assert host.cpu_per_step == pytest.approx(COSTS.cpu_per_step / 2)
