"""The interfaces every transport implements, both sides of it, and what its callers may rely on.

A rank is a *source* to the instances that decode what it prefilled and a *destination* for what it pulls itself. It
is pull-based: the destination reads memory of the source, which only publishes progress and never waits for a reader.
What keeps the memory read valid is the lease that the schedulers negotiate; a pull never outlives its deadline.
"""

from collections.abc import Callable
from typing import Protocol

from distserve.core.commands import Migrate
from distserve.core.config import KvLayout
from distserve.core.events import Migrated
from distserve.transfer.plan import Part

Clock = Callable[[], float]
"""Seconds on the clock that deadlines are given on."""


class Transport(Protocol):
    """KV memory of one rank, readable by its peers, and the pulls into it.

    Methods may be called from any thread. ``begin_step``, ``layer_done`` and ``end_step`` belong to the one thread
    that runs the steps.
    """

    @property
    def layout(self) -> KvLayout:
        """How :attr:`buffer` is laid out."""
        ...

    @property
    def buffer(self) -> memoryview:
        """The KV memory: writable, flat bytes, ``layout.num_bytes`` long, zero at first.

        ``torch.frombuffer(transport.buffer, dtype=torch.uint8)`` and a view of ``layout.shape`` make it the engine's
        cache. It stays mapped as long as anything refers to it, also after :meth:`close`.
        """
        ...

    @property
    def address(self) -> str:
        """What peers hand to :meth:`connect`. New for every transport, so a restarted rank is never mistaken."""
        ...

    def begin_step(self, step_id: int) -> None:
        """Step ``step_id`` starts. Ids never decrease; steps run one after the other on a rank."""
        ...

    def layer_done(self, step_id: int, layer: int) -> None:
        """The step's KV of layer ``layer`` and all before it is in memory. One store, cheap enough for every layer.

        A rank counts its own layers, from 0.
        """
        ...

    def end_step(self, step_id: int) -> None:
        """The step's KV of all layers is in memory."""
        ...

    def connect(self, instance_id: str, address: str) -> None:
        """Make the peer's memory readable under the name ``instance_id``; replaces an earlier peer of that name.

        Waits for the peer's answer, a few seconds at most. Raises :class:`~distserve.core.errors.TransferError` if
        there is no answer, the secrets or protocol versions differ, or blocks of the two layouts are not the same
        bytes; the message names both values.
        """
        ...

    def pull(self, migrate: Migrate, done: Callable[[Migrated], None]) -> None:
        """Start a pull; ``done`` is called exactly once, on a thread of the transport. It must not block or raise.

        ``ok`` is only reported if every byte was read before the deadline, from a peer that was alive and connected.
        Blocks that are ready go first, all layers at once; the others follow as layers of ``ready_step`` complete. A
        step later than ``ready_step`` counts as its completion, so whoever abandons the step must cancel the pull.
        """
        ...

    def cancel(self, pull_id: int) -> None:
        """End a pull early; a no-op if it has ended. After ``done`` its destination blocks are not written any more."""
        ...

    def forget(self, instance_id: str) -> None:
        """The peer is gone: its pulls fail at once and its memory is not read any more. A no-op if unknown."""
        ...

    def close(self) -> None:
        """Fail all pulls, refuse peers, and fail the pulls that peers have under way here. Idempotent."""
        ...


class PartTransport(Transport, Protocol):
    """A transport whose peers may be ranks of another shape: all that move bytes between two ranks are."""

    def connect(self, instance_id: str, address: str, part: Part | None = None) -> None:
        """Do as :meth:`Transport.connect`, with a peer of which ``part`` is pulled.

        Without a part the two layouts must be alike, and all of a block is pulled. Raises TransferError too if the
        peer's layers, heads, block size, head dimension or data type are not those that the part implies.
        """
        ...
