"""The thread that pulls: turns Migrate commands into copies, in the order given, as their sources get ahead.

Knows sources only as memory with a progress word, so every transport whose peers' memory can be mapped shares it.
All state belongs to the thread; other threads hand it orders through an inbox.
"""

import queue
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial

from distserve.core.commands import Migrate
from distserve.core.config import KvLayout
from distserve.core.errors import TransferError
from distserve.core.events import Migrated
from distserve.transfer.copy import Bytes, copy_pieces
from distserve.transfer.plan import Pieces, plane_bytes, plane_pieces, portions
from distserve.transfer.progress import SourceProgress
from distserve.transfer.transport import Clock

_BATCH_BYTES = 4 << 20
"""Bytes copied between two looks at orders and deadlines: about a millisecond."""


@dataclass(frozen=True, slots=True)
class _Patience:
    """The pause before the next look at a source: a share of the time since something moved, within bounds (s)."""

    share: float
    shortest: float
    longest: float

    def pause(self, waited: float) -> float:
        return min(max(waited * self.share, self.shortest), self.longest)


_UNDER_WAY = _Patience(share=1 / 2, shortest=100e-6, longest=4e-3)
"""While several layers are missing: nothing waits for the one, only the last counts."""
_LAST_LAYER = _Patience(share=1 / 8, shortest=50e-6, longest=500e-6)
"""While one is missing: what this adds is time until the first decode step."""


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
    num_layers_missing: int = 0
    steps: Iterator[bool] = field(default_factory=lambda: iter(()))


class Mover:
    """Pulls into ``memory`` of ``layout`` on one thread. All public methods are safe from any thread."""

    def __init__(self, layout: KvLayout, memory: Bytes, clock: Clock) -> None:
        self._layout = layout
        self._memory = memory
        self._clock = clock
        self._sources: dict[str, Source] = {}
        self._pulls: dict[int, _Pull] = {}
        self._inbox: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="kv-mover", daemon=True)
        self._thread.start()

    def attach(self, instance_id: str, source: Source) -> None:
        """Pulls from ``instance_id`` read ``source`` from now on; those from an earlier source fail."""
        self._inbox.put(partial(self._attach, instance_id, source))

    def detach(self, instance_id: str, reason: str, source: Source | None = None) -> None:
        """Fail the pulls from ``instance_id`` and let go of its memory, unless it is not ``source`` any more."""
        self._inbox.put(partial(self._detach, instance_id, reason, source))

    def pull(self, migrate: Migrate, done: Callable[[Migrated], None]) -> None:
        """Queue a pull; see :meth:`distserve.transfer.transport.Transport.pull`."""
        assert not self._stopping, "pull after close"
        self._inbox.put(partial(self._begin, migrate, done))

    def cancel(self, pull_id: int) -> None:
        """Have the pull end before its next batch of bytes."""
        self._inbox.put(partial(self._cancel, pull_id))

    def close(self) -> None:
        """Fail what is left, wait for the thread, let go of all sources."""
        self._inbox.put(self._stop)
        if threading.current_thread() is not self._thread:
            self._thread.join()

    # Everything below runs on the thread.

    def _attach(self, instance_id: str, source: Source) -> None:
        self._detach(instance_id, f"instance {instance_id} was replaced", None)
        self._sources[instance_id] = source

    def _detach(self, instance_id: str, reason: str, source: Source | None) -> None:
        current = self._sources.get(instance_id)
        if current is None or (source is not None and source is not current):
            return
        del self._sources[instance_id]
        for pull in self._pulls.values():
            if pull.source is current:
                pull.failure = pull.failure or reason

    def _begin(self, migrate: Migrate, done: Callable[[Migrated], None]) -> None:
        assert migrate.pull_id not in self._pulls, f"pull {migrate.pull_id} is under way"
        source = self._sources.get(migrate.source_id)
        pull = _Pull(migrate, done, source, "" if source else f"not connected to instance {migrate.source_id}")
        if source is not None:
            pull.steps = self._steps(pull, source)
        self._pulls[migrate.pull_id] = pull

    def _cancel(self, pull_id: int) -> None:
        if (pull := self._pulls.get(pull_id)) is not None:
            pull.failure = pull.failure or "cancelled"

    def _stop(self) -> None:
        self._stopping = True

    def _run(self) -> None:
        reason = "the transfer thread failed"
        try:
            self._move_until_stopped()
            reason = "transport closed"
        finally:
            # Nobody waits for ever on a pull, not even if this thread dies of a bug.
            self._stopping = True
            self._take_orders(0.0)
            for pull in tuple(self._pulls.values()):
                self._end(pull, reason)
            self._sources.clear()

    def _move_until_stopped(self) -> None:
        last_moved = time.monotonic()
        timeout: float | None = None
        while not self._stopping:
            self._take_orders(timeout)
            # The oldest pull that can go on does, one batch.
            if any(self._advance(pull) for pull in tuple(self._pulls.values())):
                last_moved = time.monotonic()
                timeout = 0.0
            elif self._pulls:
                fewest = min(pull.num_layers_missing for pull in self._pulls.values())
                patience = _LAST_LAYER if fewest == 1 else _UNDER_WAY
                timeout = patience.pause(time.monotonic() - last_moved)
            else:
                timeout = None

    def _take_orders(self, timeout: float | None) -> None:
        """Do what other threads asked for; wait up to ``timeout`` seconds (None: for ever) for a first order."""
        try:
            order = self._inbox.get(timeout=timeout)
            while True:
                order()
                order = self._inbox.get_nowait()
        except queue.Empty:
            return

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

        def pieces(blocks: slice) -> Pieces:
            return plane_pieces(migrate.src_blocks[blocks], migrate.dst_blocks[blocks], theirs, ours)

        ready = pieces(slice(migrate.num_ready_blocks))
        late = pieces(slice(migrate.num_ready_blocks, None))
        yield from self._copy(pull, source, ready, 0, ours.num_layers)
        layer = 0 if late.size else ours.num_layers
        while layer < ours.num_layers:
            passed = source.progress.layers_passed(migrate.ready_step, ours.num_layers)
            pull.num_layers_missing = ours.num_layers - passed
            if passed > layer:
                yield from self._copy(pull, source, late, layer, passed)
                layer = passed
            else:
                yield False

    def _copy(self, pull: _Pull, source: Source, pieces: Pieces, first_layer: int, end_layer: int) -> Iterator[bool]:
        """Copy ``pieces`` of the layers' keys and values, in batches of whole planes or of portions of one."""
        src_stride, dst_stride = plane_bytes(source.layout), plane_bytes(self._layout)
        per_plane = int(pieces[:, 2].sum())
        if per_plane == 0:
            return
        planes_per_batch = max(1, _BATCH_BYTES // per_plane)
        cut = portions(pieces, _BATCH_BYTES)
        for first in range(2 * first_layer, 2 * end_layer, planes_per_batch):
            planes = range(first, min(first + planes_per_batch, 2 * end_layer))
            for portion in cut:
                copy_pieces(source.memory, self._memory, portion, planes, src_stride, dst_stride)
                yield True
            pull.num_bytes += len(planes) * per_plane
