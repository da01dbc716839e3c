"""Who sits where: GPUs for the instances of a placement, so that shards share a node and KV stays within nodes.

Tensor-parallel groups are always within one node. An instance that fits a node is within one. One that does not has its
stages in order over as many nodes as it needs; a prefill and a decode instance with the same number of stages can have
their stages side by side over the same nodes (DistServe's Algorithm 2 for clusters with slow networks), so that the KV
of a layer never leaves its node.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from distserve.core.config import ParallelConfig
from distserve.core.topology import ClusterSpec, Gpu


@dataclass(frozen=True, slots=True)
class Seat:
    """Wanted: ``count`` instances of ``parallel``, each over ``span`` nodes."""

    parallel: ParallelConfig
    count: int
    span: int

    @property
    def share(self) -> int:
        """GPUs of one instance on its fullest node."""
        return -(-self.parallel.pp // self.span) * self.parallel.tp


def lay_out(cluster: ClusterSpec, pools: Sequence[Seat]) -> tuple[tuple[tuple[Gpu, ...], ...], ...] | None:
    """GPUs in rank order for every instance of every pool; None: they do not fit.

    Pools are spread evenly over as few nodes as give every instance of the first pool one of the second beside it; if
    no number of nodes does, over as few as hold them. Where they cannot be spread, nodes are filled one by one.
    """
    span = max(seat.span for seat in pools)
    total = sum(seat.count * seat.parallel.num_ranks for seat in pools)
    fewest = -(-total // cluster.gpus_per_node)
    for is_spread in (True, False):
        smallest = None
        for num_nodes in range(max(fewest, span), cluster.num_nodes + 1):
            seated = _seat(cluster.gpus_per_node, num_nodes, pools, is_spread=is_spread)
            if seated is not None and _has_company(seated):
                return seated
            smallest = smallest or seated
        if smallest is not None:
            return smallest
    return None


def _has_company(seated: tuple[tuple[tuple[Gpu, ...], ...], ...]) -> bool:
    """Whether each instance of the first pool shares its nodes with one of every other pool."""
    nodes = [[{gpu.node for gpu in gpus} for gpus in pool] for pool in seated]
    return all(any(first <= other or other <= first for other in pool) for first in nodes[0] for pool in nodes[1:])


def _seat(
    gpus_per_node: int, num_nodes: int, pools: Sequence[Seat], *, is_spread: bool
) -> tuple[tuple[tuple[Gpu, ...], ...], ...] | None:
    """First the widest instances, each to the group of nodes that has least of its pool, then most room.

    Or else (``is_spread`` false) to the fullest group with room for it.
    """
    used = [0] * num_nodes
    held = [[0] * len(pools) for _ in range(num_nodes)]
    is_even = len({seat.span for seat in pools} - {1}) <= 1
    seated: list[list[tuple[Gpu, ...]]] = [[] for _ in pools]
    waiting = sorted(
        ((pool, number) for pool, seat in enumerate(pools) for number in range(seat.count)),
        key=lambda item: (-pools[item[0]].span, -pools[item[0]].share, item[1], item[0]),
    )
    for pool, _ in waiting:
        seat = pools[pool]
        # Equal groups do not overlap, so that none is left of fewer nodes.
        step = seat.span if is_even else 1
        groups = [range(first, first + seat.span) for first in range(0, num_nodes - seat.span + 1, step)]
        free = [group for group in groups if all(used[node] + seat.share <= gpus_per_node for node in group)]
        if not free:
            return None
        fill = {group: sum(used[node] for node in group) for group in free}
        if is_spread:
            group = min(free, key=lambda nodes: (sum(held[node][pool] for node in nodes), fill[nodes], nodes[0]))
        else:
            group = max(free, key=lambda nodes: (fill[nodes], -nodes[0]))
        seated[pool].append(_take(seat, group, used))
        for node in group:
            held[node][pool] += 1
    return tuple(tuple(instances) for instances in seated)


def _take(seat: Seat, group: Sequence[int], used: list[int]) -> tuple[Gpu, ...]:
    """The next GPUs of the nodes of ``group``, stages in order; they count as ``used`` from now on."""
    per_node = -(-seat.parallel.pp // seat.span)
    ranks: list[Gpu] = []
    for stage in range(seat.parallel.pp):
        node = group[stage // per_node]
        for _shard in range(seat.parallel.tp):
            ranks.append(Gpu(node, used[node]))
            used[node] += 1
    return tuple(ranks)
