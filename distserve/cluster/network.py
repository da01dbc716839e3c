"""Messages between processes: one receiving socket per part, one sending socket per peer it has spoken to.

ZeroMQ push/pull over TCP. A message is dropped, counted and logged rather than waited for when its receiver is unknown,
gone or too slow (the queue to each peer is bounded); the protocol is built for that. Every connection is encrypted and
authenticated by CURVE with the one key pair that a launch creates: whoever lacks the secret key can neither send nor
read. Bytes are decoded by :mod:`distserve.cluster.wire`, never unpickled.

A :class:`Mailbox` is for the processes that have threads; an asyncio owner polls its socket itself
(:meth:`Mailbox.drain`).
"""

import logging
import threading
from collections.abc import Callable, Mapping
from typing import Final

import zmq
import zmq.auth
from zmq.auth.thread import ThreadAuthenticator

from distserve.cluster.parts import ClusterKey
from distserve.cluster.wire import EVENTS, WireError
from distserve.core.errors import ConfigError
from distserve.core.events import Received
from distserve.core.messages import Message

logger = logging.getLogger(__name__)

HIGH_WATER_MARK: Final = 50_000
"""Messages queued for one peer before further ones are dropped."""

MAX_MESSAGE_BYTES: Final = 256 * 2**20
"""A longer message closes its connection."""


def create_key() -> ClusterKey:
    """A new random key pair for one launch."""
    public, secret = zmq.curve_keypair()
    return ClusterKey(public.decode(), secret.decode())


class _OnlyTheCluster:
    """Credentials callback: accept the cluster's own key (Z85) and no other."""

    def __init__(self, key: ClusterKey) -> None:
        self._public = key.public.encode()

    def callback(self, domain: str, key: bytes) -> bool:  # noqa: ARG002 - the signature is zmq's
        return key == self._public


class Mailbox:
    """Sends and receives messages in the name of one part.

    ``send``, ``meet`` and ``forget`` may be called from any thread; ``drain`` and ``wait`` from the receiving one.

    Args:
        name: This part's name, which receivers see as the sender.
        key: The cluster's key pair.
        host: Address to bind: loopback, or the node's own address in a cluster of several nodes.

    Attributes:
        endpoint: Where peers reach this mailbox (``tcp://host:port``).
        num_dropped: Messages dropped so far.
    """

    def __init__(self, name: str, key: ClusterKey, host: str = "127.0.0.1") -> None:
        self.name = name
        self.num_dropped = 0
        self._key = key
        self._lock = threading.Lock()
        self._book: dict[str, str] = {}
        self._outboxes: dict[str, zmq.Socket[bytes]] = {}
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._authenticator = ThreadAuthenticator(self._context)
        self._authenticator.start()
        self._authenticator.configure_curve_callback(credentials_provider=_OnlyTheCluster(key))
        self._inbox = self._context.socket(zmq.PULL)
        self._inbox.linger = 0
        self._inbox.rcvhwm = HIGH_WATER_MARK
        self._inbox.maxmsgsize = MAX_MESSAGE_BYTES
        self._inbox.curve_secretkey = key.secret.encode()
        self._inbox.curve_publickey = key.public.encode()
        self._inbox.curve_server = True
        try:
            port = self._inbox.bind_to_random_port(f"tcp://{host}")
        except zmq.ZMQError as error:
            self.close()
            raise ConfigError(f"cannot listen on {host}: {error}") from error
        self.endpoint = f"tcp://{host}:{port}"

    @property
    def fileno(self) -> int:
        """Edge-triggered descriptor for an event loop: readable after something arrived; then ``drain`` until empty."""
        return int(self._inbox.getsockopt(zmq.FD))

    def meet(self, book: Mapping[str, str]) -> None:
        """Learn the endpoints of ``book`` (name to endpoint); connections are made when first needed.

        What was queued for a part that has moved is dropped.
        """
        for name, endpoint in book.items():
            if self._book.get(name) not in {None, endpoint}:
                self.forget(name)
        with self._lock:
            self._book.update(book)

    def forget(self, name: str) -> None:
        """Drop whatever is queued for ``name`` and send it nothing more."""
        with self._lock:
            self._book.pop(name, None)
            outbox = self._outboxes.pop(name, None)
            if outbox is not None:
                outbox.close(linger=0)

    def send(self, to: str, message: Message) -> None:
        """Queue ``message`` for ``to`` without blocking, or drop it."""
        data = EVENTS.encode(Received(self.name, message))
        with self._lock:
            outbox = self._outboxes.get(to) or self._connect(to)
            if outbox is None:
                self._drop(to, message, "unknown or gone", logging.INFO)
                return
            try:
                outbox.send(data, zmq.DONTWAIT)
            except zmq.Again:
                self._drop(to, message, "not keeping up", logging.WARNING)

    def drain(self, limit: int) -> list[Received]:
        """Messages that have arrived, at most ``limit``; fewer than ``limit`` means that none is left."""
        received: list[Received] = []
        while len(received) < limit:
            try:
                data = self._inbox.recv(zmq.DONTWAIT)
            except zmq.Again:
                break
            self._decode(data, received)
        return received

    def wait(self, timeout: float) -> bool:
        """Block until something has arrived or ``timeout`` seconds have passed; whether something has."""
        return bool(self._inbox.poll(int(timeout * 1000)))

    def close(self) -> None:
        """Close all sockets; messages still queued get half a second to leave."""
        for outbox in self._outboxes.values():
            outbox.close(linger=500)
        self._inbox.close()
        self._authenticator.stop()
        self._context.term()

    def _connect(self, to: str) -> "zmq.Socket[bytes] | None":
        endpoint = self._book.get(to)
        if endpoint is None:
            return None
        outbox = self._context.socket(zmq.PUSH)
        outbox.sndhwm = HIGH_WATER_MARK
        outbox.curve_secretkey = self._key.secret.encode()
        outbox.curve_publickey = self._key.public.encode()
        outbox.curve_serverkey = self._key.public.encode()
        outbox.connect(endpoint)
        self._outboxes[to] = outbox
        return outbox

    def _drop(self, to: str, message: Message, why: str, level: int) -> None:
        self.num_dropped += 1
        # Powers of two: a peer that is gone must not fill the log.
        if self.num_dropped & (self.num_dropped - 1) == 0:
            kind = type(message).__name__
            text = "%s: dropped %s for %s (%s); %d dropped so far"
            logger.log(level, text, self.name, kind, to, why, self.num_dropped)

    def _decode(self, data: bytes, received: list[Received]) -> None:
        try:
            event = EVENTS.decode(data)
        except WireError as error:
            logger.warning("%s: ignored a malformed message: %s", self.name, error)
            return
        if isinstance(event, Received):
            received.append(event)
        else:
            logger.warning("%s: ignored %s, which is no message", self.name, type(event).__name__)


class ReceiverThread:
    """Feeds whatever arrives in a mailbox to ``feed``, on a thread of its own, until closed."""

    def __init__(self, mailbox: Mailbox, feed: Callable[[Received], None]) -> None:
        self._mailbox = mailbox
        self._feed = feed
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="receiver", daemon=True)

    def start(self) -> None:
        """Begin receiving."""
        self._thread.start()

    def close(self) -> None:
        """Stop receiving; returns once the thread has ended."""
        self._stopped.set()
        if self._thread.is_alive():
            self._thread.join()

    def _run(self) -> None:
        while not self._stopped.is_set():
            if self._mailbox.wait(timeout=0.1):
                for received in self._mailbox.drain(limit=256):
                    self._feed(received)
