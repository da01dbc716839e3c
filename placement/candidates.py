"""The placements the planner considers: pools of equal instances, and how they are seated.

Disaggregated candidates are a prefill pool and a decode pool: the products of DistServe's Algorithm 1 (phases shaped
apart) and Algorithm 2 (both phases cut into the same stages, seated stage by stage on the same nodes). Colocated
candidates are one pool of mixed instances, hybrid ones a prefill pool and a mixed pool.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from enum import StrEnum

from distserve.core.config import Role
from distserve.core.errors import ConfigError
from distserve.core.topology import PlacedInstance, Placement
from placement.layout import Seat, lay_out
from placement.problem import Problem
from placement.shapes import Shape


class Kind(StrEnum):
    """How a placement divides the two phases among its instances."""

    DISAGGREGATED = "disaggregated"
    COLOCATED = "colocated"
    HYBRID = "hybrid"

    @staticmethod
    def of(roles: Iterable[Role]) -> "Kind":
        """Mixed instances alone are colocated, beside others a hybrid."""
        present = set(roles)
        if Role.MIXED not in present:
            return Kind.DISAGGREGATED
        return Kind.COLOCATED if present == {Role.MIXED} else Kind.HYBRID


@dataclass(frozen=True)
class Candidate:
    """``pools`` are (shape, number of instances): a prefill and a decode pool, a mixed one, or prefill beside mixed.

    ``span`` above 1: instances of both pools have their stages side by side over that many nodes; 1: every instance is
    over as few nodes as it can.
    """

    pools: tuple[tuple[Shape, int], ...]
    span: int = 1

    @property
    def num_gpus(self) -> int:
        """GPUs of all instances."""
        return sum(shape.num_gpus * count for shape, count in self.pools)

    @property
    def kind(self) -> Kind:
        """Which of the kinds it is."""
        return Kind.of(shape.role for shape, _ in self.pools)

    def with_counts(self, *counts: int) -> "Candidate":
        """The same shapes, other numbers of them."""
        return Candidate(tuple((shape, count) for (shape, _), count in zip(self.pools, counts, strict=True)), self.span)

    def placement(self, problem: Problem) -> Placement | None:
        """Instances on GPUs; None: the cluster has no room for them."""
        seated = lay_out(problem.cluster, self.seats)
        if seated is None:
            return None
        instances = [
            PlacedInstance(shape.spec(problem, f"{shape.role}-{number}"), gpus)
            for (shape, _), pool in zip(self.pools, seated, strict=True)
            for number, gpus in enumerate(pool)
        ]
        return Placement(problem.cluster, tuple(instances))

    @property
    def seats(self) -> list[Seat]:
        """What the layout must find room for."""
        return [Seat(shape.parallel, count, max(self.span, shape.nodes)) for shape, count in self.pools]

    def __str__(self) -> str:
        text = " + ".join(f"{count} {shape}" for shape, count in self.pools)
        return text if self.span == 1 else f"{text}, stages side by side over {self.span} nodes"


def spans(problem: Problem, prefill: Shape, partner: Shape) -> list[int]:
    """How a pair can be seated: 1, and every larger number of nodes over which its stages fit side by side.

    Only where a whole pair does not fit one node: there side by side would gain nothing. And only where the times of
    stages on several nodes are known: a profile measures them on one.
    """
    found, cluster = [1], problem.cluster
    pp = prefill.parallel.pp
    both = prefill.parallel.tp + partner.parallel.tp
    if pp == partner.parallel.pp and pp * both > cluster.gpus_per_node and _is_timed_apart(problem, prefill, partner):
        found += [
            nodes
            for nodes in range(2, min(pp, cluster.num_nodes) + 1)
            if pp % nodes == 0 and pp // nodes * both <= cluster.gpus_per_node
        ][:1]
    return found


def _is_timed_apart(problem: Problem, *shapes: Shape) -> bool:
    try:
        for shape in shapes:
            problem.latency.step_time(shape.parallel, stages_share_node=False)
    except ConfigError:
        return False
    return True


def pairs(problem: Problem, shapes: Iterable[Shape], partner: Role = Role.DECODE) -> Iterator[Candidate]:
    """A prefill instance and one of role ``partner``, of every two shapes, in every way to seat them."""
    shapes = list(shapes)
    for prefill in (shape for shape in shapes if shape.role is Role.PREFILL):
        for other in (shape for shape in shapes if shape.role is partner):
            for span in spans(problem, prefill, other):
                yield Candidate(((prefill, 1), (other, 1)), span)


def colocated(shapes: Iterable[Shape]) -> Iterator[Candidate]:
    """One mixed instance of every shape and policy."""
    for shape in shapes:
        if shape.role is Role.MIXED:
            yield Candidate(((shape, 1),))


def unit_gpus(problem: Problem, candidate: Candidate) -> int:
    """How many GPUs a unit to be replicated may have: the nodes that one instance of each pool needs, filled."""
    per_node = problem.cluster.gpus_per_node
    single = sum(shape.num_gpus for shape, _ in candidate.pools)
    return min(max(-(-single // per_node), candidate.span) * per_node, problem.cluster.num_gpus)


def replications(problem: Problem, candidate: Candidate) -> Iterator[Candidate]:
    """Every pair of counts that a unit has room for; of mixed instances powers of two, and a full unit."""
    limit = unit_gpus(problem, candidate)
    most = problem.search.max_instances
    sizes = [shape.num_gpus for shape, _ in candidate.pools]
    if len(sizes) == 1:
        full = min(limit // sizes[0], most)
        counts = sorted({1 << power for power in range(full.bit_length()) if 1 << power <= full} | {full})
        yield from (candidate.with_counts(count) for count in counts if count)
        return
    for first in range(1, min(limit // sizes[0], most) + 1):
        for second in range(1, min((limit - first * sizes[0]) // sizes[1], most) + 1):
            yield candidate.with_counts(first, second)
