"""Tasks that wait for runs made by other processes."""

import threading
from dataclasses import dataclass

import pytest

from distserve.core.errors import ConfigError
from placement.candidates import colocated
from placement.deployment import Run
from placement.measure import Effort, Measurement, measure
from placement.offered import Offered
from placement.problem import Problem
from placement.shapes import find_shapes
from placement.tasks import JointPoint, Setting
from placement.workers import Workers
from tests.placement.problems import toy_problem


def points(problem: Problem, setting: Setting) -> list[JointPoint]:
    shapes, _ = find_shapes(problem, setting.offered)
    placements = [candidate.placement(problem) for candidate in colocated(s for s in shapes if s.role == "mixed")]
    return [JointPoint(placement, rate, fine=True) for placement in placements if placement for rate in (4.0, 9.0)]


@dataclass(frozen=True)
class Refused:
    """What cannot be simulated."""

    def run(self, problem: Problem, offered: Offered) -> Run:
        raise ConfigError("no such deployment")


@dataclass(frozen=True)
class RefusedPoint:
    def __call__(self, setting: Setting) -> Measurement:
        return measure(setting.runs(Refused()), 1.0, setting.problem.slo, 1.0, Effort(50, 50))


def test_results_come_in_the_order_of_the_tasks_and_their_requests_are_counted():
    problem = toy_problem(gpus_per_node=2)
    setting = Setting(problem, Offered(problem.workload))
    tasks = points(problem, setting)
    expected = [task(setting) for task in tasks]
    with Workers(setting, 2) as workers:
        waiting = workers.begin(tasks[0])
        found = workers.run(tasks)
        pairs = workers.side_by_side([lambda part=part: workers.run(part) for part in (tasks[:2], tasks[2:4])])
        assert waiting().point == expected[0].point
    assert [result.point for result in found] == [result.point for result in expected]
    assert [[result.point for result in part] for part in pairs] == [
        [result.point for result in part] for part in (expected[:2], expected[2:4])
    ]
    num_requests = [result.num_simulated for result in expected]
    assert workers.num_requests == num_requests[0] + sum(num_requests) + sum(num_requests[:4])


def test_an_error_of_one_task_ends_all():
    problem = toy_problem(gpus_per_node=2)
    setting = Setting(problem, Offered(problem.workload))
    before = threading.active_count()
    with pytest.raises(ConfigError, match="no such deployment"), Workers(setting, 2) as workers:
        workers.run([*points(problem, setting), RefusedPoint()])
    assert threading.active_count() <= before
