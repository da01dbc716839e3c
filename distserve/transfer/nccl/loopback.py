"""Pairs whose two ranks are in one process, on one card: a communicator of one rank that sends to itself.

NCCL refuses two ranks of a communicator on one card, unless it is new and told not to. What it allows is one rank that
sends and receives in one group: so each half of an operation waits here for the other, and both are launched as one.
For tests and measurements on a machine with a single card; and for a CPU, where an exchange is a copy.
"""

import itertools
import queue
import threading
from collections.abc import Callable
from typing import Protocol, TypeVar

from torch import Tensor

from distserve.transfer.nccl.device import Completion, Passed

_T = TypeVar("_T")

_LOOK = 0.01
"""Seconds between two looks whether the communicator was aborted."""


class Exchanger(Protocol):
    """A communicator of one rank."""

    def exchange(self, outgoing: Tensor, incoming: Tensor) -> Completion:
        """Launch a send of the one and a receive into the other, of as many bytes."""
        ...

    def check(self) -> None:
        """See :class:`~distserve.transfer.nccl.collectives.Communicator`, here and below."""
        ...

    def abort(self) -> None:
        """End it."""
        ...

    def destroy(self) -> None:
        """End it, which is idle."""
        ...


class CopyExchanger:
    """An exchange on a CPU."""

    def exchange(self, outgoing: Tensor, incoming: Tensor) -> Completion:
        """Copy."""
        incoming.copy_(outgoing)
        return Passed()

    def check(self) -> None:
        """Nothing fails later."""

    def abort(self) -> None:
        """Nothing is under way."""

    def destroy(self) -> None:
        """Nothing is held."""


class LoopbackCollectives:
    """Implements :class:`~distserve.transfer.nccl.collectives.Collectives` for two transports that share this object.

    ``make`` makes a communicator of one rank, on the thread that calls it.
    """

    def __init__(self, make: Callable[[], Exchanger], version: str = "loopback") -> None:
        self.version = version
        self._make = make
        self._numbers = itertools.count(1)
        self._lock = threading.Lock()
        self._waiting: dict[bytes, _Pair] = {}

    def unique_id(self) -> bytes:
        """A number."""
        return str(next(self._numbers)).encode()

    def communicator(self, unique_id: bytes, rank: int, num_ranks: int = 2) -> "LoopbackCommunicator":
        """One half; waits for the other."""
        assert num_ranks == 2
        with self._lock:
            is_second = unique_id in self._waiting
            pair = self._waiting.pop(unique_id) if is_second else self._waiting.setdefault(unique_id, _Pair())
        if is_second:
            try:
                pair.exchanger = self._make()
            finally:
                pair.is_complete.set()
        pair.is_complete.wait()
        if pair.exchanger is None:
            raise RuntimeError("the other half could not be made")
        return LoopbackCommunicator(pair, sends=rank == 0)


class _Pair:
    """What the two halves share."""

    def __init__(self) -> None:
        self.exchanger: Exchanger | None = None
        self.is_complete = threading.Event()
        self.is_over = threading.Event()
        self.lock = threading.Lock()
        self.sends: queue.SimpleQueue[Tensor] = queue.SimpleQueue()
        self.launched: queue.SimpleQueue[Completion] = queue.SimpleQueue()


class LoopbackCommunicator:
    """Implements :class:`~distserve.transfer.nccl.collectives.Communicator`: the half that sends, or that receives."""

    def __init__(self, pair: _Pair, *, sends: bool) -> None:
        assert pair.exchanger is not None
        self._pair = pair
        self._exchanger: Exchanger = pair.exchanger
        self._sends = sends

    def send(self, memory: Tensor) -> Completion:
        """Wait for the receive, as NCCL's host side may, and return when both are launched."""
        assert self._sends
        self._pair.sends.put(memory)
        return self._get(self._pair.launched)

    def recv(self, memory: Tensor) -> Completion:
        """Wait for the send and launch both."""
        assert not self._sends
        outgoing = self._get(self._pair.sends)
        completion = self._exchanger.exchange(outgoing, memory)
        self._pair.launched.put(completion)
        return completion

    def check(self) -> None:
        """Both halves share one error."""
        if self._pair.is_over.is_set():
            raise RuntimeError("the other half has ended it")
        self._exchanger.check()

    def abort(self) -> None:
        """End both halves, once."""
        if self._ends():
            self._exchanger.abort()

    def destroy(self) -> None:
        """End both halves, once."""
        if self._ends():
            self._exchanger.destroy()

    def _ends(self) -> bool:
        with self._pair.lock:
            is_first = not self._pair.is_over.is_set()
            self._pair.is_over.set()
        return is_first

    def _get(self, source: "queue.SimpleQueue[_T]") -> "_T":
        while not self._pair.is_over.is_set():
            try:
                return source.get(timeout=_LOOK)
            except queue.Empty:
                continue
        raise RuntimeError("aborted")
