"""One pull made of several: of a rank from many ranks, or of an instance's ranks. Reported once, at the end of all."""

import threading
from collections.abc import Callable, Sequence
from typing import Protocol

from distserve.core.commands import Migrate
from distserve.core.events import Migrated


class Puller(Protocol):
    """What pulls: a transport, or a stand-in for a rank in another process."""

    def pull(self, migrate: Migrate, done: Callable[[Migrated], None]) -> None:
        """Start a pull; see :meth:`distserve.transfer.transport.Transport.pull`."""
        ...

    def cancel(self, pull_id: int) -> None:
        """End a pull early; a no-op if it has ended."""
        ...


def pull_jointly(pull_id: int, parts: Sequence[tuple[Puller, Migrate]], done: Callable[[Migrated], None]) -> None:
    """Start ``parts``, of which there is at least one, and report them as pull ``pull_id`` once all have ended.

    Only then are all destination blocks free of writes. If a part fails the others are cancelled, and the first
    failure is the reason reported. ``num_bytes`` is that of all parts.
    """
    assert parts
    joint = _Joint(pull_id, parts, done)
    for puller, migrate in parts:
        puller.pull(migrate, joint.part_ended)
    joint.all_started()


class _Joint:
    """Counts the parts of one pull; its methods are called on any thread."""

    def __init__(self, pull_id: int, parts: Sequence[tuple[Puller, Migrate]], done: Callable[[Migrated], None]) -> None:
        self._pull_id = pull_id
        self._parts = parts
        self._done = done
        self._lock = threading.Lock()
        self._num_left = len(parts)
        self._num_bytes = 0
        self._failure: Migrated | None = None

    def part_ended(self, event: Migrated) -> None:
        with self._lock:
            self._num_left -= 1
            self._num_bytes += event.num_bytes
            is_first_failure = not event.ok and self._failure is None
            if is_first_failure:
                self._failure = event
            is_last = self._num_left == 0
        if is_last:
            failure = self._failure
            self._done(
                Migrated(self._pull_id, ok=True, num_bytes=self._num_bytes)
                if failure is None
                else Migrated(self._pull_id, ok=False, reason=failure.reason)
            )
        elif is_first_failure:
            self._cancel()

    def all_started(self) -> None:
        """A part that failed before the others were started could not cancel those."""
        with self._lock:
            has_failed = self._failure is not None and self._num_left > 0
        if has_failed:
            self._cancel()

    def _cancel(self) -> None:
        for puller, migrate in self._parts:
            puller.cancel(migrate.pull_id)


class InstancePuller:
    """Pulls of an instance: every rank pulls the same blocks of its own layers and heads.

    Implements :class:`Puller` over ``ranks``, which are told of a pull by the same ``pull_id``.
    """

    def __init__(self, ranks: Sequence[Puller]) -> None:
        self._ranks = tuple(ranks)

    def pull(self, migrate: Migrate, done: Callable[[Migrated], None]) -> None:
        """Start the pull on all ranks; ``done`` is called once, when all have ended theirs."""
        pull_jointly(migrate.pull_id, [(rank, migrate) for rank in self._ranks], done)

    def cancel(self, pull_id: int) -> None:
        """End the pull early on all ranks."""
        for rank in self._ranks:
            rank.cancel(pull_id)
