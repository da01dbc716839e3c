"""With a profile, the shapes of a plan are those that were measured."""

from dataclasses import replace

from distserve.core.config import ParallelConfig
from distserve.core.profile import FORMAT, Profile, ShapeProfile, StepFit, Surface, Table
from placement.candidates import pairs
from placement.offered import Offered
from placement.problem import Problem
from placement.shapes import find_shapes
from simulator.latency.measured import ProfileLatencyModel
from tests.placement.problems import toy_problem

TWO_BY_ONE, ONE_BY_TWO = ParallelConfig(2, 1), ParallelConfig(1, 2)


def fit(seconds: float) -> StepFit:
    """Steps of ``seconds``, prompts of so much more per token."""
    rows = ((seconds, seconds), (seconds, seconds))
    return StepFit(Surface((1, 64), (10, 1000), rows), Table((1, 1000), (seconds, 50 * seconds)), 0, 0, 0, 0, 0)


def latency(*shapes: ShapeProfile) -> ProfileLatencyModel:
    return ProfileLatencyModel(Profile(FORMAT, "", {"cores": 8}, "toy", "", "float32", 1, 16, 2048, {}, shapes))


def test_the_planner_considers_exactly_the_measured_shapes() -> None:
    measured = latency(
        ShapeProfile(ParallelConfig(), fit(0.01)),
        ShapeProfile(TWO_BY_ONE, fit(0.002)),
        ShapeProfile(ONE_BY_TWO, fit(0.02), through=fit(0.03)),
    )
    problem = replace(toy_problem(gpus_per_node=4), latency=measured)
    shapes, refused = find_shapes(problem, Offered(problem.workload, problem.search.seed))
    assert {shape.parallel for shape in shapes} == {ParallelConfig(), TWO_BY_ONE, ONE_BY_TWO}
    assert any("--shape 2x2" in refusal.reason for refusal in refused)


def test_a_shape_that_was_not_measured_is_not_planned() -> None:
    problem = replace(toy_problem(gpus_per_node=4), latency=latency(ShapeProfile(TWO_BY_ONE, fit(0.01))))
    shapes, _ = find_shapes(problem, Offered(problem.workload, problem.search.seed))
    assert {shape.parallel for shape in shapes} == {TWO_BY_ONE}


def test_stages_are_put_on_several_nodes_only_where_that_was_timed() -> None:
    measured = latency(
        ShapeProfile(ParallelConfig(), fit(0.01)), ShapeProfile(ONE_BY_TWO, fit(0.02), through=fit(0.03))
    )
    problem = toy_problem(gpus_per_node=2, num_nodes=2)

    def spans(problem: Problem) -> set[int]:
        shapes, _ = find_shapes(problem, Offered(problem.workload))
        return {candidate.span for candidate in pairs(problem, shapes)}

    assert spans(problem) == {1, 2}
    assert spans(replace(problem, latency=measured)) == {1}
