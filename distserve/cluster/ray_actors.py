"""Ray's view of the parts: one actor per process. Ray places, starts and watches them; no request passes through here.

Importing this module must stay cheap: the router's process never needs torch, and an instance's process imports it only
once its thread counts are set.
"""

import os
import subprocess
import threading
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from pkgutil import resolve_name
from typing import TYPE_CHECKING, Any

import ray

from distserve.cluster.clock import TimerThread, cluster_time
from distserve.cluster.driver import Driver
from distserve.cluster.network import Mailbox, ReceiverThread
from distserve.cluster.parts import Card, ClusterKey, InstanceConfig
from distserve.cluster.process import die_of_uncaught_errors, die_with_parent
from distserve.cluster.replay import EventLog
from distserve.core.config import InstanceSpec, Role
from distserve.core.events import InstanceLost, InstanceUp, Timer
from distserve.core.messages import InstanceGone
from distserve.core.router import Router, RouterConfig
from distserve.core.scheduler import ROUTER

if TYPE_CHECKING:
    from distserve.cluster.instance import Instance
    from distserve.engine.group.away import Muster

CONCURRENCY = 4
"""Calls an actor serves at once: one watches for its death, the others come from the launcher and its supervisor."""


def node_address() -> str:
    """The address at which the other nodes of the Ray cluster reach this one."""
    return str(ray.util.get_node_ip_address())  # type: ignore[no-untyped-call]


class RouterProcess:
    """The router's process."""

    def __init__(
        self, key: ClusterKey, host: str | None, log_dir: Path | None, config: RouterConfig | None = None
    ) -> None:
        die_with_parent()
        die_of_uncaught_errors()
        self._stopped = threading.Event()
        self._mailbox = Mailbox(ROUTER, key, host or node_address())
        self._timers = TimerThread(lambda: self._driver.feed(Timer()))
        self._log = EventLog.of(ROUTER, log_dir) if log_dir else None
        self._driver = Driver(Router(config), cluster_time, self._mailbox, self._timers, log=self._log)
        self._receiver = ReceiverThread(self._mailbox, self._driver.feed)
        self._timers.start()
        self._driver.start()
        self._receiver.start()

    def card(self) -> Card:
        """Where it is reached."""
        return Card(ROUTER, self._mailbox.endpoint)

    def meet(self, cards: Iterable[Card]) -> None:
        """Learn of other parts."""
        self._mailbox.meet({card.name: card.endpoint for card in cards})

    def up(self, spec: InstanceSpec) -> None:
        """An instance is ready to serve."""
        self._driver.feed(InstanceUp(spec))

    def succeed(self, names: Iterable[str]) -> None:
        """Tell ``names`` that the router before this one took what they had asked it to its grave."""
        for name in names:
            self._mailbox.send(name, InstanceGone(ROUTER))

    def lost(self, instance_id: str) -> None:
        """An instance has died: everyone is told, then it is forgotten."""
        self._driver.feed(InstanceLost(instance_id))
        self._mailbox.forget(instance_id)

    def watch(self) -> None:
        """Return when closed; fails when the process dies."""
        self._stopped.wait()

    def close(self) -> None:
        """Stop."""
        self._receiver.close()
        self._driver.stop()
        self._timers.close()
        self._mailbox.close()
        if self._log is not None:
            self._log.close()
        self._stopped.set()


class InstanceProcess:
    """An instance's process."""

    def __init__(self, config: InstanceConfig) -> None:
        self._config = _settle(config)
        self._stopped = threading.Event()
        self._instance: Instance | None = None
        self._muster: Muster | None = None

    def muster(self) -> str:
        """Where the instance's ranks on other nodes are to come to."""
        from distserve.cluster.node_ranks import open_muster

        self._muster = open_muster(self._config)
        return self._muster.address

    def load(self, *_joined: None) -> Card:
        """Load the model, once the ranks of other nodes have joined; raises ConfigError and its kin."""
        from distserve.cluster.instance import Instance

        instance = Instance(self._config, resolve_name(self._config.plan.hardware), self._muster)
        instance.load()
        self._instance = instance
        return instance.card

    def prepare(self, role: Role) -> Card:
        """Be open for what ``role`` wants; the card that says so."""
        self._loaded.prepare(role)
        return self._loaded.card

    def meet(self, cards: Iterable[Card]) -> tuple[str, ...]:
        """Learn of other parts; why KV cannot be pulled from some of them."""
        return self._loaded.meet(cards)

    def start(self) -> None:
        """Begin to serve."""
        self._loaded.start()

    def watch(self) -> None:
        """Return when closed; fails when the process dies."""
        self._stopped.wait()

    def close(self) -> None:
        """Stop serving and free everything."""
        self._loaded.close()
        self._stopped.set()

    @property
    def _loaded(self) -> "Instance":
        assert self._instance is not None, "load comes first"
        return self._instance


class RankHostProcess:
    """A process beside those of an instance's ranks on another node than rank 0's, which end with it."""

    def __init__(self, config: InstanceConfig) -> None:
        self._config = _settle(config)
        self._nursery: subprocess.Popen[bytes] | None = None

    def join(self, address: str) -> None:
        """Start them and have them report to rank 0; raises ConfigError and InstanceError."""
        from distserve.cluster.node_ranks import host_ranks

        self._nursery = host_ranks(self._config, address)


def _settle(config: InstanceConfig) -> InstanceConfig:
    """Prepare this process, and those it starts, for ranks of an instance; ``config`` with the node's own address."""
    die_with_parent()
    die_of_uncaught_errors()
    # Read by the thread pools of OpenMP, BLAS and numba when they are first imported; Ray has set some itself.
    for variable in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMBA_NUM_THREADS"):
        os.environ[variable] = str(config.plan.num_threads)
    return replace(config, host=config.host or node_address())


RouterActor: Any = ray.remote(RouterProcess)
InstanceActor: Any = ray.remote(InstanceProcess)
RankHostActor: Any = ray.remote(RankHostProcess)
