"""Predicted against measured: the same requests, counted alike; and the way back from an observation to a plan."""

from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
import yaml
from rich.console import Console

from distserve.bench.arrivals import Gamma
from distserve.bench.lengths import Fixed
from distserve.bench.workload import WorkloadSpec
from distserve.core.config import SLO, InstanceSpec, KvConfig, ParallelConfig, Role
from distserve.core.errors import ConfigError
from distserve.core.profile import FORMAT, ClusterCosts, Profile, ShapeProfile, StepFit, Surface, Table
from distserve.core.topology import ClusterSpec, Gpu, Placement
from placement.drift import Expected
from placement.plan import Interval, Percentiles
from placement.replan import write_replan
from placement.trial import Figures, Trial, as_started, predict, table, verdict
from placement.watch import LoadWatch
from simulator.latency.measured import ProfileLatencyModel
from simulator.sections import WorkloadSection
from tests.placement.plans import CLUSTER, instance, problem

SPEED = Percentiles(0.1, 0.1, 0.2, 0.4)
CPUS = ClusterSpec("cpu", 1, 2, 10e9, 1e9)


def figures(share: float, num: int, speed: Percentiles = SPEED) -> Figures:
    half = 2 * (share * (1 - share) / num) ** 0.5
    return Figures(num, Interval(share, share - half, share + half), speed, speed)


def text(trial: Trial) -> str:
    console = Console(width=120)
    with console.capture() as captured:
        console.print(table(trial, SLO(0.25, 0.1)))
    return captured.get()


def test_the_table_says_how_far_apart_they_are() -> None:
    shown = text(Trial(4.0, figures(0.95, 200), figures(0.91, 200, Percentiles(0.12, 0.12, 0.25, float("nan")))))
    assert "200 requests at 4/s" in shown
    assert "95.0%" in shown
    assert "-4.0 points" in shown
    assert "+20%" in shown
    assert "+25%" in shown
    assert "nan" not in shown


def test_the_verdict_allows_for_chance_and_for_no_more() -> None:
    assert "agrees" in verdict(Trial(4.0, figures(0.95, 200), figures(0.91, 200)))
    assert "below" in verdict(Trial(4.0, figures(0.95, 2000), figures(0.75, 2000)))
    assert "above" in verdict(Trial(4.0, figures(0.5, 2000), figures(0.9, 2000)))


def test_a_prediction_of_a_placement_as_it_was_started_counts_every_request() -> None:
    asked = problem()
    placed = [instance("p", Role.PREFILL, 2, [(0, 0), (0, 1)]), instance("d", Role.DECODE, 2, [(0, 2), (0, 3)])]
    placement = as_started(tuple(p.gpus for p in placed), tuple(p.spec for p in placed), CLUSTER)
    assert placement.instances == tuple(placed)
    workload = WorkloadSpec(Gamma(), Fixed(500), Fixed(50), num_requests=60).at(2.0)
    found = predict(asked, placement, workload)
    assert found.num_requests == 60
    assert found.attainment.low <= found.attainment.estimate <= found.attainment.high
    assert 0 < found.ttft.p50 <= found.ttft.p99 < 10
    assert found.tpot.p50 > 0


def test_a_profiled_machine_is_shared_with_what_surrounds_the_instances() -> None:
    fit = StepFit(Surface((1, 8), (10, 100), ((0.01, 0.01), (0.01, 0.01))), Table((1, 64), (0.01, 0.05)), 0, 0, 0, 0, 0)
    nothing = ClusterCosts(**{field.name: 0.0 for field in fields(ClusterCosts)})
    placed = [instance("prefill-0", Role.PREFILL, 1, [(0, 0)]), instance("decode-0", Role.DECODE, 1, [(0, 1)])]
    workload = WorkloadSpec(Gamma(), Fixed(64), Fixed(20), num_requests=40).at(2.0)

    def tpot(costs: ClusterCosts | None) -> float:
        profile = Profile(
            FORMAT,
            "",
            {"cores": 1},
            "toy",
            "",
            "float32",
            1,
            16,
            128,
            {},
            (ShapeProfile(ParallelConfig(), fit),),
            costs,
        )
        asked = replace(problem(), cluster=CPUS, latency=ProfileLatencyModel(profile))
        return predict(asked, Placement(CPUS, tuple(placed)), workload).tpot.p50

    # Of a single core a token's 10 ms of streaming take as much as the decode step before it.
    assert tpot(replace(nothing, cpu_per_token=0.01)) > 1.5 * tpot(None)


def test_instances_without_gpus_take_the_clusters_in_order() -> None:
    specs = tuple(InstanceSpec(f"{role}-0", role, KvConfig(8)) for role in (Role.PREFILL, Role.DECODE))
    placement = as_started(((), ()), specs, CPUS)
    assert [p.gpus for p in placement.instances] == [(Gpu(0, 0),), (Gpu(0, 1),)]
    wide = InstanceSpec("mixed-0", Role.MIXED, KvConfig(8), parallel=ParallelConfig(3))
    with pytest.raises(ConfigError, match="3 ranks"):
        as_started(((),), (wide,), CPUS)


def test_an_observation_becomes_a_configuration_to_plan_from(tmp_path: Path) -> None:
    file = tmp_path / "my service.yaml"
    file.write_text("slo: {ttft: 1, tpot: 0.1}\nworkload: {prompt: 10}\nplacement: plan.yaml\nprediction: {rate: 3}\n")
    spec = WorkloadSpec(Gamma(), Fixed(300), Fixed(60))
    watch = LoadWatch(Expected.of(spec, 10.0, 60.0), 60.0)
    for number, time in enumerate(np.arange(100, 140, 0.05)):
        watch.arrived(str(number), time, 400)
        watch.ended(str(number), 80, complete=True)
    command = write_replan(file, watch, 140.0, Path("profile.json"))
    written = tmp_path / "my service.observed.yaml"
    assert command == f"distserve plan '{written}' --profile profile.json"
    data = yaml.safe_load(written.read_text())
    assert data["slo"] == {"ttft": 1, "tpot": 0.1}
    assert data["placement"] == "auto"
    assert "prediction" not in data
    workload = WorkloadSection.model_validate(data["workload"])
    assert workload.arrivals.rate == 20
    trace = workload.spec(tmp_path).trace
    assert trace is not None
    assert len(trace) == 800
    assert set(trace.prompt_lens) == {400}
