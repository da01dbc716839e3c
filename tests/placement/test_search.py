"""The planner's answers against exhaustive search, and its promises."""

import re
from dataclasses import replace

import numpy as np
import pytest

from distserve.bench.arrivals import TraceTimes
from distserve.bench.lengths import Fixed
from distserve.bench.traces import Trace
from distserve.bench.workload import WorkloadSpec
from distserve.core.config import SLO, ParallelConfig, Role
from placement.bounds import bound_shape, network_capacity
from placement.candidates import Kind, colocated, pairs, replications
from placement.fewest import fewest_gpus
from placement.offered import Offered
from placement.plan import UnreachableError
from placement.race import Bounds
from placement.search import find_plan, silent
from placement.shapes import find_shapes
from placement.tasks import JointGoodput, JointPoint, PhaseGoodput, PhasePoint, Setting
from placement.workers import Workers
from simulator.latency.memory import workspace_bytes
from simulator.model import Delays
from tests.placement.problems import TOY, ToyLatency, toy_problem


def every_candidate(problem):
    """All counts of all shapes that the cluster has room for."""
    offered = Offered(problem.workload, problem.search.seed)
    shapes, _ = find_shapes(problem, offered)
    found = []
    for single in [*pairs(problem, shapes), *pairs(problem, shapes, Role.MIXED), *colocated(shapes)]:
        for candidate in replications(problem, single):
            placement = candidate.placement(problem)
            if placement is not None:
                found.append((candidate, placement))
    return Setting(problem, offered), found


@pytest.mark.parametrize(
    ("slo", "latency"),
    [
        (SLO(0.1, 0.02), ToyLatency()),
        (SLO(0.15, 0.008), ToyLatency(base=0.003, per_context=1e-5)),
    ],
)
def test_on_a_small_cluster_the_answer_is_that_of_exhaustive_search(slo, latency):
    problem = toy_problem(slo=slo, latency=latency, max_pp=1)
    plan = find_plan(problem)
    setting, candidates = every_candidate(problem)
    assert len(candidates) >= 8
    for candidate, placement in candidates:
        # Attainment falls with the rate: what fails here has no goodput above it.
        rate = plan.chosen.goodput_per_gpu / 0.93 * candidate.num_gpus
        point = JointPoint(placement, rate, fine=True)(setting).point
        assert not point.holds(slo.attainment), candidate


def test_at_a_rate_no_smaller_placement_holds():
    rate = 60.0
    problem = toy_problem(rate, gpus_per_node=4, max_pp=1)
    plan = find_plan(problem)
    assert plan.holds
    assert plan.chosen.point.rate == rate
    setting, candidates = every_candidate(problem)
    for candidate, placement in candidates:
        if candidate.num_gpus < plan.chosen.num_gpus:
            point = JointPoint(placement, rate, fine=True)(setting).point
            assert not point.surely_holds(problem.slo.attainment), candidate


class Watched(Workers):
    """Notes how many GPUs the placements have that are simulated together."""

    def __init__(self, setting):
        super().__init__(setting, 1)
        self.rounds = []

    def run(self, tasks):
        self.rounds.append([task.placement.num_gpus for task in tasks])
        return super().run(tasks)


def test_the_search_goes_on_while_a_smaller_placement_may_hold():
    """Two of TP1 miss, and beside them two of TP2 hold: three of TP1 are fewer GPUs, not looked at until then."""
    problem = toy_problem(gpus_per_node=4, max_pp=1, slo=SLO(0.3, 0.05), latency=ToyLatency(efficiency=0.5))
    setting = Setting(problem, Offered(problem.workload))
    bounds = Bounds(setting)
    shapes, _ = find_shapes(problem, setting.offered)
    mixed = [shape for shape in shapes if shape.role is Role.MIXED and shape.num_gpus <= 2]
    rate = 1.8 * bounds.of_shape(mixed[0]).capacity
    with Watched(setting) as workers:
        found = fewest_gpus(setting, workers, bounds, colocated(mixed), rate, 1, silent)
    assert [str(entry.candidate) for entry in found.holding] == ["3 mixed TP1"]
    assert workers.rounds == [[2, 4], [3]]


def test_never_more_than_a_known_feasible_plan():
    problem = toy_problem(20.0, gpus_per_node=3, max_pp=1)
    setting, candidates = every_candidate(problem)
    candidate, placement = next(
        (candidate, placement)
        for candidate, placement in sorted(candidates, key=lambda item: item[0].num_gpus)
        if JointPoint(placement, 20.0, fine=True)(setting).point.surely_holds(0.9)
    )
    plan = find_plan(problem, paper=candidate)
    assert plan.chosen.num_gpus <= candidate.num_gpus
    assert plan.paper is not None
    assert plan.paper.placement == placement


def test_the_answer_does_not_depend_on_the_number_of_workers():
    problem = toy_problem(gpus_per_node=2, num_requests=60, max_requests=200, max_pp=1)
    alone = find_plan(problem)
    together = find_plan(replace(problem, search=replace(problem.search, num_workers=2)))
    assert together.chosen == alone.chosen
    assert together.finalists == alone.finalists
    assert together.stats.num_requests == alone.stats.num_requests


@pytest.mark.parametrize("rate", [None, 4.0])
def test_a_given_placement_that_serves_nothing_is_said_to(rate):
    # One GPU takes too long for most prompts, two do not.
    problem = toy_problem(rate, slo=SLO(0.042, 0.02), gpus_per_node=4, max_pp=1)
    shapes, _ = find_shapes(problem, Offered(problem.workload))
    slow = next(pair for pair in pairs(problem, shapes) if all(shape.num_gpus == 1 for shape, _ in pair.pools))
    plan = find_plan(problem, paper=slow)
    assert plan.paper is not None
    assert plan.paper.goodput.estimate == 0.0
    together = find_plan(replace(problem, search=replace(problem.search, num_workers=2)), paper=slow)
    assert together.paper is not None
    assert together.paper.goodput == plan.paper.goodput
    assert together.chosen == plan.chosen


@pytest.mark.parametrize("rate", [None, 4.0])
def test_a_given_placement_without_room_is_said_to_have_none(rate):
    problem = toy_problem(rate, gpus_per_node=2, max_pp=1)
    shapes, _ = find_shapes(problem, Offered(problem.workload))
    plan = find_plan(problem, paper=next(pairs(problem, shapes)).with_counts(2, 2))
    assert plan.paper is None
    assert any("2 prefill TP1 + 2 decode TP1" in note and "no room" in note for note in plan.notes)


@pytest.mark.parametrize("rate", [None, 4.0])
def test_a_given_placement_may_be_the_only_one(rate):
    problem = toy_problem(rate, gpus_per_node=1, max_pp=1)
    shapes, _ = find_shapes(problem, Offered(problem.workload))
    (alone,) = colocated(shapes)
    plan = find_plan(problem, paper=alone)
    assert plan.chosen is plan.paper
    assert plan.chosen.goodput.estimate > 0


def test_bounds_are_above_what_is_simulated():
    problem = toy_problem(gpus_per_node=2, num_requests=1500)
    offered = Offered(problem.workload)
    shapes, _ = find_shapes(problem, offered)
    for shape in shapes:
        if shape.role is not Role.MIXED:
            bound = bound_shape(problem, offered, shape)
            found = PhaseGoodput(shape, 1, 1.4 * bound.capacity)(Setting(problem, offered))
            assert 0 < found.low <= 1.03 * bound.capacity


@pytest.mark.parametrize("role", [Role.PREFILL, Role.DECODE])
def test_lone_requests_take_what_the_bounds_say(role):
    # Messages without delay: beside the steps themselves, a first decode step waits for a few of them.
    problem = replace(toy_problem(slo=SLO(0.0435, 0.0048), num_requests=400), delays=Delays(message=0.0))
    offered = Offered(problem.workload)
    shapes, _ = find_shapes(problem, offered)
    shape = next(s for s in shapes if s.role is role and s.num_gpus == 1)
    bound = bound_shape(problem, offered, shape)
    point = PhasePoint(shape, 1, 0.5)(Setting(problem, offered)).point
    assert 0.2 < bound.attainment < 1.0
    assert bound.attainment - 0.1 < point.attainment.estimate <= bound.attainment + 0.04


def test_kv_that_must_cross_nodes_is_bounded_by_the_cards():
    problem = toy_problem(gpus_per_node=1, num_nodes=2, bandwidth=2e6)
    setting, candidates = every_candidate(problem)
    _, placement = next(item for item in candidates if item[0].kind is Kind.DISAGGREGATED)
    bound = network_capacity(problem, setting.offered, placement)
    prompts, _ = setting.offered.sample
    assert bound == pytest.approx(2e6 / (prompts.mean() * problem.model.kv.bytes_per_token), rel=0.01)
    goodput = JointGoodput(placement, 4 * bound)(setting)
    assert goodput.interval.estimate <= 1.05 * bound


def test_ties_go_to_fewer_gpus():
    # So light a load that one GPU does, colocated: nothing with two can be the answer.
    plan = find_plan(toy_problem(0.5))
    assert plan.chosen.num_gpus == 1
    assert plan.chosen.kind is Kind.COLOCATED
    assert plan.disaggregated is not None
    assert plan.disaggregated.num_gpus == 2


@pytest.mark.parametrize(
    ("problem", "constraint", "words"),
    [
        (toy_problem(slo=SLO(1e-4, 0.02)), "ttft", "lone prompt"),
        (toy_problem(slo=SLO(0.1, 1e-5)), "tpot", "per token"),
        (toy_problem(1e5), "rate", "GPUs"),
        (toy_problem(kv_tokens=64), "memory", "KV memory"),
    ],
)
def test_what_is_out_of_reach_says_why(problem, constraint, words):
    with pytest.raises(UnreachableError, match=words) as caught:
        find_plan(problem)
    assert caught.value.constraint == constraint
    assert caught.value.advice


def test_a_model_that_fits_no_shape_says_so():
    problem = toy_problem()
    limits = replace(problem.limits, kv_tokens=None, memory_bytes=300_000_000)
    with pytest.raises(UnreachableError, match="fits no shape"):
        find_plan(replace(problem, limits=limits))


def test_limits_that_no_rate_meets_are_said_with_what_an_idle_deployment_reaches():
    problem = toy_problem()
    offered = Offered(problem.workload)
    shapes, _ = find_shapes(problem, offered)
    fastest = min(bound_shape(problem, offered, shape).ttft for shape in shapes if shape.role is not Role.DECODE)
    # Messages take longer than the steps of a lone prompt leave.
    with pytest.raises(UnreachableError, match=r"at no rate: even at .* serves \d\d\.\d% within both") as caught:
        find_plan(replace(problem, slo=SLO(1.0003 * fastest, 0.02)))
    assert caught.value.constraint == "both limits"


def test_a_rate_that_decoding_alone_exceeds_is_said_so():
    problem = toy_problem(400.0, prompt=Fixed(4), output=Fixed(400), gpus_per_node=2, max_pp=1)
    with pytest.raises(UnreachableError, match=r"400 requests/s exceed what 2 GPUs can compute, about") as caught:
        find_plan(problem)
    prompts, decoding = (int(found) for found in re.findall(r"(\d+) GPUs, decoding (\d+)", str(caught.value))[0])
    assert prompts <= 2 < decoding


def test_ties_go_to_fewer_nodes():
    plan = find_plan(toy_problem(60.0, num_nodes=2, gpus_per_node=4, max_pp=1))
    assert 1 < plan.chosen.num_gpus <= 4
    assert plan.chosen.placement.num_nodes == 1


def test_an_instance_may_have_its_stages_on_several_nodes():
    problem = toy_problem(num_nodes=2, gpus_per_node=1)
    assert {shape.nodes for shape in find_shapes(problem, Offered(problem.workload))[0]} == {1, 2}


def test_answers_of_one_token_are_planned_for():
    plan = find_plan(toy_problem(output=Fixed(1)))
    assert plan.chosen.goodput_per_gpu > 0
    with pytest.raises(UnreachableError, match=r"about \d"):
        find_plan(toy_problem(1e5, output=Fixed(1)))


def test_a_mixed_step_has_room_for_every_sequence():
    problem = toy_problem(slo=SLO(0.1, 1e-3))  # no budget is small enough for the TPOT: the least is taken
    offered = Offered(problem.workload)

    def mixed(**limits):
        limited = replace(problem, limits=replace(problem.limits, **limits))
        shapes, refused = find_shapes(limited, offered)
        return [shape.max_batch_tokens for shape in shapes if shape.role is Role.MIXED], refused

    budgets, _ = mixed(max_batch_size=600)
    assert budgets
    assert min(budgets) >= 600
    budgets, refused = mixed(mixed_batch_tokens=32, max_batch_size=64)
    assert not budgets
    assert any("has no room for a token of each" in refusal.reason for refusal in refused)


def test_a_trace_shorter_than_the_runs_is_simulated_once():
    """Runs are stretches of it: a second one would be the same requests again, and no more evidence."""
    problem = toy_problem()
    times = np.cumsum(np.random.default_rng(1).exponential(1.0, 100))
    trace = Trace(np.full(100, 300), np.full(100, 8), times)
    problem = replace(problem, workload=WorkloadSpec(TraceTimes(times), None, None, trace=trace))
    setting = Setting(problem, Offered(problem.workload))
    effort = setting.effort([(Role.MIXED, ParallelConfig())], 1.0, fine=True)
    assert (effort.num_requests, effort.max_requests, effort.min_runs) == (100, 100, 1)


def test_a_prefill_instance_holds_prompts_alone():
    problem = toy_problem(prompt=Fixed(300), output=Fixed(100), kv_tokens=320)
    offered = Offered(problem.workload)
    held = {shape.role: bound_shape(problem, offered, shape).memory for shape in find_shapes(problem, offered)[0]}
    assert held == {Role.PREFILL: 1.0, Role.DECODE: 0.0, Role.MIXED: 0.0}
    with pytest.raises(UnreachableError, match=r"only 0% of the requests fit the KV memory of decode .*: 320 tokens"):
        find_plan(problem)


def without_room_for_prefill(mixed_batch_tokens):
    """A GPU of which weights and the largest prefill step take all that there is."""
    problem = toy_problem(gpus_per_node=1, max_pp=1)
    taken = TOY.weight_bytes(ParallelConfig()) + workspace_bytes(TOY, ParallelConfig(), 8192)
    limits = replace(
        problem.limits,
        kv_tokens=None,
        memory_bytes=int(taken / problem.limits.memory_utilisation),
        prefill_batch_tokens=8192,
        mixed_batch_tokens=mixed_batch_tokens,
    )
    return replace(problem, limits=limits)


def test_roles_whose_steps_leave_room_for_kv_are_looked_at_where_another_s_do_not():
    problem = without_room_for_prefill(mixed_batch_tokens=512)
    shapes, refused = find_shapes(problem, Offered(problem.workload))
    assert {shape.role for shape in shapes} == {Role.DECODE, Role.MIXED}
    assert [(refusal.role, refusal.constraint) for refusal in refused] == [(Role.PREFILL, "memory")]
    assert find_plan(problem).chosen.kind is Kind.COLOCATED


def test_a_cluster_on_which_nothing_computes_prompts_is_said_to_be_one():
    with pytest.raises(UnreachableError, match="toy fits no shape that computes prompts on") as caught:
        find_plan(without_room_for_prefill(mixed_batch_tokens=8192))
    assert caught.value.constraint == "memory"
