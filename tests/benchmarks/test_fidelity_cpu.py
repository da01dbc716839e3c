"""How fast a machine is against its profile, as a probe's requests show it."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.fidelity_cpu.predict import cluster_model
from benchmarks.fidelity_cpu.run import DEPLOYMENTS
from benchmarks.fidelity_cpu.speed import PROBE_MEAN_PROMPT, Speed, speed_of
from distserve.bench.workload import Workload
from simulator.latency.measured import ProfileLatencyModel
from simulator.model import ClusterModel
from simulator.simulation import simulate

RESULTS = Path(__file__).parents[2] / "benchmarks/fidelity_cpu/results"
REQUESTS = 40


def probe_at(cluster: ClusterModel) -> list[dict[str, Any]]:
    """What a client would have written down of some requests, a few of which always overlap."""
    rng = np.random.default_rng(3)
    arrivals = np.cumsum(rng.uniform(0.08, 0.24, REQUESTS))
    workload = Workload(rng.integers(200, 600, REQUESTS), rng.integers(20, 45, REQUESTS), arrivals)
    timelines = simulate(cluster, workload).timelines
    first_tokens = arrivals + timelines.ttft
    return [
        {
            "arrival": arrivals[i],
            "prompt_tokens": workload.prompt_lens[i],
            "output_tokens": workload.output_lens[i],
            "first_token": first_tokens[i],
            "finish": first_tokens[i] + timelines.tpot[i] * (workload.output_lens[i] - 1),
        }
        for i in range(REQUESTS)
    ]


@pytest.mark.parametrize("deployment", list(DEPLOYMENTS))
@pytest.mark.parametrize("speed", [Speed(), Speed(1.15, 0.92), Speed(0.9, 1.2)])
def test_a_probe_shows_the_speed_of_its_machine(deployment: str, speed: Speed) -> None:
    profile = ProfileLatencyModel.read(RESULTS / "profile-1-prefill-1-decode.json")

    def model_at(speed: Speed) -> ClusterModel:
        return cluster_model(profile, DEPLOYMENTS[deployment], PROBE_MEAN_PROMPT, speed=speed)

    found = speed_of(probe_at(model_at(speed)), model_at)
    assert found.prompts == pytest.approx(speed.prompts, rel=0.02)
    assert found.decodes == pytest.approx(speed.decodes, rel=0.02)


def test_speeds_that_differ_in_one_factor_are_not_near() -> None:
    assert Speed(1.0, 1.0).is_near(Speed(1.05, 0.96))
    assert not Speed(1.0, 1.0).is_near(Speed(1.0, 1.07))
    mean = Speed(1.0, 0.9).between(Speed(1.21, 0.9))
    assert mean.prompts == pytest.approx(1.1)
    assert mean.decodes == pytest.approx(0.9)
