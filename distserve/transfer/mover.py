"""The thread that pulls: turns Migrate commands into copies, in the order given, as their sources get ahead.

Knows sources only as memory with a progress word, so every transport whose peers' memory can be mapped shares it.
"""

import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from distserve.core.commands import Migrate
from distserve.core.config import KvLayout
from distserve.core.errors import TransferError
from distserve.core.events import Migrated
from distserve.transfer.copy import Bytes, copy_pieces
from distserve.transfer.plan import Runs, batches, block_runs, layer_pieces
from distserve.transfer.progress import SourceProgress
from distserve.transfer.transport import Clock

_BATCH_BYTES = 4 << 20
"""Bytes copied between two looks at deadlines and cancellations: below a millisecond."""
_POLL_SHORTEST, _POLL_LONGEST = 50e-6, 500e-6
"""Bounds of the pause between two looks at a source that computes, in seconds."""
_POLL_SHARE = 1 / 16
"""The pause as a share of the time since something last moved: a layer that takes long may be noticed later."""


@dataclass(frozen=True, slots=True, eq=False)
class Source:
    """Memory of one life of a peer. Mapped as long as referred to; its bytes outlive the peer's process."""

    layout: KvLayout
    memory: Bytes
    progress: SourceProgress
    generation: int


@dataclass(slots=True, eq=False)
class _Pull:
    migrate: Migrate
    done: Callable[[Migrated], None]
    source: Source | None
    failure: str
    """Why it must end; empty while it may go on."""
    num_bytes: int = 0
    steps: Iterator[bool] = field(default_factory=lambda: iter(()))


class Mover:
    """Pulls into ``memory`` of ``layout`` on one thread. All methods are safe from any thread."""

    def __init__(self, layout: KvLayout, memory: Bytes, clock: Clock) -> None:
        self._layout = layout
        self._memory = memory
        self._clock = clock
        self._sources: dict[str, Source] = {}
        self._pulls: dict[int, _Pull] = {}
        self._changed = threading.Condition()
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="kv-mover", daemon=True)
        self._thread.start()

    def attach(self, instance_id: str, source: Source) -> None:
        """Pulls from ``instance_id`` read ``source`` from now on; those from an earlier source fail."""
        with self._changed:
            self._fail_pulls(self._sources.get(instance_id), f"instance {instance_id} was replaced")
            self._sources[instance_id] = source

    def detach(self, instance_id: str, reason: str, source: Source | None = None) -> None:
        """Fail the pulls from ``instance_id`` and let go of its memory, unless it is not ``source`` any more."""
        with self._changed:
            current = self._sources.get(instance_id)
            if current is not None and (source is None or current is source):
                self._fail_pulls(current, reason)
                del self._sources[instance_id]

    def pull(self, migrate: Migrate, done: Callable[[Migrated], None]) -> None:
        """Queue a pull; see :meth:`distserve.transfer.transport.Transport.pull`."""
        with self._changed:
            assert migrate.pull_id not in self._pulls, f"pull {migrate.pull_id} is under way"
            assert not self._closing, "pull after close"
            source = self._sources.get(migrate.source_id)
            pull = _Pull(migrate, done, source, "" if source else f"not connected to instance {migrate.source_id}")
            if source is not None:
                pull.steps = self._steps(pull, source)
            self._pulls[migrate.pull_id] = pull
            self._changed.notify()

    def cancel(self, pull_id: int) -> None:
        """Have the pull end before its next batch of bytes."""
        with self._changed:
            if (pull := self._pulls.get(pull_id)) is not None:
                pull.failure = pull.failure or "cancelled"

    def close(self) -> None:
        """Fail what is left, wait for the thread, let go of all sources."""
        with self._changed:
            self._closing = True
            for pull in self._pulls.values():
                pull.failure = pull.failure or "transport closed"
            self._sources.clear()
            self._changed.notify()
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def _fail_pulls(self, source: Source | None, reason: str) -> None:
        for pull in self._pulls.values():
            if pull.source is source:
                pull.failure = pull.failure or reason

    def _run(self) -> None:
        try:
            self._move_until_closed()
        finally:
            # Nobody waits for ever on a pull, not even if this thread dies of a bug.
            with self._changed:
                self._closing = True
                orphans = tuple(self._pulls.values())
            for pull in orphans:
                self._end(pull, "the transfer thread failed")

    def _move_until_closed(self) -> None:
        last_moved = 0.0
        while True:
            with self._changed:
                while not self._pulls and not self._closing:
                    self._changed.wait()
                if not self._pulls:
                    return
                pulls = tuple(self._pulls.values())
            # The oldest pull that can go on does, one batch.
            if any(self._advance(pull) for pull in pulls):
                last_moved = time.monotonic()
            else:
                pause = (time.monotonic() - last_moved) * _POLL_SHARE
                time.sleep(min(max(pause, _POLL_SHORTEST), _POLL_LONGEST))

    def _advance(self, pull: _Pull) -> bool:
        """Take the pull one batch further, or to its end; False if all it can do is wait."""
        moved: bool | None = None
        if not pull.failure:
            try:
                moved = next(pull.steps, None)
            except TransferError as error:
                pull.failure = str(error)
        # Bytes count only if lease and source still stood after they were read: look after the batch, not before.
        failure = pull.failure or self._invalidity(pull)
        if moved is not None and not failure:
            return moved
        self._end(pull, failure)
        return True

    def _end(self, pull: _Pull, failure: str) -> None:
        with self._changed:
            del self._pulls[pull.migrate.pull_id]
        # The source is to be unmapped once its instance is gone, not when this pull is garbage.
        pull.source, pull.steps = None, iter(())
        num_bytes = 0 if failure else pull.num_bytes
        pull.done(Migrated(pull.migrate.pull_id, ok=not failure, reason=failure, num_bytes=num_bytes))

    def _invalidity(self, pull: _Pull) -> str:
        if pull.source is None or pull.source.progress.generation != pull.source.generation:
            return f"instance {pull.migrate.source_id} closed"
        if self._clock() > pull.migrate.deadline:
            return "deadline passed"
        return ""

    def _steps(self, pull: _Pull, source: Source) -> Iterator[bool]:
        """Copy batch by batch; yields whether something moved."""
        migrate, ours, theirs = pull.migrate, self._layout, source.layout

        def copy(runs: Runs, first_layer: int, end_layer: int) -> Iterator[bool]:
            for batch in batches(layer_pieces(runs, theirs, ours, first_layer, end_layer), _BATCH_BYTES):
                pull.num_bytes += copy_pieces(source.memory, self._memory, batch)
                yield True

        def runs(blocks: slice) -> Runs:
            src, dst = migrate.src_blocks[blocks], migrate.dst_blocks[blocks]
            return block_runs(src, dst, theirs.num_blocks, ours.num_blocks)

        ready = migrate.num_ready_blocks
        ready_runs, late_runs = runs(slice(ready)), runs(slice(ready, None))
        yield from copy(ready_runs, 0, ours.num_layers)
        layer = 0 if late_runs.size else ours.num_layers
        while layer < ours.num_layers:
            passed = source.progress.layers_passed(migrate.ready_step, ours.num_layers)
            if passed > layer:
                yield from copy(late_runs, layer, passed)
                layer = passed
            else:
                yield False
