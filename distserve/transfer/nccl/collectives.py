"""What the transport asks of NCCL, so that anything that does the same can stand in for it."""

from typing import Protocol

from torch import Tensor

from distserve.transfer.nccl.device import Completion


class Communicator(Protocol):
    """Two ranks that send bytes to each other. One thread at a time calls it, but for :meth:`abort` and :meth:`check`.

    All methods raise RuntimeError if the library reports an error.
    """

    def send(self, memory: Tensor) -> Completion:
        """Launch the send of ``memory`` (flat uint8, contiguous) to the other rank.

        The host may be held up until the other rank has launched its receive.
        """
        ...

    def recv(self, memory: Tensor) -> Completion:
        """Launch the receive of as many bytes as ``memory`` has. The host may be held up likewise."""
        ...

    def check(self) -> None:
        """Raise if something that was launched has failed. Never waits. Not to be called once abort was."""
        ...

    def abort(self) -> None:
        """End everything that was launched, and the communicator; from any thread, also while another is held up."""
        ...

    def destroy(self) -> None:
        """End the communicator, which is idle on both ranks. May wait for the other rank to do the same."""
        ...


class Collectives(Protocol):
    """A library that makes communicators. Safe from any thread; each may hold its caller up for as long as it likes."""

    @property
    def version(self) -> str:
        """Both ends of a pair must have the same."""
        ...

    def unique_id(self) -> bytes:
        """A new name for a communicator, under which its two ranks find each other."""
        ...

    def communicator(self, unique_id: bytes, rank: int, num_ranks: int = 2) -> Communicator:
        """Make it; returns when all ranks have come. The first rank is a process that made the id."""
        ...
