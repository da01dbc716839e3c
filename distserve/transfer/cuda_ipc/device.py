"""What the transport asks of a device. Implemented for CUDA in :mod:`~distserve.transfer.cuda_ipc.cuda`.

Memory is flat uint8 tensors, mapped as long as anything refers to them, and handed to other processes as descriptors.
Nothing here waits for the device except where it says so.
"""

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from distserve.transfer.plan import Starts


@dataclass(frozen=True, slots=True)
class RowCopy:
    """Rows of ``row_bytes`` bytes, from ``src_starts[i]`` to ``dst_starts[i]``, in each of ``num_planes`` planes.

    A plane starts ``src_stride`` and ``dst_stride`` bytes after the one before it; starts are those of the first plane,
    in bytes from the start of the memories. Rows do not overlap in the destination.
    """

    src_starts: Starts
    dst_starts: Starts
    row_bytes: int
    num_planes: int
    src_stride: int
    dst_stride: int


class Event(Protocol):
    """A place in a queue of work on the device."""

    def has_passed(self) -> bool:
        """Whether all work before it has been done, and its writes can be seen by whatever is launched later.

        Raises TransferError if the device has failed; then nothing launched on it by this process runs any more.
        """
        ...


class Device(Protocol):
    """One card, as one process uses it. Methods may be called from any thread."""

    @property
    def name(self) -> str:
        """Identity of the card, the same in every process of the host; has no space or slash in it."""
        ...

    def reaches(self, name: str) -> bool:
        """Whether memory of the card ``name`` can be read by this one."""
        ...

    def allocate(self, num_bytes: int) -> tuple[int, Tensor]:
        """Zeroed memory, and a descriptor (the caller's to close) by which another process can open it.

        Waits for the device. Raises TransferError if there is not so much.
        """
        ...

    def open(self, fd: int, num_bytes: int, name: str) -> Tensor:
        """Memory that another process allocated on card ``name``, for reading; the descriptor stays the caller's.

        It outlives the process that allocated it. Raises TransferError if it cannot be mapped.
        """
        ...

    def prepare(self, row_bytes: int) -> None:
        """Have everything ready for copies of such rows, so that no copy waits for it. May take seconds."""
        ...

    def copy(self, src: Tensor, dst: Tensor, rows: RowCopy) -> Event:
        """Launch a copy, behind those launched before; passed once it is done.

        Both memories must stay referred to until then. Raises TransferError if it was not launched.
        """
        ...

    def mark(self) -> Event:
        """Where the work ends that has been launched so far on the calling thread's current stream."""
        ...

    def mark_again(self) -> Event:
        """Mark the stream that was last marked: for a caller who has left it."""
        ...
