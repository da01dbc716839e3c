"""The instances that an instance pulls KV from: connected when they are met, and again when a connection is lost.

A peer that is alive but cannot be reached costs the requests that need it, not the instance: their pulls fail and say
why, and the connection is tried again until it stands or the peer is gone. Knows nothing of how peers are reached.
"""

import heapq
import logging
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Mapping

from distserve.core.errors import TransferError

logger = logging.getLogger(__name__)

_FIRST_PAUSE, _LONGEST_PAUSE = 1.0, 30.0
"""Seconds before the first new attempt (by then supervision has mostly said if a peer died) and between later ones."""


class KvPeers:
    """Keeps peers connected until closed. Methods may be called from any thread.

    Args:
        name: The instance's own name, for messages.
        connect: Makes a peer (instance id, address) readable; raises TransferError if it cannot be. One call at a time
            for each peer.
        forget: Lets go of a peer.
    """

    def __init__(self, name: str, connect: Callable[[str, str], None], forget: Callable[[str], None]) -> None:
        self._name = name
        self._connect = connect
        self._forget = forget
        self._changed = threading.Condition()
        self._addresses: dict[str, str] = {}
        self._connected_at: dict[str, float] = {}
        # Held during an attempt, of which several may be wanted at once.
        self._attempting: defaultdict[str, threading.Lock] = defaultdict(threading.Lock)
        # Peers to be tried again: (when, instance id, the pause until then).
        self._due: list[tuple[float, str, float]] = []
        self._is_closed = False
        self._thread = threading.Thread(target=self._run, name="kv-peers", daemon=True)
        self._thread.start()

    def meet(self, peers: Mapping[str, str]) -> tuple[str, ...]:
        """Connect to ``peers`` (instance id to address); says which could not be reached, and why.

        Those are tried again until they can be, or are forgotten. One that is connected stays so.
        """
        with self._changed:
            new = {
                peer: address
                for peer, address in peers.items()
                if peer not in self._connected_at or self._addresses[peer] != address
            }
            self._addresses.update(new)
        problems = {peer: self._attempt(peer, address) for peer, address in new.items()}
        for peer, problem in problems.items():
            if problem:
                self._again(peer, _FIRST_PAUSE)
        return tuple(problem for problem in problems.values() if problem)

    def lost(self, instance_id: str, began: float) -> None:
        """A pull that began at ``began`` (``time.monotonic``) failed as if there were no connection: make a new one.

        Unless there is one by now: a new connection ends the pulls over the former one.
        """
        with self._changed:
            is_newer = began < self._connected_at.get(instance_id, float("-inf"))
        if not is_newer:
            self._again(instance_id, _FIRST_PAUSE)

    def forget(self, instance_id: str) -> None:
        """The peer is gone for good."""
        with self._changed:
            self._addresses.pop(instance_id, None)
            self._connected_at.pop(instance_id, None)
        self._forget(instance_id)

    def close(self) -> None:
        """Try no more; returns when an attempt under way has ended."""
        with self._changed:
            self._is_closed = True
            self._changed.notify()
        self._thread.join()

    def _again(self, peer: str, pause: float) -> None:
        with self._changed:
            if all(peer != other for _, other, _ in self._due):
                heapq.heappush(self._due, (time.monotonic() + pause, peer, pause))
                self._changed.notify()

    def _attempt(self, peer: str, address: str) -> str:
        """Try to connect, unless somebody else has meanwhile; returns why it failed."""
        wanted = time.monotonic()
        with self._changed:
            attempting = self._attempting[peer]
        with attempting:
            with self._changed:
                if self._addresses.get(peer) == address and self._connected_at.get(peer, wanted) > wanted:
                    return ""
            try:
                self._connect(peer, address)
            except TransferError as error:
                return f"{self._name} cannot pull KV from {peer}: {error}{_advice(error)}"
            with self._changed:
                is_known = peer in self._addresses
                if is_known:
                    self._connected_at[peer] = time.monotonic()
            if not is_known:  # it was forgotten meanwhile
                self._forget(peer)
        return ""

    def _run(self) -> None:
        while True:
            with self._changed:
                while not self._is_closed and (not self._due or self._due[0][0] > time.monotonic()):
                    self._changed.wait(self._due[0][0] - time.monotonic() if self._due else None)
                if self._is_closed:
                    return
                _, peer, pause = heapq.heappop(self._due)
                address = self._addresses.get(peer)
            if address is None:
                continue
            problem = self._attempt(peer, address)
            if problem:
                logger.warning("%s; trying again", problem)
                self._again(peer, min(2 * pause, _LONGEST_PAUSE))
            else:
                logger.warning("%s is connected to the KV memory of %s", self._name, peer)


def _advice(error: BaseException) -> str:
    """What to do if the network is at fault, which an OSError among the causes shows."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError):
            return (
                ". Ranks listen on ports of the system's choice: let nodes reach each other's, or name a network that "
                "they share with --kv-interface"
            )
        cause = cause.__cause__
    return ""
