"""Keeps a deployment whole: notices deaths, tells the router, starts replacements.

One thread of the launcher. A replacement that fails to start is tried again after a growing pause, a bounded number of
times; the other instances go on serving meanwhile.
"""

import logging
import threading
import time
from collections.abc import Callable
from typing import Any

import ray
from ray.exceptions import RayError

from distserve.cluster.deployment import Deployment, Member, cause_of
from distserve.cluster.parts import Card
from distserve.core.scheduler import ROUTER

logger = logging.getLogger(__name__)

MAX_FAILED_STARTS = 5
_FIRST_PAUSE, _LONGEST_PAUSE = 0.2, 30.0
_PATIENCE = 10.0
"""Seconds for what is under way when the watch ends."""
_POLL = 0.25
"""Seconds between looks at what is due; a death itself is noticed at once."""


class Supervisor:
    """Watches all actors of ``deployment`` until closed."""

    def __init__(self, deployment: Deployment) -> None:
        self._deployment = deployment
        self._pending: dict[Any, Callable[[Any], None]] = {}
        self._loading: dict[Any, Member] = {}
        self._due: list[tuple[float, Callable[[], None]]] = []
        self._failed_starts: dict[int, int] = {}
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="supervisor", daemon=True)

    def start(self) -> None:
        """Begin to watch."""
        self._watch_router()
        for member in self._deployment.members.values():
            self._watch_instance(member)
        self._thread.start()

    def close(self) -> None:
        """Watch no longer: what dies from now on dies on purpose."""
        self._stopped.set()
        # It may be waiting for a part that does not answer, whose end ends that.
        self._thread.join(_PATIENCE)

    def _run(self) -> None:
        while not self._stopped.is_set():
            done, _ = ray.wait(list(self._pending), timeout=_POLL)
            if self._stopped.is_set():
                return
            for call in done:
                self._pending.pop(call)(call)
            self._stop_waiting_for_lost_nodes()
            now = time.monotonic()
            due = [action for at, action in self._due if at <= now]
            self._due = [(at, action) for at, action in self._due if at > now]
            for action in due:
                action()

    # -- instances ------------------------------------------------------------------------------------------------

    def _watch_instance(self, member: Member) -> None:
        self._pending[member.actor.watch.remote()] = lambda _: self._on_instance_death(member)

    def _on_instance_death(self, member: Member) -> None:
        logger.warning("%s died; starting a replacement", member.spec.instance_id)
        self._deployment.discard(member.spec.instance_id)
        self._restart(member.slot)

    def _restart(self, slot: int) -> None:
        failed = self._failed_starts.get(slot, 0)
        if failed >= MAX_FAILED_STARTS:
            name = self._deployment.blueprint.specs[slot].instance_id
            logger.error("gave up on %s after %d failed starts", name, failed)
            return
        pause = min(_FIRST_PAUSE * 2**failed, _LONGEST_PAUSE)
        self._due.append((time.monotonic() + pause, lambda: self._start_instance(slot)))

    def _start_instance(self, slot: int) -> None:
        if not self._deployment.has_nodes_for(slot):
            name = self._deployment.blueprint.specs[slot].instance_id
            logger.error(
                "%s is not replaced: a node of it has left the Ray cluster. What is left goes on serving; start "
                "distserve again to place all instances anew",
                name,
            )
            return
        member, loading = self._deployment.start_instance(slot)
        self._loading[loading] = member
        self._pending[loading] = lambda call: self._on_instance_loaded(member, call)

    def _stop_waiting_for_lost_nodes(self) -> None:
        """A rank's death may be known before its node's is to Ray, which then cannot start what was to replace it."""
        for member in self._loading.values():
            if not self._deployment.has_nodes_for(member.slot):
                member.kill()

    def _on_instance_loaded(self, member: Member, call: Any) -> None:
        del self._loading[call]
        try:
            member.card = ray.get(call)
            self._deployment.adopt_instances([member])
        except RayError as error:
            name = member.spec.instance_id
            logger.warning("%s did not start: %s", name, cause_of(error, name))
            self._failed_starts[member.slot] = self._failed_starts.get(member.slot, 0) + 1
            if name in self._deployment.members:
                self._deployment.discard(name)
            else:
                member.kill()
            self._restart(member.slot)
            return
        self._failed_starts.pop(member.slot, None)
        self._watch_instance(member)
        logger.warning("%s is serving", member.spec.instance_id)

    # -- the router -----------------------------------------------------------------------------------------------

    def _watch_router(self) -> None:
        self._pending[self._deployment.router.watch.remote()] = lambda _: self._on_router_death()

    def _on_router_death(self) -> None:
        logger.warning("the router died; starting another")
        self._pending[self._deployment.start_router()] = self._on_router_ready

    def _on_router_ready(self, call: Any) -> None:
        try:
            card: Card = ray.get(call)
            self._deployment.adopt_router(card)
        except RayError as error:
            logger.warning("%s did not start: %s", ROUTER, error)
            self._due.append((time.monotonic() + _LONGEST_PAUSE / 10, self._on_router_death))
            return
        self._watch_router()
