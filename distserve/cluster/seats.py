"""Which instances a launch wants, and how the nodes they were planned for map onto the nodes there are.

Pure: the nodes found are an argument, so that this is tested without a cluster. Ray's part of it is
:mod:`distserve.cluster.reservation`.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from distserve.cluster.sizing import KvRequest
from distserve.core.config import InstanceSpec, KvConfig, ParallelConfig, Role
from distserve.core.errors import ConfigError
from distserve.core.topology import ClusterSpec, Gpu, PlacedInstance, Placement

CPU = "cpu"
"""The ``gpu`` of a cluster without any: a rank then takes one of the node's slots, CPUs are what counts."""


@dataclass(frozen=True, slots=True)
class PlannedLimits:
    """What a plan fixes beside the place: batch and KV sizes it was simulated with; None: as the engine's section says.

    ``max_batch_tokens`` and ``max_batch_size`` as in :class:`distserve.core.config.SchedulerConfig`, ``kv_tokens`` is
    the instance's KV memory.
    """

    max_batch_tokens: int | None = None
    max_batch_size: int | None = None
    kv_tokens: int | None = None


_UNSAID = PlannedLimits()


@dataclass(frozen=True, slots=True)
class WantedInstance:
    """One instance to start: ``gpus`` in rank order (shard ``t`` of stage ``s`` at ``s * tp + t``); empty: anywhere."""

    role: Role
    parallel: ParallelConfig
    gpus: tuple[Gpu, ...] = ()
    limits: PlannedLimits = _UNSAID


@dataclass(frozen=True, slots=True)
class FoundNode:
    """A node as it was found.

    ``gpu_types`` are the names Ray announces (``A100``), empty if it knows none; ``memory`` is what it lets its workers
    take, in bytes, 0 if it does not say.
    """

    node_id: str
    num_cpus: int
    num_gpus: int = 0
    gpu_types: frozenset[str] = frozenset()
    memory: int = 0


@dataclass(frozen=True, slots=True)
class NodeGroup:
    """What shares a node: ``seats`` are (instance, rank) pairs. ``node`` is the plan's; None where nothing was planned.

    Each tensor-parallel group lies within one of these, which is started on one node or not at all.
    """

    node: int | None
    seats: tuple[tuple[int, int], ...]


def wanted(placement: Placement) -> tuple[WantedInstance, ...]:
    """The instances of a placement, limits and all."""
    found = []
    for instance in placement.instances:
        spec = instance.spec
        limits = PlannedLimits(spec.scheduler.max_batch_tokens, spec.scheduler.max_batch_size, spec.kv.num_tokens)
        found.append(WantedInstance(spec.role, spec.parallel, instance.gpus, limits))
    return tuple(found)


def check_seats(instances: Sequence[WantedInstance], cluster: ClusterSpec) -> None:
    """Raise ConfigError unless all ``instances`` have GPUs of ``cluster``, one a rank, a stage's on one node."""
    specs = (InstanceSpec(f"{i.role} instance", i.role, KvConfig(0), parallel=i.parallel) for i in instances)
    placed = tuple(PlacedInstance(spec, i.gpus) for spec, i in zip(specs, instances, strict=True))
    Placement(cluster, placed).check()
    for instance in placed:
        for stage in range(instance.spec.parallel.pp):
            nodes = sorted({gpu.node for gpu in instance.stage(stage)})
            if len(nodes) > 1:
                raise ConfigError(
                    f"stage {stage} of a {instance.spec.instance_id} spans the nodes {', '.join(map(str, nodes))}: the "
                    f"{instance.spec.parallel.tp} shards of a stage have to share one"
                )


def group_by_node(instances: Sequence[WantedInstance]) -> tuple[NodeGroup, ...]:
    """The ranks of ``instances`` by the node they were planned for; all in one group where nothing was planned."""
    if not all(instance.gpus for instance in instances):
        seats = ((i, rank) for i, instance in enumerate(instances) for rank in range(instance.parallel.num_ranks))
        return (NodeGroup(None, tuple(seats)),)
    by_node: dict[int, list[tuple[int, int]]] = {}
    for i, instance in enumerate(instances):
        for rank, gpu in enumerate(instance.gpus):
            by_node.setdefault(gpu.node, []).append((i, rank))
    return tuple(NodeGroup(node, tuple(seats)) for node, seats in sorted(by_node.items()))


def match_nodes(groups: Iterable[NodeGroup], cluster: ClusterSpec, found: Sequence[FoundNode]) -> dict[int, FoundNode]:
    """A node of its own for every node of the plan that is used: the fullest goes to the largest.

    Raises:
        ConfigError: there are too few nodes, too small ones or ones with other GPUs; says what is missing.
    """
    needs = sorted(((len(group.seats), group.node) for group in groups if group.node is not None), reverse=True)
    usable = [node for node in found if _size(node, cluster) and _same_gpu(node, cluster.gpu)]
    usable.sort(key=lambda node: _size(node, cluster), reverse=True)
    # One dimension: if sizes in descending order do not fit pairwise, no other assignment does.
    fits = len(usable) >= len(needs) and all(
        _size(node, cluster) >= need for (need, _), node in zip(needs, usable, strict=False)
    )
    if not fits:
        raise ConfigError(
            f"the plan needs {_describe_needs([need for need, _ in needs], cluster)}, the cluster has "
            f"{_describe_found(found)}: add what is missing, or plan for what is there (the section cluster of the "
            "configuration)"
        )
    return {node: there for (_, node), there in zip(needs, usable, strict=False) if node is not None}


def check_kv_said(instances: Sequence[WantedInstance], cluster: ClusterSpec | None, kv: KvRequest) -> None:
    """Raise ConfigError unless the plan or ``kv``, the engine's section, gives instances on GPUs their KV memory.

    Nobody looks at those GPUs beforehand.
    """
    for instance in instances:
        if are_on_gpus(cluster) and not (instance.limits.kv_tokens or kv.num_tokens or kv.num_bytes):
            raise ConfigError(
                f"how much KV memory does a {instance.role} instance take of its GPU? Give placement.{instance.role}."
                "kv_tokens, which plans of `distserve plan` have, or engine.kv_tokens (--kv-tokens) for all instances"
            )


def are_on_gpus(cluster: ClusterSpec | None) -> bool:
    """Whether instances planned for ``cluster`` have a GPU for each rank."""
    return cluster is not None and cluster.gpu != CPU


def check_kv_transport(instances: Sequence[WantedInstance], cluster: ClusterSpec | None, transport: str) -> None:
    """Raise ConfigError if KV cannot move by ``transport``: ``nccl`` is for GPUs, ``shm`` for CPUs of one node."""
    if transport == "nccl" and not are_on_gpus(cluster):
        raise ConfigError(
            "kv_transport nccl is for KV between GPUs, and the instances compute on CPUs: give auto, shm or tcp, or "
            "place the instances on GPUs (their `gpus` in placement, and the GPU's type in the section cluster)"
        )
    if transport == "shm" and are_on_gpus(cluster):
        raise ConfigError(
            "kv_transport shm is for KV in host memory, and the instances have it in their GPUs': give auto, nccl or "
            "tcp"
        )
    # KV moves from prefill instances, where there are any, to all others.
    moves = any(instance.role is Role.PREFILL for instance in instances)
    places = {(i.role, gpu.node) for i in instances for gpu in i.gpus if moves}
    apart = {f"{role} on node {node}" for role, node in places}
    if transport == "shm" and len({node for _, node in places}) > 1:
        raise ConfigError(
            f"the placement has {', '.join(sorted(apart))}, and shared memory ends at a node: give --kv-transport auto "
            "(TCP between nodes), or place them on one node"
        )


def _size(node: FoundNode, cluster: ClusterSpec) -> int:
    """Ranks the node can take."""
    return node.num_cpus if cluster.gpu == CPU else node.num_gpus


def _same_gpu(node: FoundNode, gpu: str) -> bool:
    """Whether the node may have GPUs called ``gpu``: Ray's names are coarser than ours, and some it does not know."""
    wanted_model = gpu.partition("-")[0]
    # All of them: shards compute in step and hold equal parts, and which of a node's GPUs a rank gets is Ray's choice.
    return all(name.partition("-")[0].lower() == wanted_model for name in node.gpu_types)


def _describe_needs(needs: Sequence[int], cluster: ClusterSpec) -> str:
    what = "CPU" if cluster.gpu == CPU else f"{cluster.gpu} GPU"
    return " and ".join(
        f"{_count(num, 'node')} of {_count(size, what)}" for size, num in sorted(Counter(needs).items(), reverse=True)
    )


def _describe_found(found: Sequence[FoundNode]) -> str:
    kinds = Counter((node.num_gpus, "/".join(sorted(node.gpu_types)), node.num_cpus) for node in found)
    texts = []
    for (num_gpus, name, num_cpus), num in sorted(kinds.items(), reverse=True):
        gpus = _count(num_gpus, f"{name} GPU".strip()) + " and " if num_gpus else ""
        texts.append(f"{_count(num, 'node')} of {gpus}{_count(num_cpus, 'CPU')}{'' if num_gpus else ' (no GPU)'}")
    return ", ".join(texts) or "no node"


def _count(num: int, what: str) -> str:
    return f"{num} {what}{'' if num == 1 else 's'}"
