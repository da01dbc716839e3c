"""The router: admits requests, names the instance that prefills and the one that decodes.

It hears of requests only when they start and when they need a decode instance, never per token. Its state is soft:
what it knows of an instance is the instance's last report plus the work it has assigned that no report shows yet; a
fresh router is complete as soon as every instance has reported once.

- Prefill goes to the shortest predicted wait, prefix hits counted in (:mod:`distserve.core.prompt_choice`); where there
  are prefill and mixed instances, to the kind that the objective suffers least from (:mod:`distserve.core.hybrid`).
- Decode goes to the decode or mixed instance with the largest share of free blocks among those with room; one near the
  prefill instance counts as a little emptier than it is, so that KV stays within nodes but loads stay even, and so does
  one that was sent the prompt before, by how much of it. When none has room the question waits in order; the prefill
  instance keeps the KV meanwhile, which is the backpressure.
- When even the shortest wait exceeds ``max_wait`` a new request is shed (429). A request that no instance could ever
  hold is refused (400); one that lacks a pool is refused for now (503).
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from itertools import islice
from math import ceil

from distserve.core.commands import Command, Send, WakeAt
from distserve.core.config import SLO, InstanceSpec, Role
from distserve.core.events import (
    Event,
    InstanceDraining,
    InstanceLost,
    InstanceUp,
    Received,
    Timer,
)
from distserve.core.hybrid import window_of
from distserve.core.instance_view import InstanceView, Work
from distserve.core.messages import (
    Abort,
    Become,
    ChangeRole,
    DecodeAssigned,
    DecodeDropped,
    DecodeWanted,
    Failed,
    Hello,
    InstanceGone,
    Message,
    Prefill,
    Rejected,
    Report,
    RequestKey,
    RoleAnswer,
    Routed,
    Status,
    Submit,
)
from distserve.core.prompt_choice import PromptChooser
from distserve.core.request import Request
from distserve.core.role_changes import begin, follow, refusal
from distserve.core.routed_prefixes import PromptKeys
from distserve.core.scheduler import ROUTER

_NEAR = 0.15
"""By how much of its memory a far decode instance must be emptier than a near one to be preferred."""

_HELD = 0.15
"""By how much of its memory a decode instance must be emptier than one that holds all of a prompt to be preferred."""

DEFAULT_SLO = SLO(ttft=1.0, tpot=0.05)
"""The objective where none is given: an answer begins within a second, and comes faster than anybody reads."""


@dataclass(frozen=True, slots=True)
class RouterConfig:
    """``max_wait`` is the predicted queueing, in seconds, beyond which requests are shed.

    Status goes to the owners every ``status_interval`` seconds. A request that was admitted once and comes again
    while a pool is down waits for a replacement, at most ``patience`` seconds; so does one
    whose prompt is computed when the decode pool goes down. An instance that has not reported for
    ``silence`` seconds, many times its heartbeat, counts as lost even if its process lives. ``near`` names, for a
    prefill instance, the decode instances its KV reaches without leaving a node: they are preferred. Without
    ``counts_hits`` prompts and KV go by load alone, whatever was sent where. ``slo`` is what prompts are divided for
    between prefill and mixed instances, where there are both.
    """

    max_wait: float = 120.0
    status_interval: float = 1.0
    patience: float = 60.0
    silence: float = 30.0
    near: Mapping[str, Collection[str]] = field(default_factory=dict)
    counts_hits: bool = True
    slo: SLO = DEFAULT_SLO


class Router:
    """One per cluster; a machine in the sense of :class:`distserve.core.events.Machine`."""

    def __init__(self, config: RouterConfig | None = None) -> None:
        self._config = config or RouterConfig()
        self._instances: dict[str, InstanceView] = {}
        self._pools: dict[tuple[Role, ...], list[InstanceView]] = {}
        """Instances of certain roles that take requests; found again after every change of membership."""
        self._owners: dict[str, None] = {}
        self._pending: dict[RequestKey, tuple[str, DecodeWanted, set[str]]] = {}
        """Decode instances wanted and not found yet, oldest first: who asks, and who refused since its last report."""
        self._parked: dict[RequestKey, tuple[float, Request]] = {}
        """Requests that came again while a pool was down, with the time their patience ends."""
        self._gone: dict[str, None] = {}
        """Instances lost: a question of theirs may still be on its way, and not everyone may have heard of it."""
        self._keys = PromptKeys()
        self._chooser = PromptChooser(self._config.slo, self._keys)
        self._commands: list[Command] = []
        self._now = 0.0
        self._next_status = 0.0
        self._num_local = 0
        self._num_remote = 0
        self._unplaceable: dict[RequestKey, float] = {}
        """Since when questions have waited that no decode instance which is up could ever answer."""

    def handle(self, now: float, event: Event) -> list[Command]:
        """Take one event; see :class:`distserve.core.events.Machine`."""
        self._now = now
        match event:
            case Received(sender, message):
                self._on_message(sender, message)
            case InstanceUp(spec):
                self._on_up(spec)
            case InstanceLost(instance_id):
                self._on_lost(instance_id)
            case InstanceDraining(instance_id):
                self._instances[instance_id].is_draining = True
                self._pools.clear()
                self._send_status()
            case Timer():
                pass
            case _:
                raise AssertionError(f"not a router's event: {event}")
        if self._parked:
            self._retry_parked()
        if now >= self._next_status:
            self._lose_silent()
            self._end_pending()
            self._send_status()
            self._next_status = now + self._config.status_interval
            self._commands.append(WakeAt(self._next_status))
        commands, self._commands = self._commands, []
        return commands

    # -- membership -------------------------------------------------------------------------------------------------

    def _on_up(self, spec: InstanceSpec) -> None:
        self._gone.pop(spec.instance_id, None)
        remembers = self._config.counts_hits and spec.scheduler.prefix_caching
        window = window_of(self._config.slo)
        self._instances[spec.instance_id] = InstanceView.fresh(spec, self._now, window, remembers=remembers)
        self._pools.clear()
        self._tell_of_losses(spec.instance_id)
        self._assign_pending()
        self._send_status()

    def _on_lost(self, instance_id: str) -> None:
        if instance_id in self._gone:
            return
        # Also one this router has never seen: it may have died while there was no router to say so.
        self._gone[instance_id] = None
        self._instances.pop(instance_id, None)
        self._pools.clear()
        self._pending = {key: wanted for key, wanted in self._pending.items() if wanted[0] != instance_id}
        for view in self._instances.values():
            # What was to come through the lost instance never will.
            view.assigned = {key: work for key, work in view.assigned.items() if work.through != instance_id}
        for part in (*self._instances, *self._owners):
            self._send(part, InstanceGone(instance_id))
        self._send_status()

    def _lose_silent(self) -> None:
        for view in list(self._instances.values()):
            if self._now >= view.heard_at + self._config.silence:
                instance_id = view.spec.instance_id
                self._on_lost(instance_id)
                # Should it ever wake, nobody wants what it has: it is to make room for a replacement.
                self._send(instance_id, InstanceGone(instance_id))

    def _on_change_role(self, sender: str, change: ChangeRole) -> None:
        refused = refusal(self._instances, change)
        if refused is not None:
            self._send(sender, RoleAnswer(change.instance_id, change.role, *refused))
            return
        begin(self._instances[change.instance_id], change.role)
        self._pools.clear()
        self._send(change.instance_id, Become(change.role, change.patience))
        self._send(sender, RoleAnswer(change.instance_id, change.role))
        self._send_status()

    def _tell_of_losses(self, part: str) -> None:
        for instance_id in self._gone:
            self._send(part, InstanceGone(instance_id))

    def _send_status(self) -> None:
        instances = tuple((view.spec, view.report) for view in self._instances.values())
        status = Status(instances, self._num_local, self._num_remote)
        for owner_id in self._owners:
            self._send(owner_id, status)

    # -- messages ---------------------------------------------------------------------------------------------------

    def _on_message(self, sender: str, message: Message) -> None:
        match message:
            case Report():
                view = self._instances.get(message.instance_id)
                if view is not None:
                    view.note(message, self._now)
                    if follow(view, message):
                        self._pools.clear()
                        self._send_status()
                    for _, _, refused_by in self._pending.values():
                        refused_by.discard(message.instance_id)
                    self._assign_pending()
            case Submit(request):
                self._on_submit(request)
            case DecodeWanted() if sender in self._gone:
                pass  # what would be assigned to it would never be used, nor given back
            case DecodeWanted():
                self._pending[message.key] = (sender, message, set(message.refused_by))
                self._assign_pending()
            case DecodeDropped(key, decode_id):
                self._pending.pop(key, None)
                if decode_id in self._instances:
                    self._instances[decode_id].assigned.pop(key, None)
                self._assign_pending()
            case ChangeRole():
                self._on_change_role(sender, message)
            case Hello():
                if sender not in self._owners:
                    self._owners[sender] = None
                    self._tell_of_losses(sender)
                self._send_status()
            case _:
                raise AssertionError(f"not for the router: {message}")

    def _on_submit(self, request: Request) -> None:
        takers = self._takers(request)
        refusal = self._refusal(request, takers)
        if refusal is not None:
            status, reason = refusal
            if request.attempt > 0:
                status = 503  # it was admitted once: it is the instances that have changed
            if status == 503 and request.attempt > 0:
                until, _ = self._parked.get(request.key, (self._now + self._config.patience, request))
                if self._now < until:
                    self._parked[request.key] = (until, request)
                    return
            self._parked.pop(request.key, None)
            self._send(request.owner_id, Rejected(request.key, status, reason))
            return
        decoding = self._pool(Role.DECODE, Role.MIXED)
        is_memory_short = any(self._is_placeable(wanted) for _, wanted, _ in self._pending.values())
        choice = self._chooser.choose(self._now, request, takers, decoding, is_memory_short=is_memory_short)
        wait = choice.wait
        # What was admitted once, and may be half answered, is not turned away when it comes again.
        if wait > self._config.max_wait and request.attempt == 0:
            excess = max(1.0, float(ceil(wait - self._config.max_wait)))
            reason = f"all instances are busy: the shortest predicted wait is {wait:.0f} s"
            self._send(request.owner_id, Rejected(request.key, 429, reason, retry_after=excess))
            return
        self._parked.pop(request.key, None)
        view, num_tokens = choice.view, choice.num_tokens(request)
        view.give(request.key, num_tokens, ROUTER, self._now, choice.rate)
        if view.spec.role is Role.MIXED:
            self._num_local += 1
        else:
            self._num_remote += 1
        if view.prefixes is not None:
            view.prefixes.note(self._keys.make(request, view.spec.kv.block_size))
        self._send(view.spec.instance_id, Prefill(request))
        self._send(request.owner_id, Routed(request.key, view.spec.instance_id))

    def _retry_parked(self) -> None:
        """Look at waiting requests again: their pool may be back, or their patience at its end."""
        for request in [request for _, request in self._parked.values()]:
            self._on_submit(request)

    def _refusal(self, request: Request, takers: Collection[InstanceView]) -> tuple[int, str] | None:
        """(status, reason) if the request cannot be served, ever (400) or with the instances there are now (503).

        ``takers`` are those that can compute its prompt.
        """
        prefill, decode = self._pool(Role.PREFILL, Role.MIXED), self._pool(Role.DECODE, Role.MIXED)
        for name, pool in (("prefill", prefill), ("decode", decode)):
            if not pool:
                return 503, f"no {name} instance is up"
        num_total = request.max_total_tokens
        for view in prefill + decode:
            limit = view.max_model_len
            if num_total > limit:
                return 400, f"{num_total} tokens (prompt and max_tokens) exceed the context of {limit}"
        largest = max([view.max_kv_tokens for view in prefill])
        if request.num_prefill_tokens > largest:
            return 400, f"a prompt of {request.num_prefill_tokens} tokens exceeds the KV memory of {largest} tokens"
        # A prompt that only mixed instances can take has to be decoded there.
        if not takers or not any(self._can_ever_decode(view, request) for view in decode):
            largest = max(view.max_kv_tokens for view in decode)
            count = len(request.choices)
            return 400, (
                f"{num_total} tokens (prompt and max_tokens) for {count} choices exceed the KV memory "
                f"of {largest} tokens or the largest batch"
            )
        return None

    def _takers(self, request: Request) -> list[InstanceView]:
        """Instances that can compute the prompt; mixed ones decode as well what they computed."""
        num_tokens = request.num_prefill_tokens
        return [
            view
            for view in self._pool(Role.PREFILL, Role.MIXED)
            if num_tokens <= view.max_kv_tokens
            and (view.spec.role is Role.PREFILL or self._can_ever_decode(view, request))
        ]

    @staticmethod
    def _can_ever_decode(view: InstanceView, request: Request) -> bool:
        num_choices = len(request.choices)
        is_held = view.spec.kv.can_ever_hold(request.num_prefill_tokens, request.max_total_tokens, num_choices)
        return is_held and num_choices <= view.spec.scheduler.max_batch_size

    def _pool(self, *roles: Role) -> list[InstanceView]:
        pool = self._pools.get(roles)
        if pool is None:
            pool = [view for view in self._instances.values() if view.spec.role in roles and not view.is_draining]
            self._pools[roles] = pool
        return pool

    # -- decode instances -------------------------------------------------------------------------------------------

    def _assign_pending(self) -> None:
        """Answer waiting questions in order; the first that finds no room keeps those behind it waiting too.

        Unless it would wait for an instance that is not there.
        """
        num_unplaceable = 0
        while len(self._pending) > num_unplaceable and self._pool(Role.DECODE, Role.MIXED):
            key, (sender, wanted, refused_by) = next(islice(self._pending.items(), num_unplaceable, None))
            view = self._choose_decode(sender, wanted, refused_by)
            if view is None:
                if self._is_placeable(wanted):
                    return
                num_unplaceable += 1
                continue
            del self._pending[key]
            blocks = view.spec.kv.blocks_to_admit(wanted.num_tokens, wanted.num_choices)
            view.assigned[key] = Work(sender, blocks=blocks)
            if view.prefixes is not None:
                view.prefixes.note(self._keys.find(key, view.spec.kv.block_size))
            self._send(sender, DecodeAssigned(key, view.spec.instance_id))

    def _end_pending(self) -> None:
        """Questions wait for a decode instance to come up no longer than requests wait for a pool."""
        waiting = [key for key, (_, wanted, _) in self._pending.items() if not self._is_placeable(wanted)]
        self._unplaceable = {key: self._unplaceable.get(key, self._now) for key in waiting}
        for key, since in self._unplaceable.items():
            if self._now >= since + self._config.patience:
                sender, wanted, _ = self._pending.pop(key)
                is_any = bool(self._pool(Role.DECODE, Role.MIXED))
                which = f"that can hold {wanted.max_total_tokens} tokens " if is_any else ""
                self._send(wanted.owner_id, Failed(key, f"no decode instance {which}is up", 503))
                self._send(sender, Abort(key))

    def _is_placeable(self, wanted: DecodeWanted) -> bool:
        """Whether an instance that is up could hold it, now or later."""
        return any(self._could_hold(view, wanted) for view in self._pool(Role.DECODE, Role.MIXED))

    @staticmethod
    def _could_hold(view: InstanceView, wanted: DecodeWanted) -> bool:
        return view.spec.kv.can_ever_hold(wanted.num_tokens, wanted.max_total_tokens, wanted.num_choices)

    def _choose_decode(self, sender: str, wanted: DecodeWanted, refused_by: set[str]) -> InstanceView | None:
        near = self._config.near.get(sender, ())
        best, best_rank = None, -1.0
        for view in self._pool(Role.DECODE, Role.MIXED):
            spec, is_idle, num_free = view.spec, view.is_idle, view.num_free_blocks
            needed = spec.kv.blocks_to_admit(wanted.num_tokens, wanted.num_choices)
            headroom = 0 if is_idle else view.headroom
            has_slot = is_idle or view.num_free_slots >= wanted.num_choices
            has_room = needed + headroom <= num_free and has_slot
            if not has_room or spec.instance_id in refused_by or not self._could_hold(view, wanted):
                continue
            rank = (num_free - needed) / view.num_blocks
            if spec.instance_id in near:
                rank += _NEAR
            if view.prefixes is not None:
                num_held = view.prefixes.num_held(self._keys.find(wanted.key, spec.kv.block_size))
                rank += _HELD * num_held / needed + num_held / view.num_blocks
            if rank > best_rank:
                best, best_rank = view, rank
        return best

    def _send(self, to: str, message: Message) -> None:
        self._commands.append(Send(to, message))
