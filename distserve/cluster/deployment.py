"""The actors of one launch: created in a placement group, introduced to each other, replaced when they die.

Ray is asked for processes and calls at start and after a death only. Who watches and when to try again is
:mod:`distserve.cluster.supervise`'s business.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ray
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from distserve.cluster.parts import Card, ClusterKey, EnginePlan, InstanceConfig
from distserve.cluster.ray_actors import CONCURRENCY, InstanceActor, RouterActor
from distserve.cluster.ray_cluster import RayCluster
from distserve.core.config import InstanceSpec, KvConfig, Role, SchedulerConfig
from distserve.core.errors import ConfigError, DistserveError, InstanceError

_ROUTER_CPUS = 0.1
_PLACEMENT_PATIENCE = 60.0
_MEETING_PATIENCE = 10.0
_CLOSE_PATIENCE = 3.0


@dataclass(frozen=True, slots=True)
class Blueprint:
    """What to deploy: an instance per entry of ``roles``, all alike but for their role."""

    roles: tuple[Role, ...]
    plan: EnginePlan
    kv: KvConfig
    scheduler: SchedulerConfig
    key: ClusterKey
    log_dir: Path | None = None

    @property
    def num_cores(self) -> int:
        """CPUs that all instances together compute on."""
        return len(self.roles) * self.plan.num_threads


@dataclass(slots=True)
class Member:
    """An instance that runs, or is about to, in place ``slot`` of the blueprint."""

    slot: int
    spec: InstanceSpec
    actor: Any
    card: Card | None = None


@dataclass(slots=True)
class Deployment:
    """Everything that runs for one launch.

    Args:
        cluster: The Ray cluster it runs in.
        blueprint: What runs.
        owner: The API process, which everyone has to know.
        meet: Tells the API process of new parts.
    """

    cluster: RayCluster
    blueprint: Blueprint
    owner: Card
    meet: Callable[[Iterable[Card]], None]
    members: dict[str, Member] = field(default_factory=dict)
    router: Any = None
    """The router's actor, once started."""
    _router_card: Card | None = None
    _group: PlacementGroup | None = None
    _generations: dict[int, int] = field(default_factory=dict)
    _lost: list[str] = field(default_factory=list)

    def reserve(self) -> None:
        """Reserve CPUs for all parts on one host, whose memory they share.

        Raises:
            ConfigError: no host of the cluster has them.
        """
        count = len(self.blueprint.roles)
        share = self._cpus_per_instance()
        self._group = placement_group(
            [{"CPU": _ROUTER_CPUS}] + [{"CPU": share}] * count, strategy="STRICT_PACK", name=""
        )
        if not self._group.wait(_PLACEMENT_PATIENCE):
            raise ConfigError(
                f"no host of the Ray cluster has {share * count + _ROUTER_CPUS:g} CPUs free for {count} instances: "
                "ask for fewer instances or fewer --threads"
            )

    def start_router(self) -> Any:
        """Create the router's actor; the call that gives its card."""
        self.router = RouterActor.options(
            num_cpus=_ROUTER_CPUS, max_concurrency=CONCURRENCY, scheduling_strategy=self._place(0)
        ).remote(self.blueprint.key, self._listen_on(), self.blueprint.log_dir)
        return self.router.card.remote()

    def start_instance(self, slot: int) -> tuple[Member, Any]:
        """Create an actor for ``slot``, under an id never used before; the call that loads it and gives its card."""
        blueprint = self.blueprint
        role = blueprint.roles[slot]
        generation = self._generations.get(slot, -1) + 1
        self._generations[slot] = generation
        number = slot - blueprint.roles.index(role)
        # A lost instance's id is never given again: what was said of the dead does not concern its successor.
        instance_id = f"{role}-{number}" if generation == 0 else f"{role}-{number}.{generation}"
        spec = InstanceSpec(instance_id, role, blueprint.kv, blueprint.scheduler)
        config = InstanceConfig(
            spec=spec,
            plan=blueprint.plan,
            key=blueprint.key,
            host=self._listen_on(),
            first_core=slot * blueprint.plan.num_threads,
            num_cores=blueprint.num_cores,
            log_dir=blueprint.log_dir,
        )
        actor = InstanceActor.options(
            num_cpus=self._cpus_per_instance(),
            max_concurrency=CONCURRENCY,
            scheduling_strategy=self._place(slot + 1),
        ).remote(config)
        return Member(slot, spec, actor), actor.load.remote()

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
        asking = [member.spec.instance_id for member in members if member.spec.role is Role.PREFILL]
        ray.get(self.router.succeed.remote([self.owner.name, *asking]))

    def adopt_instances(self, members: Iterable[Member]) -> None:
        """Introduce loaded instances to everyone, start them, and let the router use them."""
        new = list(members)
        names = {member.spec.instance_id for member in new}
        for member in new:
            self.members[member.spec.instance_id] = member
        assert self._router_card is not None
        cards = [member.card for member in new if member.card is not None]
        self.meet(cards)
        old = [member.actor.meet.remote(cards) for name, member in self.members.items() if name not in names]
        everyone = [self.owner, self._router_card, *self._cards()]
        ray.get([self.router.meet.remote(cards), *(member.actor.meet.remote(everyone) for member in new)])
        # One of these may be dying itself, which is no fault of the new ones.
        if old:
            ray.wait(old, num_returns=len(old), timeout=_MEETING_PATIENCE)
        ray.get([member.actor.start.remote() for member in new])
        ray.get([self.router.up.remote(member.spec) for member in new])

    def discard(self, instance_id: str) -> None:
        """Forget a dead instance and have the router tell everyone."""
        member = self.members.pop(instance_id)
        ray.kill(member.actor)
        self._lost.append(instance_id)
        self.router.lost.remote(instance_id)

    def close(self) -> None:
        """Stop all parts; those that do not answer within seconds are killed."""
        actors = [member.actor for member in self.members.values()]
        actors += [self.router] if self.router is not None else []
        if actors:
            closing = [actor.close.remote() for actor in actors]
            ray.wait(closing, num_returns=len(closing), timeout=_CLOSE_PATIENCE)
        for actor in actors:
            ray.kill(actor)
        if self._group is not None:
            remove_placement_group(self._group)

    def _listen_on(self) -> str | None:
        """Loopback in a local cluster; elsewhere each part knows its own node's address."""
        return self.cluster.host if self.cluster.is_local else None

    def _cards(self) -> list[Card]:
        return [member.card for member in self.members.values() if member.card is not None]

    def _cpus_per_instance(self) -> float:
        """CPUs to ask of Ray per instance: its threads, or an equal share where there are fewer."""
        threads = self.blueprint.plan.num_threads
        share = (self.cluster.num_cpus - _ROUTER_CPUS) / len(self.blueprint.roles)
        if share >= threads:
            return threads
        # Ray counts CPUs in whole numbers from one on.
        return float(int(share)) if share >= 1 else max(0.001, int(share * 1000) / 1000)

    def _place(self, bundle: int) -> PlacementGroupSchedulingStrategy:
        assert self._group is not None, "reserve comes first"
        return PlacementGroupSchedulingStrategy(self._group, placement_group_bundle_index=bundle)


def cause_of(error: Exception, name: str) -> DistserveError:
    """What a failed call to an actor means to the user: our own error as it was raised, or the death of the part."""
    cause = getattr(error, "cause", None)
    if isinstance(cause, DistserveError):
        return cause
    return InstanceError(f"{name} failed: {error}")
