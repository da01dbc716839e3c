"""One instance as a process: memory that peers can map, a socket, and the rank between them.

Knows nothing of Ray. Whoever starts the process (a Ray actor, a test, a shell) calls :meth:`Instance.load`, exchanges
the cards, and calls :meth:`Instance.start`.
"""

import hashlib
import logging
from collections.abc import Iterable
from dataclasses import replace

from distserve.cluster.network import Mailbox, ReceiverThread
from distserve.cluster.parts import Card, InstanceConfig
from distserve.cluster.process import own_cores, pin_process, return_freed_memory
from distserve.cluster.rank import Rank
from distserve.cluster.rank_memory import InstanceTransport, rank_transport
from distserve.cluster.replay import EventLog
from distserve.core.config import Role
from distserve.core.errors import InstanceError, TransferError
from distserve.core.events import Received
from distserve.core.messages import InstanceGone
from distserve.core.scheduler import ROUTER
from distserve.engine.sharding.shard import shard_of_model

logger = logging.getLogger(__name__)


def _transport_for(config: InstanceConfig, secret: bytes) -> InstanceTransport:
    spec, plan = config.spec, config.plan
    shard = shard_of_model(plan.model_dir, spec.parallel, 0)
    own = rank_transport(shard.layout(spec.kv, plan.dtype), shard, secret)
    return InstanceTransport(own, spec.parallel, secret)


class Instance:
    """The process's one instance."""

    def __init__(self, config: InstanceConfig) -> None:
        spec, plan = config.spec, config.plan
        cores = own_cores(config.first_core, plan.num_threads, config.num_cores)
        pin_process(cores)
        secret = hashlib.sha256(config.key.secret.encode()).digest()
        self._log = EventLog.of(spec.instance_id, config.log_dir) if config.log_dir else None
        self._transport = _transport_for(config, secret)
        self._mailbox = Mailbox(spec.instance_id, config.key, config.host or "127.0.0.1")
        self._rank = Rank(spec, replace(plan, cores=cores), self._transport, self._mailbox, self._log)
        self._receiver = ReceiverThread(self._mailbox, self._receive)
        self._endpoint = self._mailbox.endpoint
        # Only prefill instances are pulled from, and only decode instances pull.
        self._pulls = spec.role is Role.DECODE
        self._is_pulled_from = spec.role is Role.PREFILL
        self._name = spec.instance_id

    @property
    def card(self) -> Card:
        """Where it is reached; complete once it is loaded."""
        return Card(self._name, self._endpoint, self._transport.address if self._is_pulled_from else "")

    def load(self) -> None:
        """Load the model; raises ConfigError and its kin."""
        self._rank.load()
        return_freed_memory()

    def meet(self, cards: Iterable[Card]) -> None:
        """Learn of other parts, new ones or ones that moved. A peer that cannot be reached is left to supervision."""
        others = [card for card in cards if card.name != self._name]
        self._mailbox.meet({card.name: card.endpoint for card in others})
        for card in others:
            if card.kv_address and self._pulls:
                try:
                    self._rank.connect([(card.name, card.kv_address)])
                except TransferError as error:
                    logger.warning("%s: %s", self._name, error)

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
        if received.message == InstanceGone(self._name):
            # Uncaught on purpose: the process ends, and supervision starts another in its place.
            raise InstanceError(f"{self._name} was given up by the router: it had been silent for too long")
        self._rank.receive(received)
        match received.message:
            case InstanceGone(name) if name != ROUTER:  # the router's name passes to its successor
                self._mailbox.forget(name)
