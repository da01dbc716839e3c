"""The actors of one launch: created in a placement group, introduced to each other, replaced when they die.

Ray is asked for processes and calls at start and after a death only. Who watches and when to try again is
:mod:`distserve.cluster.supervise`'s business.
"""

import contextlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from distserve.cluster.parts import NEARBY, Card, ClusterKey, EnginePlan, InstanceConfig, KvAccess
from distserve.cluster.ray_actors import CONCURRENCY, InstanceActor, RankHostActor, RouterActor
from distserve.cluster.ray_cluster import RayCluster
from distserve.cluster.reservation import ROUTER_CPUS, RankResources, Reservation, cpus_per_rank
from distserve.cluster.seats import FoundNode, NodeGroup, WantedInstance, group_by_node
from distserve.core.config import InstanceSpec, Role
from distserve.core.errors import ConflictError, DistserveError, InstanceError
from distserve.core.router import RouterConfig

_PLACEMENT_PATIENCE = 60.0
_MEETING_PATIENCE = 10.0
_CLOSE_PATIENCE = 3.0


@dataclass(frozen=True, slots=True)
class Blueprint:
    """What to deploy: ``instances``, each with its specification in ``specs``, whose engines are all alike.

    ``gpus_per_rank`` is what Ray is to set aside: none where instances compute on CPUs, or share a GPU.
    """

    instances: tuple[WantedInstance, ...]
    specs: tuple[InstanceSpec, ...]
    plan: EnginePlan
    key: ClusterKey
    log_dir: Path | None = None
    kv_access: KvAccess = NEARBY
    gpus_per_rank: int = 0
    router: RouterConfig = field(default_factory=RouterConfig)

    @property
    def max_model_len(self) -> int:
        """Most tokens of prompt and output together that every instance takes and some instance can decode."""
        longest = min(spec.scheduler.max_model_len for spec in self.specs)
        return min(longest, max(spec.kv.num_tokens for spec in self.specs if spec.role is not Role.PREFILL))


@dataclass(slots=True)
class Member:
    """An instance that runs, or is about to, in place ``slot`` of the blueprint."""

    slot: int
    spec: InstanceSpec
    actor: Any
    rank_hosts: tuple[Any, ...] = ()
    """The actors beside its ranks on other nodes than rank 0's."""
    card: Card | None = None

    def kill(self) -> None:
        """End its processes."""
        for actor in (self.actor, *self.rank_hosts):
            ray.kill(actor)


@dataclass(slots=True)
class Deployment:
    """Everything that runs for one launch.

    Args:
        cluster: The Ray cluster it runs in.
        blueprint: What runs.
        nodes: Node of the Ray cluster by node of the plan; empty if nothing was planned, or the cluster is local.
        owner: The API process, which everyone has to know.
        meet: Tells the API process of new parts.
    """

    cluster: RayCluster
    blueprint: Blueprint
    owner: Card
    meet: Callable[[Iterable[Card]], None]
    nodes: Mapping[int, FoundNode] = field(default_factory=dict)
    members: dict[str, Member] = field(default_factory=dict)
    router: Any = None
    """The router's actor, once started."""
    _router_card: Card | None = None
    _reservation: Reservation | None = None
    _generations: dict[int, int] = field(default_factory=dict)
    _lost: list[str] = field(default_factory=list)
    _roles: dict[int, Role] = field(default_factory=dict)
    """Roles that slots were given since the start."""

    def reserve(self) -> None:
        """Reserve CPUs and GPUs for all parts, those planned for one node on one node; unplanned ones share one.

        Raises:
            ConfigError: they are not there, or not free.
        """
        groups = group_by_node(self.blueprint.instances)
        num_cpus = min((node.num_cpus for node in self.nodes.values()), default=self.cluster.largest_num_cpus)
        share = cpus_per_rank(self.blueprint.plan.num_threads, max(len(g.seats) for g in groups), num_cpus)
        self._reservation = Reservation(groups, self.nodes, RankResources(share, self.blueprint.gpus_per_rank))
        self._reservation.wait(_PLACEMENT_PATIENCE)

    def start_router(self) -> Any:
        """Create the router's actor; the call that gives its card.

        The first has CPUs reserved. A later one is on this process's node and needs none: the first one's node may be
        gone, and nothing outlives this one.
        """
        assert self._reservation is not None, "reserve comes first"
        is_first = self.router is None
        self.router = RouterActor.options(
            num_cpus=ROUTER_CPUS if is_first else 0,
            max_concurrency=CONCURRENCY,
            scheduling_strategy=self._reservation.router()
            if is_first
            else NodeAffinitySchedulingStrategy(self.cluster.here(), soft=False),
        ).remote(self.blueprint.key, self._listen_on(), self.blueprint.log_dir, self.blueprint.router)
        return self.router.card.remote()

    def start_instance(self, slot: int) -> tuple[Member, Any]:
        """Create an actor for ``slot``, under an id never used before; the call that loads it and gives its card."""
        assert self._reservation is not None, "reserve comes first"
        blueprint = self.blueprint
        spec = blueprint.specs[slot]
        spec = replace(spec, role=self._roles.get(slot, spec.role))
        generation = self._generations.get(slot, -1) + 1
        self._generations[slot] = generation
        # A lost instance's id is never given again: what was said of the dead does not concern its successor.
        if generation:
            spec = replace(spec, instance_id=f"{spec.instance_id}.{generation}")
        # Rank 0's node first: its process speaks for the instance.
        groups = sorted(self._groups_of(slot), key=lambda group: (slot, 0) not in group.seats)
        actor, *rank_hosts = (
            self._start_ranks(InstanceActor if number == 0 else RankHostActor, group, slot, spec)
            for number, group in enumerate(groups)
        )
        # Where a rank cannot join, the call to load fails with the reason.
        muster = actor.muster.remote() if rank_hosts else None
        joined = [host.join.remote(muster) for host in rank_hosts]
        return Member(slot, spec, actor, tuple(rank_hosts)), actor.load.remote(*joined)

    def _start_ranks(self, kind: Any, group: NodeGroup, slot: int, spec: InstanceSpec) -> Any:
        """Create the actor for the ranks of an instance that are on the node of ``group``."""
        assert self._reservation is not None, "reserve comes first"
        blueprint = self.blueprint
        ranks = tuple(rank for owner, rank in group.seats if owner == slot)
        config = InstanceConfig(
            spec=spec,
            plan=blueprint.plan,
            key=blueprint.key,
            host=self._listen_on(),
            first_core=group.seats.index((slot, ranks[0])) * blueprint.plan.num_threads,
            num_cores=len(group.seats) * blueprint.plan.num_threads,
            log_dir=blueprint.log_dir,
            kv_access=blueprint.kv_access,
            ranks=ranks,
        )
        return kind.options(
            num_cpus=self._reservation.rank.num_cpus,
            # Those of all ranks there: their processes are the actor's children.
            num_gpus=self._reservation.rank.num_gpus * len(ranks),
            max_concurrency=CONCURRENCY,
            scheduling_strategy=self._reservation.seat(slot, ranks[0]),
        ).remote(config)

    def has_nodes_for(self, slot: int) -> bool:
        """Whether the nodes that the instance in ``slot`` was planned for are still there, or any will do."""
        alive = {node.node_id for node in self.cluster.nodes()}
        planned = (group.node for group in self._groups_of(slot))
        return all(self.nodes[node].node_id in alive for node in planned if node is not None and node in self.nodes)

    def adopt_router(self, card: Card) -> None:
        """Let a router, the first or a later one, know everyone, and then everyone know it."""
        self._router_card = card
        members = list(self.members.values())
        ray.get(self.router.meet.remote([self.owner, *self._cards()]))
        # Who died while there was no router to tell of it is news to everyone.
        ray.get([self.router.lost.remote(instance_id) for instance_id in self._lost])
        ray.get([self.router.up.remote(member.spec) for member in members])
        if told := [member.actor.meet.remote([card]) for member in members]:
            ray.wait(told, num_returns=len(told), timeout=_MEETING_PATIENCE)
        self.meet([card])
        # Prefill instances may be waiting for an answer; which those are, a change of role under way leaves open.
        ray.get(self.router.succeed.remote([self.owner.name, *self.members]))

    def adopt_instances(self, members: Iterable[Member], *, all_must_meet: bool = False) -> None:
        """Introduce loaded instances to everyone, start them, and let the router use them.

        An instance that cannot reach another's KV memory tries again by itself.

        Raises:
            InstanceError: with ``all_must_meet``, if one cannot; says which, and why.
        """
        new = list(members)
        names = {member.spec.instance_id for member in new}
        for member in new:
            self.members[member.spec.instance_id] = member
        assert self._router_card is not None
        cards = [member.card for member in new if member.card is not None]
        self.meet(cards)
        old = [member.actor.meet.remote(cards) for name, member in self.members.items() if name not in names]
        everyone = [self.owner, self._router_card, *self._cards()]
        ray.get(self.router.meet.remote(cards))
        met = ray.get([member.actor.meet.remote(everyone) for member in new])
        problems = [problem for said in met for problem in said]
        if all_must_meet and problems:
            raise InstanceError("; ".join(problems))
        # One of these may be dying itself, which is no fault of the new ones.
        if old:
            ray.wait(old, num_returns=len(old), timeout=_MEETING_PATIENCE)
        ray.get([member.actor.start.remote() for member in new])
        ray.get([self.router.up.remote(member.spec) for member in new])

    def prepare_role(self, instance_id: str, role: Role) -> None:
        """Let an instance and its peers reach the KV memory that it and they need if it becomes ``role``.

        Nothing else changes. May be called from any thread; of an unknown instance it is the router who says so.

        Raises:
            ConflictError: the instance cannot take the role; says why.
        """
        member = self.members.get(instance_id)
        if member is None:
            return
        started_as = self.blueprint.specs[member.slot].role
        if self.blueprint.plan.device != "cpu" and started_as is not Role.MIXED:
            raise ConflictError(
                f"{instance_id} has a {started_as} instance's part of a GPU's memory: only what was started "
                "as mixed (--mixed) can change its role on a GPU"
            )
        try:
            # Set before the others are looked up: who starts meanwhile finds the card, or is found.
            member.card = ray.get(member.actor.prepare.remote(role), timeout=_MEETING_PATIENCE)
            others = [other.actor for other in list(self.members.values()) if other is not member]
            meeting = [other.meet.remote([member.card]) for other in others]
            problems = list(ray.get(member.actor.meet.remote(self._cards()), timeout=_MEETING_PATIENCE))
        except RayError as error:
            raise ConflictError(f"{instance_id} does not answer: {error}") from error
        met, _ = ray.wait(meeting, num_returns=len(meeting), timeout=_MEETING_PATIENCE) if meeting else ([], [])
        for call in met:
            # One of the others may be dying itself, which is no fault of this one.
            with contextlib.suppress(RayError):
                problems += ray.get(call)
        if problems:
            raise ConflictError(f"{instance_id} stays what it is: {'; '.join(problems)}")

    def assume_role(self, instance_id: str, role: Role) -> None:
        """The router has agreed to a change: a router or an instance started from now on goes by it."""
        member = self.members.get(instance_id)
        if member is not None:
            member.spec = replace(member.spec, role=role)
            self._roles[member.slot] = role

    def discard(self, instance_id: str) -> None:
        """Forget a dead instance and have the router tell everyone."""
        member = self.members.pop(instance_id)
        member.kill()
        self._lost.append(instance_id)
        self.router.lost.remote(instance_id)

    def close(self) -> None:
        """Stop all parts; those that do not answer within seconds are killed."""
        actors = [member.actor for member in self.members.values()]
        actors += [self.router] if self.router is not None else []
        if actors:
            closing = [actor.close.remote() for actor in actors]
            ray.wait(closing, num_returns=len(closing), timeout=_CLOSE_PATIENCE)
        for member in self.members.values():
            member.kill()
        if self.router is not None:
            ray.kill(self.router)
        if self._reservation is not None:
            self._reservation.close()

    def _listen_on(self) -> str | None:
        """Loopback in a local cluster; elsewhere each part knows its own node's address."""
        return self.cluster.host if self.cluster.is_local else None

    def _groups_of(self, slot: int) -> list[NodeGroup]:
        """The nodes of an instance, each with all its seats."""
        groups = group_by_node(self.blueprint.instances)
        return [group for group in groups if any(owner == slot for owner, _ in group.seats)]

    def _cards(self) -> list[Card]:
        return [member.card for member in list(self.members.values()) if member.card is not None]


def cause_of(error: Exception, name: str) -> DistserveError:
    """What a failed call to an actor means to the user: our own error as it was raised, or the death of the part."""
    cause = getattr(error, "cause", None)
    if isinstance(cause, DistserveError):
        return cause
    return InstanceError(f"{name} failed: {error}")
