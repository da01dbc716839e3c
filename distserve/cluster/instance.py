"""One instance as a process: memory that peers can map, a socket, and the rank between them.

Knows nothing of Ray. Whoever starts the process (a Ray actor, a test, a shell) calls :meth:`Instance.load`, exchanges
the cards, and calls :meth:`Instance.start`.
"""

import hashlib
import logging
from collections.abc import Iterable
from dataclasses import replace

from distserve.cluster.clock import cluster_time
from distserve.cluster.network import Mailbox, ReceiverThread
from distserve.cluster.parts import Card, InstanceConfig
from distserve.cluster.process import own_cores, pin_process, return_freed_memory
from distserve.cluster.rank import Rank
from distserve.cluster.replay import EventLog
from distserve.core.config import Role
from distserve.core.errors import InstanceError, TransferError
from distserve.core.events import Received
from distserve.core.messages import InstanceGone
from distserve.core.scheduler import ROUTER
from distserve.engine.description import describe
from distserve.transfer.shm import ShmTransport

logger = logging.getLogger(__name__)


class Instance:
    """The process's one instance."""

    def __init__(self, config: InstanceConfig) -> None:
        spec, plan = config.spec, config.plan
        cores = own_cores(config.first_core, plan.num_threads, config.num_cores)
        pin_process(cores)
        secret = hashlib.sha256(config.key.secret.encode()).digest()
        layout = describe(plan.model_dir).layout(spec.kv, plan.dtype)
        self._log = EventLog.of(spec.instance_id, config.log_dir) if config.log_dir else None
        self._transport = ShmTransport(layout, secret=secret, clock=cluster_time)
        self._mailbox = Mailbox(spec.instance_id, config.key, config.host or "127.0.0.1")
        self._rank = Rank(spec, replace(plan, cores=cores), self._transport, self._mailbox, self._log)
        self._receiver = ReceiverThread(self._mailbox, self._receive)
        # Only prefill instances are pulled from, and only decode instances pull.
        self._pulls = spec.role is Role.DECODE
        kv_address = self._transport.address if spec.role is Role.PREFILL else ""
        self.card = Card(spec.instance_id, self._mailbox.endpoint, kv_address)

    def load(self) -> None:
        """Load the model; raises ConfigError and its kin."""
        self._rank.load()
        return_freed_memory()

    def meet(self, cards: Iterable[Card]) -> None:
        """Learn of other parts, new ones or ones that moved. A peer that cannot be reached is left to supervision."""
        others = [card for card in cards if card.name != self.card.name]
        self._mailbox.meet({card.name: card.endpoint for card in others})
        for card in others:
            if card.kv_address and self._pulls:
                try:
                    self._rank.connect([(card.name, card.kv_address)])
                except TransferError as error:
                    logger.warning("%s: %s", self.card.name, error)

    def start(self) -> None:
        """Begin to serve."""
        self._receiver.start()
        self._rank.start()

    def close(self) -> None:
        """Stop serving and free everything."""
        self._receiver.close()
        self._rank.close()
        self._mailbox.close()
        if self._log is not None:
            self._log.close()

    def _receive(self, received: Received) -> None:
        if received.message == InstanceGone(self.card.name):
            # Uncaught on purpose: the process ends, and supervision starts another in its place.
            raise InstanceError(f"{self.card.name} was given up by the router: it had been silent for too long")
        self._rank.receive(received)
        match received.message:
            case InstanceGone(name) if name != ROUTER:  # the router's name passes to its successor
                self._mailbox.forget(name)
