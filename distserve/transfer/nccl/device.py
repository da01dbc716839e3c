"""Streams and events, as far as the transport needs them; and where there are none.

The transport never waits for a device: it records an event behind what it launched, and looks at it.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Protocol

import torch
from torch import Tensor

from distserve.core.errors import ConfigError


class Completion(Protocol):
    """Something launched that ends some day."""

    def query(self) -> bool:
        """Whether it has ended. Never waits; raises RuntimeError if the device has failed."""
        ...


class Device(Protocol):
    """Where a KV pool lies. Safe from any thread that has called :meth:`bind`."""

    def bind(self) -> None:
        """Make this the device that the calling thread's libraries work on."""
        ...

    def record(self) -> Completion:
        """Mark what the calling thread has launched on its current stream so far: a step's compute stream, say."""
        ...

    def apart(self) -> AbstractContextManager[object]:
        """Have what is launched within run on the transport's own stream for copies, beside any compute stream."""
        ...

    def empty(self, num_bytes: int) -> Tensor:
        """Memory of so many bytes, flat uint8, at an address that suits any data type."""
        ...

    def index(self, numbers: Sequence[int]) -> Tensor:
        """``numbers`` on the device, for kernels launched later on the current stream."""
        ...


class Passed:
    """What a CPU has computed when it returns."""

    def query(self) -> bool:
        """Always."""
        return True


class CpuDevice:
    """A device without streams: everything has ended when its call returns."""

    def bind(self) -> None:
        """Nothing to choose."""

    def record(self) -> Completion:
        """See :class:`Device`, here and below."""
        return Passed()

    def apart(self) -> AbstractContextManager[object]:
        """Nothing runs beside anything."""
        return nullcontext()

    def empty(self, num_bytes: int) -> Tensor:
        """Ordinary memory."""
        return torch.empty(num_bytes, dtype=torch.uint8)

    def index(self, numbers: Sequence[int]) -> Tensor:
        """A tensor."""
        return torch.tensor(numbers, dtype=torch.int64)


class CudaDevice:
    """A CUDA card. ``device`` is as torch names it; raises ConfigError if it cannot be had."""

    def __init__(self, device: torch.device) -> None:
        if not torch.cuda.is_available():
            raise ConfigError("KV in GPU memory needs a CUDA device, and torch sees none")
        index = torch.cuda.current_device() if device.index is None else device.index
        self._device = torch.device("cuda", index)
        self._copies = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]

    def bind(self) -> None:
        """Make it torch's and CUDA's current device."""
        torch.cuda.set_device(self._device)

    def record(self) -> Completion:
        """An event on the current stream; about a microsecond."""
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record(torch.cuda.current_stream(self._device))
        return event

    def apart(self) -> AbstractContextManager[object]:
        """A stream of the pool that torch's own streams come from; never one that NCCL is given."""
        return torch.cuda.stream(self._copies)

    def empty(self, num_bytes: int) -> Tensor:
        """Out of torch's allocator."""
        return torch.empty(num_bytes, dtype=torch.uint8, device=self._device)

    def index(self, numbers: Sequence[int]) -> Tensor:
        """Through pinned memory: from pageable memory the host might wait for what is ahead on the stream."""
        pinned = torch.tensor(numbers, dtype=torch.int64, pin_memory=True)
        return pinned.to(self._device, non_blocking=True)


def device_of(pool: Tensor) -> Device:
    """The device that ``pool`` lies on. Raises ConfigError if it is neither a CPU nor a CUDA card."""
    if pool.device.type == "cuda":
        return CudaDevice(pool.device)
    if pool.device.type == "cpu":
        return CpuDevice()
    raise ConfigError(f"KV memory on {pool.device.type} cannot be moved; cuda and cpu can")
