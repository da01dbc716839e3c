"""An NVIDIA card as a :class:`~distserve.transfer.cuda_ipc.device.Device`: torch's streams and events, our copy kernel.

Copies run on a stream of their own, of the lowest priority, beside whatever the process computes.
"""

import weakref
from functools import partial

import numpy as np
import torch
from torch import Tensor

from distserve.core.errors import ConfigError, TransferError
from distserve.transfer.cuda_ipc.device import RowCopy
from distserve.transfer.cuda_ipc.driver import Driver, load_library
from distserve_kernels import copy_rows


def check_cuda(index: int) -> None:
    """Raise ConfigError, saying what is missing, unless torch can use GPU ``index`` of this machine."""
    if torch.version.cuda is None:
        raise ConfigError(
            f"GPU {index} needs a torch built for CUDA, this one ({torch.__version__}) is not: install torch from "
            "https://download.pytorch.org/whl/cu130, or PyPI's on Linux"
        )
    if not torch.cuda.is_available():
        raise ConfigError(f"no GPU {index}: torch finds no NVIDIA card or driver here; `nvidia-smi` says what there is")
    if index >= torch.cuda.device_count():
        raise ConfigError(f"no GPU {index}: there are {torch.cuda.device_count()}, counted from 0")


class CudaDevice:
    """GPU ``index`` of this process. Raises ConfigError if there is none that torch can use."""

    def __init__(self, index: int) -> None:
        check_cuda(index)
        self._device = torch.device("cuda", index)
        # Initialises CUDA, and makes the card's primary context, in which the driver's mappings are used.
        self._stream = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
        self._driver = Driver(load_library())
        self._marked: torch.cuda.Stream | None = None

    @property
    def name(self) -> str:
        """The card's UUID."""
        return _uuid(self._device.index)

    def reaches(self, name: str) -> bool:
        """Whether ``name`` is this card, or one that the process sees and this one has peer access to."""
        other = _index_of(name)
        own = self._device.index
        return other == own or (other is not None and torch.cuda.can_device_access_peer(own, other))

    def allocate(self, num_bytes: int) -> tuple[int, Tensor]:
        """Memory on this card."""
        size = self._driver.allocation_bytes(num_bytes, self._device.index)
        pointer, fd = self._driver.create(size, self._device.index)
        memory = self._as_tensor(pointer, num_bytes, size, self._device)
        memory.zero_()
        torch.cuda.synchronize(self._device)
        return fd, memory

    def open(self, fd: int, num_bytes: int, name: str) -> Tensor:
        """Map memory of another process, which is on this card or on one that it reaches."""
        where = _index_of(name)
        if where is None:
            raise TransferError(f"GPU {name} is not visible to this process")
        size = self._driver.allocation_bytes(num_bytes, where)
        pointer = self._driver.open(fd, size, self._device.index)
        return self._as_tensor(pointer, num_bytes, size, torch.device("cuda", where))

    def prepare(self, row_bytes: int) -> None:
        """Compile the kernel for such rows."""
        # Of torch's allocator, so aligned as pools are: kernels are compiled for that.
        src, dst = (torch.zeros(row_bytes, dtype=torch.uint8, device=self._device) for _ in range(2))
        start = np.zeros(1, dtype=np.int64)
        self.copy(src, dst, RowCopy(start, start, row_bytes, 1, row_bytes, row_bytes))
        self._stream.synchronize()

    def copy(self, src: Tensor, dst: Tensor, rows: RowCopy) -> "CudaEvent":
        """Launch one kernel."""
        try:
            with torch.cuda.device(self._device), torch.cuda.stream(self._stream):
                starts = np.stack((rows.src_starts, rows.dst_starts))
                copy_rows(
                    src,
                    dst,
                    # From pageable memory the host might wait for what is ahead on the stream.
                    torch.from_numpy(starts).pin_memory().to(self._device, non_blocking=True),
                    rows.row_bytes,
                    rows.num_planes,
                    rows.src_stride,
                    rows.dst_stride,
                    unit=int(np.gcd.reduce(starts, axis=None)),
                )
                event = torch.cuda.Event()  # type: ignore[no-untyped-call]
                event.record(self._stream)
        except RuntimeError as error:
            raise TransferError(f"copy not launched: {error}") from error
        return CudaEvent(event)

    def mark(self) -> "CudaEvent":
        """Record an event on the calling thread's current stream."""
        self._marked = torch.cuda.current_stream(self._device)
        return self.mark_again()

    def mark_again(self) -> "CudaEvent":
        """Record an event on the stream last marked; the current one if there is none."""
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record(self._marked or torch.cuda.current_stream(self._device))
        return CudaEvent(event)

    def _as_tensor(self, pointer: int, num_bytes: int, size: int, where: torch.device) -> Tensor:
        mapping = _Mapping(pointer, num_bytes)
        # torch refers to the mapping as long as any tensor uses the memory. What is left at exit ends with the process.
        weakref.finalize(mapping, partial(self._driver.unmap, pointer, size)).atexit = False
        memory = torch.as_tensor(mapping, device=where)
        assert memory.data_ptr() == pointer, "torch copied the memory in place of referring to it"
        return memory


class CudaEvent:
    """Implements :class:`~distserve.transfer.cuda_ipc.device.Event`."""

    def __init__(self, event: torch.cuda.Event) -> None:
        self._event = event

    def has_passed(self) -> bool:
        """Ask the driver; does not wait."""
        try:
            return bool(self._event.query())  # type: ignore[no-untyped-call]
        except RuntimeError as error:
            raise TransferError(f"the GPU has failed: {error}") from error


class _Mapping:
    """Mapped device memory as torch takes it: https://numba.readthedocs.io/en/stable/cuda/cuda_array_interface.html."""

    def __init__(self, pointer: int, num_bytes: int) -> None:
        # torch knows no read-only tensors, and warns of them; the mapping itself is what protects the memory.
        self.__cuda_array_interface__ = {
            "shape": (num_bytes,),
            "typestr": "|u1",
            "data": (pointer, False),
            "strides": None,
            "version": 3,
        }


def _index_of(name: str) -> int | None:
    """Number of the card ``name`` in this process; None if it does not see it."""
    return next((index for index in range(torch.cuda.device_count()) if _uuid(index) == name), None)


def _uuid(index: int) -> str:
    return str(torch.cuda.get_device_properties(index).uuid)
