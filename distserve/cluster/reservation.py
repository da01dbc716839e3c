"""Room for all parts of a launch, reserved in the Ray cluster before any of them starts.

One placement group per node of the plan: Ray places it whole on one node (STRICT_PACK), so that the shards of a stage
share it and so does whatever else was planned to. An instance's ranks there have one bundle, since one process is given
all of their GPUs. A planned group is tied to the node it was mapped to. Which of a node's GPUs a rank gets is Ray's
choice: they are equal.
"""

import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from distserve.cluster.seats import FoundNode, NodeGroup
from distserve.core.errors import ConfigError

ROUTER_CPUS = 0.1
_NODE_LABEL = "ray.io/node-id"


@dataclass(frozen=True, slots=True)
class RankResources:
    """What Ray sets aside for one rank."""

    num_cpus: float
    num_gpus: int = 0

    def bundle(self, num_ranks: int) -> dict[str, float]:
        """Of so many ranks, as Ray wants it said."""
        num_cpus = self.num_cpus * num_ranks
        # Ray counts in whole numbers from one on.
        cpus = {"CPU": float(int(num_cpus)) if num_cpus > 1 else num_cpus}
        return cpus | ({"GPU": float(self.num_gpus * num_ranks)} if self.num_gpus else {})


class Reservation:
    """The placement groups of one launch. The router has a bundle beside the first group's ranks.

    Args:
        groups: The ranks that share a node each.
        nodes: The node each group is tied to, by the plan's; groups without one go where there is room.
        rank: What every rank takes.
    """

    def __init__(self, groups: Sequence[NodeGroup], nodes: Mapping[int, FoundNode], rank: RankResources) -> None:
        self.rank = rank
        self._groups: list[tuple[NodeGroup, PlacementGroup]] = []
        self._seats: dict[tuple[int, int], PlacementGroupSchedulingStrategy] = {}
        for number, group in enumerate(groups):
            first = [{"CPU": ROUTER_CPUS}] if number == 0 else []
            num_ranks = Counter(instance for instance, _ in group.seats)
            bundles = first + [rank.bundle(num) for num in num_ranks.values()]
            node = nodes.get(group.node) if group.node is not None else None
            tied = [{_NODE_LABEL: node.node_id}] * len(bundles) if node is not None else None
            reserved = placement_group(bundles, strategy="STRICT_PACK", bundle_label_selector=tied)
            self._groups.append((group, reserved))
            for bundle, instance in enumerate(num_ranks, start=len(first)):
                seat = PlacementGroupSchedulingStrategy(reserved, placement_group_bundle_index=bundle)
                self._seats |= {(instance, number): seat for i, number in group.seats if i == instance}

    def wait(self, patience: float) -> None:
        """Wait until all of it is reserved.

        Raises:
            ConfigError: some of it is not within ``patience`` seconds.
        """
        end = time.monotonic() + patience
        for group, reserved in self._groups:
            if reserved.wait(max(end - time.monotonic(), 0.001)):
                continue
            num_cpus = self.rank.num_cpus * len(group.seats)
            gpus = f" and {self.rank.num_gpus * len(group.seats)} GPUs" if self.rank.num_gpus else ""
            where = "no node" if group.node is None else f"the node for the plan's node {group.node}"
            has = "has" if group.node is None else "does not have"
            raise ConfigError(
                f"{where} of the Ray cluster {has} {num_cpus:g} CPUs{gpus} free for {len(group.seats)} instances: "
                "something else uses them, or ask for fewer instances or fewer --threads"
            )

    def router(self) -> PlacementGroupSchedulingStrategy:
        """Where the first router goes."""
        return PlacementGroupSchedulingStrategy(self._groups[0][1], placement_group_bundle_index=0)

    def seat(self, instance: int, rank: int) -> PlacementGroupSchedulingStrategy:
        """Where a rank of an instance goes: beside the instance's others on its node."""
        return self._seats[instance, rank]

    def close(self) -> None:
        """Give all of it back."""
        for _, reserved in self._groups:
            remove_placement_group(reserved)


def cpus_per_rank(num_threads: int, num_ranks: int, num_cpus: float) -> float:
    """CPUs to ask of Ray for each of a node's ranks: its threads, or an equal share where there are fewer."""
    share = (num_cpus - ROUTER_CPUS) / num_ranks
    if share >= num_threads:
        return num_threads
    # Ray counts CPUs in whole numbers from one on.
    return float(int(share)) if share >= 1 else max(0.001, int(share * 1000) / 1000)
