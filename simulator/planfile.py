"""From the placement a file names, by hand or by ``distserve plan``, to instances that can be simulated.

What the placement leaves unsaid is taken as a launch would take it: limits from the section ``engine``, KV memory from
what the weights leave of a GPU, GPUs in order, a tensor-parallel group never across nodes.
"""

from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path

from distserve.cluster.config import ConfigFile, EngineSection
from distserve.cluster.placement_section import ClusterSection, PlacementSection
from distserve.cluster.seats import WantedInstance, check_seats
from distserve.cluster.yaml_file import read_yaml
from distserve.core.budget import check_budget
from distserve.core.config import SLO, InstanceSpec, KvConfig, ParallelConfig, SchedulerConfig
from distserve.core.errors import ConfigError
from distserve.core.router import DEFAULT_SLO, RouterConfig
from distserve.core.topology import ClusterSpec, Gpu, PlacedInstance, Placement
from simulator.inputs import read_file
from simulator.latency.gpus import GpuSpec, find_gpu
from simulator.latency.interface import LatencyModel
from simulator.latency.measured import ProfileLatencyModel
from simulator.latency.memory import kv_config, kv_of_bytes
from simulator.latency.shape import ModelShape
from simulator.model import ClusterModel, Delays, InstanceModel

_ANY_LENGTH = 1 << 20
"""``max_model_len`` where the file says none: the planner assumes no limit either."""


class PlanFile(ConfigFile):
    """A configuration with a placement, as far as its instances go; a cluster in it must be the one simulated."""

    cluster: ClusterSection | None = None  # type: ignore[assignment]


@dataclass(frozen=True, slots=True)
class Limits:
    """What an instance has if its pool does not say: the section ``engine``, and the GPU whose memory it shares.

    ``token_budget`` is chosen from a profile; None: the section's own. ``kv_most`` is how much KV memory (bytes) an
    instance has at most if nobody says how much; None: what its GPU has left.
    """

    engine: EngineSection
    gpu: GpuSpec
    token_budget: int | None = None
    kv_most: int | None = None
    memory_utilisation: float = 0.9


@dataclass(frozen=True, slots=True)
class Planned:
    """What a file says of a placement: its pools, the cluster they are for, and the rate (requests/s) predicted for."""

    section: PlacementSection
    cluster: ClusterSpec | None
    rate: float | None = None


def read_placement(path: Path) -> Planned:
    """The placement in the file at ``path``.

    Raises ConfigError if the file is no configuration, or names no pools.
    """
    data, _ = read_yaml(path)
    if not isinstance(data.get("placement"), dict):
        raise ConfigError(
            f"{path}: no placement with pools of instances, such as placement: {{prefill: {{instances: 1}}, "
            "decode: {instances: 1}}; `distserve plan CONFIG --output FILE` finds and writes one"
        )
    file = read_file(path, PlanFile, sections=(), purpose="a plan")
    assert isinstance(file.placement, PlacementSection)
    rate = (file.prediction or {}).get("rate")
    return Planned(
        file.placement,
        None if file.cluster is None else file.cluster.spec(),
        float(rate) if isinstance(rate, int | float) and rate > 0 else None,
    )


def check_cluster(planned: ClusterSpec | None, cluster: ClusterSpec, path: Path) -> None:
    """Raise ConfigError if the plan at ``path`` is for another kind of GPU or other nodes than ``cluster``."""
    if planned is None:
        return
    there = (find_gpu(planned.gpu).name, planned.gpus_per_node)
    if there != (cluster.gpu, cluster.gpus_per_node) or planned.num_nodes > cluster.num_nodes:
        raise ConfigError(
            f"{path} is planned for {_describe(planned)}, the configuration has {_describe(cluster)}: plan again, or "
            "simulate with the configuration the plan was made for"
        )


def place(section: PlacementSection, cluster: ClusterSpec, model: ModelShape, limits: Limits) -> Placement:
    """The instances of ``section``, named by role and number, on the GPUs of ``cluster``.

    Raises ConfigError for GPUs that are not there or taken twice, shapes the model cannot have, and weights that leave
    no memory for KV.
    """
    wanted = section.instances()
    gpus = [instance.gpus for instance in wanted]
    if not all(gpus):
        gpus = _seat_in_order(wanted, cluster)
    else:
        check_seats(wanted, cluster)
    numbers: Counter[str] = Counter()
    placed = []
    for instance, seats in zip(wanted, gpus, strict=True):
        name = f"{instance.role}-{numbers[instance.role]}"
        numbers[instance.role] += 1
        placed.append(PlacedInstance(_spec(name, instance, model, limits), seats))
    placement = Placement(cluster, tuple(placed))
    placement.check()
    return placement


def deployment(
    placement: Placement, latency: LatencyModel, model: ModelShape, delays: Delays, slo: SLO = DEFAULT_SLO
) -> ClusterModel:
    """``placement`` as the simulator runs it, with every link that KV and activations use.

    ``slo`` is what the router divides prompts for between prefill and mixed instances.
    """
    instances = []
    for placed in placement.instances:
        shares_node = len({gpu.node for gpu in placed.gpus}) == 1
        step_time = latency.step_time(placed.spec.parallel, stages_share_node=shares_node)
        instances.append(InstanceModel(placed.spec, step_time, placed.gpus))
    return ClusterModel(
        instances=tuple(instances),
        cluster=placement.cluster,
        kv=model.kv,
        delays=delays,
        router=RouterConfig(near=placement.near(), slo=slo),
    )


def on_one_host(model: ClusterModel, latency: LatencyModel, placement: Placement) -> ClusterModel:
    """``model`` where its instances share a host's CPUs with client, API and router, and KV moves by a copy within it.

    That is so where ``latency`` is a profile of such a host, cluster and all, and the placement is on one node;
    elsewhere it is as it was.
    """
    measured = isinstance(latency, ProfileLatencyModel) and latency.profile.cluster is not None
    if not measured or placement.num_nodes > 1:
        return model
    assert isinstance(latency, ProfileLatencyModel)
    return replace(model, cluster=None, kv=None, host=latency.host())


def _spec(name: str, wanted: WantedInstance, model: ModelShape, limits: Limits) -> InstanceSpec:
    engine, said = limits.engine, wanted.limits
    scheduler = SchedulerConfig(
        max_batch_tokens=said.max_batch_tokens or limits.token_budget or engine.max_batch_tokens,
        max_batch_size=said.max_batch_size or engine.max_batch_size,
        max_in_flight=wanted.parallel.pp,
        max_model_len=engine.max_model_len or _ANY_LENGTH,
        prefix_caching=engine.prefix_caching,
        prefix_cache_tokens=engine.prefix_cache_tokens,
        policy=engine.mixed_policy,
    )
    model.check(wanted.parallel)
    kv_tokens = said.kv_tokens or engine.kv_tokens
    if kv_tokens is not None:
        kv = KvConfig.holding(kv_tokens, engine.block_size)
    elif engine.kv_memory is not None:
        kv = kv_of_bytes(model, wanted.parallel, int(engine.kv_memory), engine.block_size)
    else:
        kv = _kv_left(name, wanted.parallel, model, limits, scheduler.max_batch_tokens)
    spec = InstanceSpec(name, wanted.role, kv, scheduler, wanted.parallel)
    check_budget(spec)
    spec.check_prefix_cache()
    return spec


def _kv_left(name: str, parallel: ParallelConfig, model: ModelShape, limits: Limits, batch_tokens: int) -> KvConfig:
    kv = kv_config(
        model,
        limits.gpu,
        parallel,
        block_size=limits.engine.block_size,
        memory_utilisation=limits.memory_utilisation,
        max_batch_tokens=batch_tokens,
    )
    if kv is None:
        raise ConfigError(
            f"{name}: {model.weight_bytes(parallel) / 1e9:.1f} GB of weights per GPU (tp {parallel.tp}, pp "
            f"{parallel.pp}) leave no room for KV on a {limits.gpu.name} of {limits.gpu.memory_bytes / 1e9:.0f} GB: "
            "raise tp or pp"
        )
    if limits.kv_most is None:
        return kv
    most = kv_of_bytes(model, parallel, limits.kv_most, limits.engine.block_size)
    return min(kv, most, key=lambda found: found.num_blocks)


def _seat_in_order(wanted: tuple[WantedInstance, ...], cluster: ClusterSpec) -> list[tuple[Gpu, ...]]:
    """GPUs in order, instance by instance and stage by stage; a stage that does not fit a node opens the next."""
    node = used = 0
    seats = []
    for instance in wanted:
        ranks: list[Gpu] = []
        tp = instance.parallel.tp
        if tp > cluster.gpus_per_node:
            raise ConfigError(
                f"tp {tp} of a {instance.role} instance is more than the {cluster.gpus_per_node} GPUs of a node"
            )
        for _ in range(instance.parallel.pp):
            if used + tp > cluster.gpus_per_node:
                node, used = node + 1, 0
            ranks += [Gpu(node, used + shard) for shard in range(tp)]
            used += tp
        seats.append(tuple(ranks))
    if node >= cluster.num_nodes:
        num_gpus = sum(instance.parallel.num_ranks for instance in wanted)
        raise ConfigError(
            f"the placement's {len(wanted)} instances take {num_gpus} GPUs, in whole tensor-parallel groups per node; "
            f"the cluster has {_describe(cluster)}"
        )
    return seats


def _describe(cluster: ClusterSpec) -> str:
    return f"{cluster.num_nodes} node{'s' if cluster.num_nodes > 1 else ''} of {cluster.gpus_per_node} {cluster.gpu}"
