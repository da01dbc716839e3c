"""Where instances run: the cluster's GPUs and links, and a placement of instances on them.

Facts only. What a link's sharing does to a transfer is the simulator's business, how a placement is found the
planner's, how it is started the launcher's.
"""

from collections import Counter
from dataclasses import dataclass

from distserve.core.config import InstanceSpec, Role
from distserve.core.errors import ConfigError


@dataclass(frozen=True, slots=True, order=True)
class Gpu:
    """One GPU (or, on CPU, one slot for a rank): ``index`` within its ``node``, both from 0."""

    node: int
    index: int


@dataclass(frozen=True, slots=True)
class ClusterSpec:
    """Equal nodes of equal GPUs.

    ``gpu`` is a name of the GPU table (``h100-sxm``, ``cpu``). ``intra_node_bandwidth`` is what one GPU can send, and
    at the same time receive, within its node; ``inter_node_bandwidth`` what one network card can, each way; both in
    bytes/s. The ``nics_per_node`` cards are shared evenly by a node's GPUs in order: with 8 of each, every GPU has
    its own.
    """

    gpu: str
    num_nodes: int
    gpus_per_node: int
    intra_node_bandwidth: float
    inter_node_bandwidth: float
    nics_per_node: int = 1

    @property
    def num_gpus(self) -> int:
        """GPUs of all nodes."""
        return self.num_nodes * self.gpus_per_node

    def nic_of(self, gpu: Gpu) -> int:
        """The card, from 0 within its node, through which ``gpu`` reaches other nodes."""
        return gpu.index * self.nics_per_node // self.gpus_per_node


@dataclass(frozen=True, slots=True)
class PlacedInstance:
    """An instance and its GPUs in rank order: shard ``t`` of pipeline stage ``s`` is ``gpus[s * tp + t]``."""

    spec: InstanceSpec
    gpus: tuple[Gpu, ...]

    def stage(self, stage: int) -> tuple[Gpu, ...]:
        """The GPUs of one pipeline stage."""
        tp = self.spec.parallel.tp
        return self.gpus[stage * tp : (stage + 1) * tp]


@dataclass(frozen=True, slots=True)
class Placement:
    """Instances of all roles on the GPUs of one cluster."""

    cluster: ClusterSpec
    instances: tuple[PlacedInstance, ...]

    @property
    def num_gpus(self) -> int:
        """GPUs in use."""
        return sum(len(instance.gpus) for instance in self.instances)

    @property
    def num_nodes(self) -> int:
        """Nodes in use."""
        return len({gpu.node for instance in self.instances for gpu in instance.gpus})

    def of(self, role: Role) -> tuple[PlacedInstance, ...]:
        """The instances of one role."""
        return tuple(instance for instance in self.instances if instance.spec.role is role)

    def near(self) -> dict[str, tuple[str, ...]]:
        """For each prefill instance, those that decode and to which its KV moves without leaving a node.

        Layers are split evenly over pipeline stages; stages that have layers in common must be on one node.
        """
        return {
            source.spec.instance_id: tuple(
                target.spec.instance_id
                for target in (*self.of(Role.DECODE), *self.of(Role.MIXED))
                if _shares_nodes(source, target)
            )
            for source in self.of(Role.PREFILL)
        }

    def check(self) -> None:
        """Raise ConfigError unless every rank has a GPU of the cluster to itself."""
        seats = Counter(gpu for instance in self.instances for gpu in instance.gpus)
        for gpu, count in seats.items():
            if count > 1:
                raise ConfigError(f"GPU {gpu.index} of node {gpu.node} is given to {count} ranks")
            if not (0 <= gpu.node < self.cluster.num_nodes and 0 <= gpu.index < self.cluster.gpus_per_node):
                raise ConfigError(
                    f"there is no GPU {gpu.index} on a node {gpu.node}: the cluster has {self.cluster.num_nodes} nodes "
                    f"of {self.cluster.gpus_per_node} GPUs, both counted from 0"
                )
        for instance in self.instances:
            if len(instance.gpus) != instance.spec.parallel.num_ranks:
                raise ConfigError(
                    f"{instance.spec.instance_id} has {instance.spec.parallel.num_ranks} ranks (tp x pp) and "
                    f"{len(instance.gpus)} GPUs"
                )


def _shares_nodes(source: PlacedInstance, target: PlacedInstance) -> bool:
    """Whether each of the source's stages is on the nodes of those of the target's that hold any of its layers."""
    source_pp, target_pp = source.spec.parallel.pp, target.spec.parallel.pp
    for stage in range(source_pp):
        first, end = stage * target_pp // source_pp, -(-(stage + 1) * target_pp // source_pp)
        nodes = {gpu.node for gpu in source.stage(stage)}
        nodes.update(gpu.node for other in range(first, end) for gpu in target.stage(other))
        if len(nodes) > 1:
            return False
    return True
