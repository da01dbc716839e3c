"""One instance within a process: scheduler, driver, engine thread and transport, wired together.

Knows neither how messages travel nor whose process it is: :mod:`distserve.cluster.instance` gives it sockets and a
process, :mod:`distserve.cluster.local` a queue and a thread.
"""

import logging
import time
from collections.abc import Callable, Iterable
from functools import partial

import torch

from distserve.cluster.clock import TimerThread, cluster_time
from distserve.cluster.driver import Driver, Log, Network
from distserve.cluster.engine_thread import EngineThread
from distserve.cluster.parts import EnginePlan
from distserve.cluster.rank_memory import MEMORY, InstanceTransport
from distserve.core.commands import CancelMigrate, Migrate
from distserve.core.config import InstanceSpec, Role
from distserve.core.events import Event, Migrated, Received, Timer
from distserve.core.instance_machine import InstanceMachine
from distserve.core.messages import InstanceGone
from distserve.engine.device.backend import Backend
from distserve.engine.group.away import Muster
from distserve.engine.group.driver import RankGroup
from distserve.engine.sharding.meeting import LOOPBACK
from distserve.engine.worker import Worker
from distserve.transfer.transport import Transport

logger = logging.getLogger(__name__)

_MUSTER_PATIENCE = 60.0
"""Seconds for the ranks of other nodes to come, which have been started."""


class Rank:
    """Rank 0 of an instance, which speaks for it; the other ranks, if any, are processes that end with it.

    Args:
        spec: The instance, in the role it starts with.
        plan: What its engine is made of.
        transport: Its KV memory; closed with the rank.
        network: Carries its messages away. What arrives is handed to :meth:`receive`.
        log: Records the scheduler's events and commands, if wanted.
        on_broken: Told of the peer, and when the pull began (``time.monotonic``), if one has failed neither for its
            deadline nor because it was given up.
        backend: What the engine computes on, in place of the plan's device.
        muster: Where the ranks of other nodes come to, if there are any.
    """

    def __init__(
        self,
        spec: InstanceSpec,
        plan: EnginePlan,
        transport: Transport,
        network: Network,
        log: Log | None = None,
        on_broken: Callable[[str, float], None] | None = None,
        backend: Backend | None = None,
        muster: Muster | None = None,
    ) -> None:
        self.spec = spec
        self._plan = plan
        self._backend = backend
        self._muster = muster
        self._transport = transport
        self._engine = EngineThread(self._load, transport, self._feed, plan.cores[: plan.num_threads])
        self._timers = TimerThread(lambda: self._feed(Timer()))
        self._driver = Driver(
            InstanceMachine(spec),
            cluster_time,
            network,
            self._timers,
            engine=self._engine,
            migrator=_Migrator(spec.instance_id, transport, self._feed, on_broken),
            log=log,
        )

    def load(self) -> None:
        """Load the model; raises ConfigError and its kin."""
        self._engine.start()

    def start(self) -> None:
        """Begin to schedule: the first report leaves."""
        self._timers.start()
        self._driver.start()

    def connect(self, peers: Iterable[tuple[str, str]]) -> None:
        """Make the KV memory of ``peers`` (instance id, transport address) readable.

        Raises:
            TransferError: a peer cannot be reached or lays its memory out differently.
        """
        for instance_id, address in peers:
            self._transport.connect(instance_id, address)

    def receive(self, received: Received) -> None:
        """Feed a message; a lost instance's memory is let go of first, so that nothing can read it afterwards."""
        if isinstance(received.message, InstanceGone):
            self._transport.forget(received.message.instance_id)
        self._feed(received)

    def close(self) -> None:
        """Stop: whatever is in flight is given up."""
        self._driver.stop()
        self._timers.close()
        self._engine.close()
        self._transport.close()

    def _load(self) -> Worker | RankGroup:
        transport = self._transport
        pool = transport.pool if isinstance(transport, InstanceTransport) else None
        buffer = torch.frombuffer(transport.buffer, dtype=torch.uint8) if pool is None else pool
        # Prefill has no decode steps to capture.
        captures = self.spec.role is not Role.PREFILL
        if isinstance(transport, InstanceTransport) and self.spec.parallel.num_ranks > 1:
            is_rehearsed, muster = self._backend is not None, self._muster
            group = RankGroup(
                self._plan.model_dir,
                parallel=self.spec.parallel,
                dtype=self._plan.dtype,
                kv=self.spec.kv,
                num_threads=self._plan.num_threads,
                cores=self._plan.cores,
                kv_buffer=buffer,
                memory=MEMORY,
                memory_options=transport.options.encode(),
                on_told=transport.told,
                on_lost=_end,
                away=muster.crews(_MUSTER_PATIENCE) if muster is not None else (),
                host=muster.host if muster is not None else LOOPBACK,
                device="cuda" if self._plan.device != "cpu" and not is_rehearsed else "cpu",
                max_batch_size=self.spec.scheduler.max_batch_size if captures else 0,
                backend="distserve.cluster.gpu:rank_backend" if is_rehearsed else "",
                backend_options=self._plan.hardware,
            )
            transport.attach(group)
            return group
        return Worker(
            self._plan.model_dir,
            dtype=self._plan.dtype,
            kv=self.spec.kv,
            kv_buffer=buffer,
            num_threads=self._plan.num_threads,
            device=self._plan.device,
            max_batch_size=self.spec.scheduler.max_batch_size,
            graphs=captures,
            backend=self._backend,
        )

    def _feed(self, event: Event) -> None:
        self._driver.feed(event)


def _end(error: Exception) -> None:
    """A rank is lost, and with it the instance: uncaught on purpose, the process ends and supervision replaces it."""
    raise error


class _Migrator:
    """Implements :class:`distserve.cluster.driver.Migrator` with a transport, whose threads feed the outcomes."""

    def __init__(
        self,
        name: str,
        transport: Transport,
        feed: Callable[[Event], None],
        on_broken: Callable[[str, float], None] | None,
    ) -> None:
        self._name = name
        self._transport = transport
        self._feed = feed
        self._on_broken = on_broken
        self._num_failed = 0
        self._given_up: set[int] = set()

    def migrate(self, command: Migrate) -> None:
        self._transport.pull(command, partial(self._ended, command, time.monotonic()))

    def cancel(self, command: CancelMigrate) -> None:
        self._given_up.add(command.pull_id)
        self._transport.cancel(command.pull_id)

    def _ended(self, command: Migrate, began: float, event: Migrated) -> None:
        # Fed first: an end that crosses with a cancel is the scheduler's business, which expects one Migrated.
        self._feed(event)
        was_given_up = command.pull_id in self._given_up
        self._given_up.discard(command.pull_id)
        if event.ok or was_given_up:
            return
        self._num_failed += 1
        # Powers of two: a peer that is gone must not fill the log.
        if self._num_failed & (self._num_failed - 1) == 0:
            text = "%s could not pull KV from %s: %s; %d pulls failed so far"
            logger.warning(text, self._name, command.source_id, event.reason, self._num_failed)
        if self._on_broken is not None and cluster_time() < command.deadline:
            self._on_broken(command.source_id, began)
