"""One instance as a process: memory that peers can map, a socket, and the rank between them.

Knows nothing of Ray. Whoever starts the process (a Ray actor, a test, a shell) calls :meth:`Instance.load`, exchanges
the cards, and calls :meth:`Instance.start`.
"""

from collections.abc import Callable, Iterable
from dataclasses import replace

from distserve.cluster.gpu import Hardware, cuda_hardware, gpu_transport
from distserve.cluster.kv_peers import KvPeers
from distserve.cluster.network import Mailbox, ReceiverThread
from distserve.cluster.node_ranks import memory_options, share_of
from distserve.cluster.parts import Card, InstanceConfig
from distserve.cluster.process import pin_process, return_freed_memory
from distserve.cluster.rank import Rank
from distserve.cluster.rank_memory import InstanceTransport, rank_transport
from distserve.cluster.replay import EventLog
from distserve.core.config import Role
from distserve.core.errors import InstanceError
from distserve.core.events import Received
from distserve.core.messages import InstanceGone
from distserve.core.scheduler import ROUTER
from distserve.engine.group.away import Muster
from distserve.engine.sharding.meeting import LOOPBACK
from distserve.engine.sharding.shard import shard_of_model


def _transport_for(config: InstanceConfig, hardware: Hardware | None) -> InstanceTransport:
    spec, plan = config.spec, config.plan
    options = memory_options(config)
    shard = shard_of_model(plan.model_dir, spec.parallel, 0)
    layout = shard.layout(spec.kv, plan.dtype)
    if hardware is not None:
        on_card, pool = gpu_transport(layout, shard, options.secret, hardware, options.kind, options.host)
        return InstanceTransport(on_card, spec.parallel, options, pool)
    own = rank_transport(layout, shard, options)
    return InstanceTransport(own, spec.parallel, options)


class Instance:
    """The process's one instance.

    Args:
        config: What it is.
        open_hardware: Asked for what the plan's device is, unless that is the CPU.
        muster: Where its ranks of other nodes come to, if it has any.

    Raises:
        ConfigError: this node lacks the network asked for, or the device.
    """

    def __init__(
        self,
        config: InstanceConfig,
        open_hardware: Callable[[str], Hardware] = cuda_hardware,
        muster: Muster | None = None,
    ) -> None:
        spec, plan = config.spec, config.plan
        share = share_of(config)
        pin_process(share.cores[: plan.num_threads])
        host = config.host or LOOPBACK
        self._log = EventLog.of(spec.instance_id, config.log_dir) if config.log_dir else None
        hardware = open_hardware(plan.device) if plan.device != "cpu" else None
        self._transport = _transport_for(config, hardware)
        self._mailbox = Mailbox(spec.instance_id, config.key, host)
        self._peers = KvPeers(spec.instance_id, self._transport.connect, self._transport.forget)
        self._rank = Rank(
            spec,
            replace(plan, cores=share.cores),
            self._transport,
            self._mailbox,
            self._log,
            self._peers.lost,
            hardware.backend if hardware is not None else None,
            muster,
        )
        self._receiver = ReceiverThread(self._mailbox, self._receive)
        self._endpoint = self._mailbox.endpoint
        self._name = spec.instance_id
        self._pulls = self._is_pulled_from = False
        self.prepare(spec.role)

    @property
    def card(self) -> Card:
        """Where it is reached; complete once it is loaded."""
        return Card(self._name, self._endpoint, self._transport.address if self._is_pulled_from else "")

    def load(self) -> None:
        """Load the model; raises ConfigError and its kin."""
        self._rank.load()
        return_freed_memory()

    def prepare(self, role: Role) -> None:
        """Be open for what ``role`` wants of KV memory, beside that of roles before: the card says so."""
        # Only prefill instances are pulled from, and all others may pull.
        self._pulls |= role is not Role.PREFILL
        self._is_pulled_from |= role is Role.PREFILL

    def meet(self, cards: Iterable[Card]) -> tuple[str, ...]:
        """Learn of other parts, new ones or ones that moved.

        Returns why KV cannot be pulled from some of them; those are tried again in the background.
        """
        others = [card for card in cards if card.name != self._name]
        self._mailbox.meet({card.name: card.endpoint for card in others})
        if not self._pulls:
            return ()
        return self._peers.meet({card.name: card.kv_address for card in others if card.kv_address})

    def start(self) -> None:
        """Begin to serve."""
        self._receiver.start()
        self._rank.start()

    def close(self) -> None:
        """Stop serving and free everything."""
        self._receiver.close()
        self._peers.close()
        self._rank.close()
        self._mailbox.close()
        if self._log is not None:
            self._log.close()

    def _receive(self, received: Received) -> None:
        if received.message == InstanceGone(self._name):
            # Uncaught on purpose: the process ends, and supervision starts another in its place.
            raise InstanceError(f"{self._name} was given up by the router: it had been silent for too long")
        match received.message:
            case InstanceGone(name) if name != ROUTER:  # the router's name passes to its successor
                self._peers.forget(name)
                self._mailbox.forget(name)
        self._rank.receive(received)
