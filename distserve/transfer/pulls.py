"""The thread that owns a transport's pulls: begins, cancels and ends them, whatever makes their bytes arrive.

Promises that every pull ends exactly once, also when the thread dies of a bug, and that a pull's destination is not
written after its end. All state belongs to the thread; other threads hand it orders through an inbox.
"""

import queue
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Generic, TypeVar

from distserve.core.commands import Migrate
from distserve.core.errors import TransferError
from distserve.core.events import Migrated
from distserve.transfer.stream import Stream
from distserve.transfer.transport import Clock

SourceT = TypeVar("SourceT")
"""One life of a peer, as a kind of transport reaches it."""


@dataclass(slots=True, eq=False)
class Pull(Generic[SourceT]):
    """A pull under way; ``source`` is None where there was none to begin with, and once the pull has ended."""

    migrate: Migrate
    done: Callable[[Migrated], None]
    source: SourceT | None
    failure: str
    """Why it must end; empty while it may go on."""
    stream: Stream | None = None


class PullThread(ABC, Generic[SourceT]):
    """Subclasses move bytes in :meth:`_turn`. All public methods are safe from any thread."""

    def __init__(self, name: str, clock: Clock) -> None:
        self._clock = clock
        self._sources: dict[str, SourceT] = {}
        self._pulls: dict[int, Pull[SourceT]] = {}
        self._inbox: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    def attach(self, instance_id: str, source: SourceT) -> None:
        """Pulls from ``instance_id`` read ``source`` from now on; those from an earlier source fail."""
        self._order(partial(self._attach, instance_id, source))

    def detach(self, instance_id: str, reason: str, source: SourceT | None = None) -> None:
        """Fail the pulls from ``instance_id`` and let go of its memory, unless it is not ``source`` any more."""
        self._order(partial(self._detach, instance_id, reason, source))

    def pull(self, migrate: Migrate, done: Callable[[Migrated], None]) -> None:
        """Queue a pull; see :meth:`distserve.transfer.transport.Transport.pull`."""
        assert not self._stopping, "pull after close"
        self._order(partial(self._begin, migrate, done))

    def cancel(self, pull_id: int) -> None:
        """Have the pull end before its next batch of bytes."""
        self._order(partial(self._cancel, pull_id))

    def close(self) -> None:
        """Fail what is left, wait for the thread, let go of all sources."""
        self._order(self._stop)
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def _order(self, order: Callable[[], None]) -> None:
        self._inbox.put(order)
        self._wake()

    def _wake(self) -> None:
        """Called after an order was put in, by the thread that did."""

    # Everything below runs on the thread.

    @abstractmethod
    def _turn(self) -> None:
        """Take orders, move bytes, end pulls; wait if there is nothing to do, not past the next order."""

    @abstractmethod
    def _open(self, pull: Pull[SourceT], source: SourceT) -> None:
        """A pull begins; raises TransferError if it cannot."""

    @abstractmethod
    def _is_serving(self, source: SourceT) -> bool:
        """Whether what was read of ``source`` until now may be used."""

    def _let_go(self, source: SourceT) -> None:
        """Nothing will be read from ``source`` any more."""

    def _ended(self, pull: Pull[SourceT], source: SourceT) -> None:
        """A pull from ``source`` is about to be reported as ended: its destination must not be written any more."""

    def _attach(self, instance_id: str, source: SourceT) -> None:
        self._detach(instance_id, f"instance {instance_id} was replaced", None)
        self._sources[instance_id] = source

    def _detach(self, instance_id: str, reason: str, source: SourceT | None) -> None:
        current = self._sources.get(instance_id)
        if current is None or (source is not None and source is not current):
            return
        del self._sources[instance_id]
        for pull in self._pulls.values():
            if pull.source is current:
                pull.failure = pull.failure or reason
        self._let_go(current)

    def _begin(self, migrate: Migrate, done: Callable[[Migrated], None]) -> None:
        assert migrate.pull_id not in self._pulls, f"pull {migrate.pull_id} is under way"
        source = self._sources.get(migrate.source_id)
        pull = Pull(migrate, done, source, "" if source else f"not connected to instance {migrate.source_id}")
        self._pulls[migrate.pull_id] = pull
        if source is not None:
            try:
                self._open(pull, source)
            except TransferError as error:
                pull.failure = str(error)

    def _cancel(self, pull_id: int) -> None:
        if (pull := self._pulls.get(pull_id)) is not None:
            pull.failure = pull.failure or "cancelled"

    def _stop(self) -> None:
        self._stopping = True

    def _run(self) -> None:
        reason = "the transfer thread failed"
        try:
            while not self._stopping:
                self._turn()
            reason = "transport closed"
        finally:
            # Nobody waits for ever on a pull, not even if this thread dies of a bug.
            self._stopping = True
            self._take_orders(0.0)
            for pull in tuple(self._pulls.values()):
                self._end(pull, reason)
            for source in tuple(self._sources.values()):
                self._let_go(source)
            self._sources.clear()

    def _take_orders(self, timeout: float | None) -> None:
        """Do what other threads asked for; wait up to ``timeout`` seconds (None: for ever) for a first order."""
        try:
            order = self._inbox.get(timeout=timeout)
            while True:
                order()
                order = self._inbox.get_nowait()
        except queue.Empty:
            return

    def _invalidity(self, pull: Pull[SourceT]) -> str:
        """Why what has been read for ``pull`` must not be used; empty if it may be."""
        if pull.failure:
            return pull.failure
        if pull.source is None or not self._is_serving(pull.source):
            return f"instance {pull.migrate.source_id} closed"
        if self._clock() > pull.migrate.deadline:
            return "deadline passed"
        return ""

    def _end(self, pull: Pull[SourceT], failure: str) -> None:
        del self._pulls[pull.migrate.pull_id]
        if pull.source is not None:
            self._ended(pull, pull.source)
        num_bytes = 0 if failure or pull.stream is None else pull.stream.num_bytes
        # The source is to be let go of once its instance is gone, not when this pull is garbage.
        pull.source, pull.stream = None, None
        pull.done(Migrated(pull.migrate.pull_id, ok=not failure, reason=failure, num_bytes=num_bytes))
