"""Hybrid placements: proposed where they do better than both other kinds; the way to their simulation and launch."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st

from distserve.bench.lengths import Lognormal
from distserve.cluster.config import load_config
from distserve.core.config import SLO, Role
from distserve.core.errors import ConfigError
from distserve.demo import model_dir
from placement.candidates import Candidate, Kind, pairs
from placement.config import Overrides, load_problem
from placement.hybrids import fewer_gpus, find_seeds, hybrid_units
from placement.offered import Offered
from placement.outlook import Change
from placement.plan import Plan
from placement.planfile import write_plan
from placement.problem import Problem
from placement.race import Bounds
from placement.search import find_plan, silent
from placement.sensitivity import look_around
from placement.shapes import Shape, find_shapes
from placement.tasks import JointPoint, Setting
from placement.workers import Workers
from simulator.command import simulate
from simulator.replay import prepare
from tests.placement import plans
from tests.placement.conftest import OPT_13B, WriteConfig
from tests.placement.problems import ToyLatency, toy_problem


def shapes_of(problem: Problem) -> list[Shape]:
    return find_shapes(problem, Offered(problem.workload, problem.search.seed))[0]


def hybrid(problem: Problem, num_prefill: int, num_mixed: int) -> Candidate:
    """Of instances with one GPU each."""
    single = next(c for c in pairs(problem, shapes_of(problem), Role.MIXED) if c.num_gpus == 2)
    return single.with_counts(num_prefill, num_mixed)


# -- bounds ------------------------------------------------------------------------------------------------------------


@given(
    st.integers(1, 3),
    st.integers(1, 3),
    st.sampled_from([20, 100, 400]),
    st.sampled_from([2, 8, 40]),
    st.sampled_from([0.0, 1e-7]),
)
@settings(max_examples=6, deadline=None)
def test_no_hybrid_serves_more_than_its_bound(
    num_prefill: int, num_mixed: int, prompt: int, output: int, per_pair: float
) -> None:
    # Limits so loose that nothing but capacity keeps the rate down.
    problem = toy_problem(
        slo=SLO(0.3, 0.03),
        gpus_per_node=6,
        num_requests=2000,
        prompt=Lognormal(prompt, 0.8, 2000),
        output=Lognormal(output, 0.3, 100),
        latency=ToyLatency(per_pair=per_pair),
    )
    setting = Setting(problem, Offered(problem.workload))
    candidate = hybrid(problem, num_prefill, num_mixed)
    placement = candidate.placement(problem)
    assert placement is not None
    rate = 1.1 * Bounds(setting).of_candidate(candidate)
    assert not JointPoint(placement, rate)(setting).point.holds(problem.slo.attainment)


# -- candidates --------------------------------------------------------------------------------------------------------


def test_hybrids_are_made_of_the_leaders() -> None:
    problem = toy_problem(gpus_per_node=8)
    of = {(shape.role, shape.parallel.tp, shape.parallel.pp): shape for shape in shapes_of(problem)}
    apart = Candidate(((of[Role.PREFILL, 2, 1], 1), (of[Role.DECODE, 1, 1], 4)))
    together = Candidate(((of[Role.MIXED, 1, 2], 3),))
    seeds = find_seeds(problem, shapes_of(problem), [apart, together])
    assert {seed.single.pools[0][0] for seed in seeds} == {of[Role.PREFILL, 2, 1]}
    # Shaped like what decodes apart, or what does both together.
    assert {seed.single.pools[1][0] for seed in seeds} == {of[Role.MIXED, 1, 1], of[Role.MIXED, 1, 2]}
    units = hybrid_units(problem, seeds)
    assert all(unit.kind is Kind.HYBRID and unit.num_gpus <= 8 for unit in units)
    # A third of the GPUs is for prefill there, and here or thereabouts: one of them has just that.
    assert any(3 * 2 * unit.pools[0][1] == unit.num_gpus for unit in units)
    assert find_seeds(problem, shapes_of(problem), [together]) == []


# -- the search --------------------------------------------------------------------------------------------------------


def toy_chat(rate: float | None = None, **changes: Any) -> Problem:
    """Two prompts in one step are too many for those that decode, and one prefill instance is a little too few."""
    return toy_problem(
        rate,
        slo=SLO(0.3, 0.012),
        prompt=Lognormal(100, 0.8, 1000),
        output=Lognormal(10, 0.3, 100),
        latency=ToyLatency(efficiency=0.3),
        max_pp=1,
        **{"gpus_per_node": 2} | changes,
    )


@pytest.fixture(scope="module")
def plan() -> Plan:
    return find_plan(toy_chat())


def test_a_hybrid_is_proposed_where_it_serves_more_than_both_others(plan: Plan) -> None:
    assert plan.chosen.kind is Kind.HYBRID
    assert plan.hybrid is plan.chosen
    assert plan.disaggregated is not None
    assert plan.colocated is not None
    best = max(plan.disaggregated.goodput_per_gpu, plan.colocated.goodput_per_gpu)
    assert plan.chosen.goodput_per_gpu > 1.01 * best


def test_hybrids_change_nothing_else_in_the_answer_and_can_be_left_out(plan: Plan) -> None:
    problem = toy_chat(hybrid=False)
    without = find_plan(problem)
    assert without.hybrid is None
    assert (without.disaggregated, without.colocated) == (plan.disaggregated, plan.colocated)


def test_where_a_hybrid_does_no_better_it_is_not_proposed() -> None:
    # A load so light that one GPU does.
    light = find_plan(toy_problem(0.5))
    assert light.chosen.kind is Kind.COLOCATED
    assert light.hybrid is None


def test_at_a_rate_the_smallest_hybrid_below_what_is_known_is_found() -> None:
    problem = toy_chat(60.0, gpus_per_node=4)
    setting = Setting(problem, Offered(problem.workload))
    leader = next(pairs(problem, shapes_of(problem)))
    seeds = find_seeds(problem, shapes_of(problem), [leader])
    with Workers(setting, 1) as workers:
        found = fewer_gpus(setting, workers, Bounds(setting), seeds, 60.0, 5, silent)
        (holding,) = found.holding
        assert holding.candidate.num_gpus == 2
        assert holding.measurement.point.surely_holds(problem.slo.attainment)
        # It has to take fewer than that.
        assert fewer_gpus(setting, workers, Bounds(setting), seeds, 60.0, 2, silent).holding == []


def test_without_its_prefill_instance_a_hybrid_serves_on(plan: Plan) -> None:
    losses = {variant.label: variant for variant in look_around(plan).of(Change.LOSS)}
    assert losses["one prefill lost"].point is not None
    assert losses["one mixed lost"].point is None


# -- from a configuration to a deployment ------------------------------------------------------------------------------


@pytest.fixture
def written(write_config: WriteConfig) -> tuple[Path, Plan]:
    """A configuration and a hybrid plan for it, with what was simulated of it, in a file beside."""
    model = write_config().with_name("opt")
    model.mkdir()
    (model / "config.json").write_text(json.dumps(OPT_13B))
    config = write_config(model="opt")
    problem = load_problem(config, Overrides())
    placement = hybrid(problem, 1, 1).placement(problem)
    assert placement is not None
    assert problem.rate is not None
    point = JointPoint(placement, problem.rate)(Setting(problem, Offered(problem.workload))).point
    found = replace(plans.evaluation("1 prefill TP1 + 1 mixed TP1", placement, 4.0, 4.0), point=point)
    plan = replace(plans.plan(problem.rate), problem=problem, chosen=found, hybrid=found)
    write_plan(config.with_name("plan.yaml"), plan, config)
    return config.with_name("plan.yaml"), plan


def test_a_hybrid_plan_is_simulated_from_its_file_as_it_was_planned(written: tuple[Path, Plan]) -> None:
    path, plan = written
    result = CliRunner().invoke(simulate, [str(path), "--requests", "1500", "--json"])
    assert result.exit_code == 0, result.output
    summary = json.loads(result.stdout)["summary"]
    assert [instance["role"] for instance in summary["instances"]] == ["prefill", "mixed"]
    assert summary["attainment"]["both"] == pytest.approx(plan.chosen.point.attainment.estimate, abs=0.05)
    # The router knows the objective that prompts are divided for, and some are computed where they are decoded.
    unsaid = dict.fromkeys(("placement", "rate", "duration", "latency", "profile"))
    replay = prepare(path, unsaid | {"requests": 500, "warmup": 0.0, "seed": 0, "faults": ()})
    assert replay.model.router.slo == plan.problem.slo
    replay.run(lambda _: None)
    lines = replay.simulation.timelines
    assert set(np.unique(lines.prefill_id)) == {0, 1}


def test_a_hybrid_plan_is_what_launch_starts(written: tuple[Path, Plan]) -> None:
    path, plan = written
    config = load_config(path, {"model": str(path.with_name("opt"))}, model_dir())
    expected = [(placed.spec.role, placed.spec.parallel, placed.gpus) for placed in plan.chosen.placement.instances]
    assert [(wanted.role, wanted.parallel, wanted.gpus) for wanted in config.instances] == expected
    assert config.slo == plan.problem.slo


def test_the_section_search_says_whether_hybrids_are_looked_at(write_config: WriteConfig) -> None:
    assert load_problem(write_config(), Overrides()).search.hybrid
    assert not load_problem(write_config(search={"hybrid": False}), Overrides()).search.hybrid


@pytest.mark.parametrize(
    ("search", "expected"),
    [
        ({"hybrd": True}, "search.hybrd is unknown; known here: hybrid"),
        ({"hybrid": "perhaps"}, "search.hybrid: 'perhaps' is wrong"),
    ],
)
def test_mistakes_in_the_section_search_are_named(write_config: WriteConfig, search: Any, expected: str) -> None:
    with pytest.raises(ConfigError, match=expected):
        load_problem(write_config(search=search), Overrides())
