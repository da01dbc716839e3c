"""From a checked configuration to a running cluster: Ray, placement, instances, router, supervision; and back.

Everything below the endpoint is started here, in parallel where it can be, and stopped in reverse order.
"""

import logging
import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import ray
from ray.exceptions import RayError

from distserve.cluster.config import ServeConfig
from distserve.cluster.deployment import Blueprint, Deployment, cause_of
from distserve.cluster.describe import Description, ModelFacts
from distserve.cluster.gpu_memory import Limits, ProcessMemory, own_card_kv, split_card
from distserve.cluster.gpu_probe import GpuFacts, probe_gpu, visible_as
from distserve.cluster.network import Mailbox, create_key
from distserve.cluster.parts import OWNER, Card, ClusterKey, EnginePlan, KvAccess
from distserve.cluster.ray_cluster import RayCluster, joined_cluster, local_cluster, this_node
from distserve.cluster.seats import FoundNode, are_on_gpus, check_kv_said, group_by_node, match_nodes
from distserve.cluster.session import Session
from distserve.cluster.sizing import KvRequest, Room, check_processes, free_memory, least_kv
from distserve.cluster.supervise import Supervisor
from distserve.core.config import InstanceSpec, Role, SchedulerConfig
from distserve.core.errors import ConfigError
from distserve.core.router import RouterConfig
from distserve.core.shards import check_shards
from distserve.core.topology import PlacedInstance, Placement

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Launched:
    """What runs beneath the endpoint."""

    deployment: Deployment
    mailbox: Mailbox


@contextmanager
def launch(config: ServeConfig, show: Callable[[str], None]) -> Iterator[Launched]:
    """Start every part but the endpoint; stop them again at the end."""
    groups = group_by_node(config.instances)
    nodes: dict[int, FoundNode] = {}
    gpu: GpuFacts | None = None
    if config.engine.gpu is not None:
        show(f"examining GPU {config.engine.gpu}")
        gpu = probe_gpu(config.model_dir, config.engine.dtype, config.engine.gpu)
        # What is started from here on sees this GPU alone, and knows it as the first.
        os.environ["CUDA_VISIBLE_DEVICES"] = visible_as(config.engine.gpu, os.environ)
    if config.ray_address is None:
        here = this_node()
        if config.cluster is not None:
            match_nodes(groups, config.cluster, [here])
        check_kv_said(config.instances, config.cluster, config.engine.kv)
        num_threads = _threads(config, here.num_cpus)
        num_cores = num_threads * config.num_instances
        num_ranks = sum(len(group.seats) for group in groups)
        if num_threads * num_ranks > here.num_cpus:
            logger.warning("%d threads of %d ranks share %d CPUs", num_threads * num_ranks, num_ranks, here.num_cpus)
        # Ray starts a process per CPU promised to it: a number beyond reason must not get that far.
        check_processes(config.num_instances, num_ranks, free_memory())
    with ExitStack() as stack:
        description = stack.enter_context(Description(config.model_dir, config.engine.dtype))
        if config.ray_address is None:
            show("starting a local Ray cluster")
            directory = str(stack.enter_context(Session()).directory)
            num_gpus = num_ranks if are_on_gpus(config.cluster) else 0
            cluster = stack.enter_context(local_cluster(directory, num_cores + 1, num_gpus))
        else:
            show(f"joining the Ray cluster at {config.ray_address}")
            cluster = stack.enter_context(joined_cluster(config.ray_address))
            if config.cluster is not None:
                nodes = cluster.match(groups, config.cluster, config.node_patience, show)
            check_kv_said(config.instances, config.cluster, config.engine.kv)
            num_cpus = min((node.num_cpus for node in nodes.values()), default=this_node().num_cpus)
            num_threads = _threads(config, num_cpus)
        show("examining the model")
        facts = description.result()
        if gpu is None and not are_on_gpus(config.cluster) and not facts.is_native:
            logger.warning(
                "%s is computed by plain torch here, several times slower: the processor has no AVX-512 BF16, or the "
                "native code is not built (`pip install -e .` builds it), or DISTSERVE_NATIVE=0",
                config.engine.dtype,
            )
        key = create_key()
        mailbox = Mailbox(OWNER, key, cluster.host)
        stack.callback(mailbox.close)
        rooms = () if cluster.is_local else _rooms(config, cluster, nodes)
        blueprint = _blueprint(config, facts, num_threads, key, gpu, rooms)
        deployment = Deployment(
            cluster,
            blueprint,
            Card(OWNER, mailbox.endpoint),
            lambda cards: mailbox.meet({card.name: card.endpoint for card in cards}),
            nodes,
        )
        stack.callback(deployment.close)
        _start_parts(deployment, show)
        supervisor = Supervisor(deployment)
        supervisor.start()
        stack.callback(supervisor.close)
        yield Launched(deployment, mailbox)


def _threads(config: ServeConfig, num_cpus: int) -> int:
    """CPU threads of each instance: as asked for, or a fair share of its node's ``num_cpus``.

    A planned node is shared by as many ranks as the plan's cluster has slots for, whether or not all are taken: the
    plan's latencies are those of such a slot.
    """
    fullest = max(len(group.seats) for group in group_by_node(config.instances))
    return config.engine.threads or max(1, num_cpus // (config.cluster.gpus_per_node if config.cluster else fullest))


def _start_parts(deployment: Deployment, show: Callable[[str], None]) -> None:
    """Start router and instances in parallel and introduce them to each other."""
    show("waiting for CPUs")
    deployment.reserve()
    router = deployment.start_router()
    loading = dict(deployment.start_instance(slot)[::-1] for slot in range(len(deployment.blueprint.instances)))
    loaded = []
    while loading:
        names = ", ".join(member.spec.instance_id for member in loading.values())
        show(f"loading the model on {names}")
        done, _ = ray.wait(list(loading), timeout=1.0)
        for call in done:
            member = loading.pop(call)
            try:
                member.card = ray.get(call)
            except RayError as error:
                raise cause_of(error, member.spec.instance_id) from error
            loaded.append(member)
    show("introducing the instances to each other")
    deployment.adopt_router(ray.get(router))
    deployment.adopt_instances(loaded, all_must_meet=True)


def _rooms(config: ServeConfig, cluster: RayCluster, nodes: Mapping[int, FoundNode]) -> tuple[Room, ...]:
    """What the instances find on each of their nodes; what was planned for none may come onto any that has the CPUs."""
    rooms = []
    for group in group_by_node(config.instances):
        num_ranks = len(group.seats)
        if group.node is not None and group.node in nodes:
            there = [nodes[group.node]]
        else:
            found = cluster.nodes()
            there = [node for node in found if node.num_cpus >= num_ranks] or found
        for node in there:
            # Ray looked at a node when it joined; at this one, one can look now.
            is_here = node.node_id == cluster.here() or not node.memory
            free = free_memory() if is_here else node.memory
            name = "" if is_here else f"on node {node.node_id[:8]} of the Ray cluster"
            slots = {slot for slot, _ in group.seats}
            share = sum(1 / config.instances[slot].parallel.num_ranks for slot, _ in group.seats) / len(slots)
            # What starts ranks of an instance whose rank 0 is elsewhere counts as one of them.
            hosts = sum((slot, 0) not in group.seats for slot in slots)
            rooms.append(Room(len(slots), num_ranks + hosts, free, name, share))
    return tuple(rooms)


def _blueprint(
    config: ServeConfig,
    facts: ModelFacts,
    num_threads: int,
    key: ClusterKey,
    gpu: GpuFacts | None,
    rooms: Sequence[Room] = (),
) -> Blueprint:
    """What to deploy; without ``rooms`` all instances are on this machine."""
    engine = config.engine
    max_model_len = min(engine.max_model_len or facts.max_model_len, facts.max_model_len)
    if engine.max_model_len is not None and engine.max_model_len > facts.max_model_len:
        raise ConfigError(
            f"--max-model-len {engine.max_model_len} is more than the model can take: at most {facts.max_model_len}"
        )
    seats = max((group.seats for group in group_by_node(config.instances)), key=len)
    rooms = rooms or (Room(len({slot for slot, _ in seats}), len(seats), free_memory()),)
    specs: list[InstanceSpec] = []
    numbers: Counter[Role] = Counter()
    on_card = _split(config, gpu, max_model_len) if gpu is not None else None
    has_own_gpu = are_on_gpus(config.cluster)
    is_on_gpu = has_own_gpu or on_card is not None
    for slot, instance in enumerate(config.instances):
        check_shards(instance.parallel, facts.num_layers, facts.num_kv_heads)
        planned = instance.limits
        asked = engine.kv if planned.kv_tokens is None else KvRequest(planned.kv_tokens, None, engine.kv.block_size)
        # Where there are more shards than KV heads, several have the same one.
        token_bytes = facts.token_bytes * max(1, instance.parallel.tp // facts.num_kv_heads)
        if on_card is not None:
            kv = on_card[slot].kv
        elif has_own_gpu:
            kv = own_card_kv(asked, token_bytes)
        else:
            kv = least_kv(
                rooms,
                asked,
                weight_bytes=facts.weight_bytes,
                token_bytes=token_bytes,
                max_model_len=max_model_len,
            )
        runs_ahead = is_on_gpu and instance.parallel.pp == 1
        scheduler = SchedulerConfig(
            max_batch_tokens=planned.max_batch_tokens or engine.max_batch_tokens,
            max_batch_size=planned.max_batch_size or engine.max_batch_size,
            # On a GPU the next step is launched while the tokens of the last one travel, but to the pipeline's start.
            max_in_flight=2 if runs_ahead else instance.parallel.pp,
            lookahead=runs_ahead,
            max_model_len=max_model_len,
            prefix_caching=engine.prefix_caching,
            prefix_cache_tokens=engine.prefix_cache_tokens,
            policy=engine.mixed_policy,
        )
        name = f"{instance.role}-{numbers[instance.role]}"
        numbers[instance.role] += 1
        spec = InstanceSpec(name, instance.role, kv, scheduler, instance.parallel)
        spec.check_prefix_cache()
        specs.append(spec)
    least = min(spec.kv.num_tokens for spec in specs)
    if least < max_model_len:
        logger.warning("KV memory holds %d tokens, requests longer than that are refused", least)
    return Blueprint(
        instances=config.instances,
        specs=tuple(specs),
        plan=EnginePlan(
            config.model_dir,
            engine.dtype,
            num_threads,
            # An instance's process sees its own GPUs only.
            device="cuda:0" if is_on_gpu else "cpu",
            hardware=engine.hardware,
        ),
        key=key,
        log_dir=config.event_log,
        kv_access=_kv_access(config),
        gpus_per_rank=1 if has_own_gpu else 0,
        router=RouterConfig(near=_near(config, specs), slo=config.slo),
    )


def _near(config: ServeConfig, specs: Sequence[InstanceSpec]) -> dict[str, tuple[str, ...]]:
    """Who is near whom where it was planned: the router prefers those, as it did when the plan was simulated."""
    if config.cluster is None or not all(instance.gpus for instance in config.instances):
        return {}
    placed = (PlacedInstance(spec, instance.gpus) for spec, instance in zip(specs, config.instances, strict=True))
    return Placement(config.cluster, tuple(placed)).near()


def _split(config: ServeConfig, gpu: GpuFacts, max_model_len: int) -> tuple[ProcessMemory, ...]:
    """The GPU's memory, divided among the instances."""
    engine = config.engine
    pools = [instance.limits for instance in config.instances]
    limits = Limits(
        max_batch_tokens=max(pool.max_batch_tokens or engine.max_batch_tokens for pool in pools),
        max_batch_size=max(pool.max_batch_size or engine.max_batch_size for pool in pools),
        max_model_len=max_model_len,
    )
    return split_card(gpu.card, [instance.role for instance in config.instances], gpu.model, limits, engine.kv)


def _kv_access(config: ServeConfig) -> KvAccess:
    """How ranks reach each other: no port is opened where all of them share a node's memory, unless TCP was asked for.

    A process on a GPU sees that GPU alone, and reaches no other's memory.
    """
    engine = config.engine
    is_apart = len(group_by_node(config.instances)) > 1 or are_on_gpus(config.cluster)
    opens_port = engine.kv_transport in {"tcp", "nccl"} or (engine.kv_transport == "auto" and is_apart)
    return KvAccess(engine.kv_transport, engine.kv_interface, opens_port)
