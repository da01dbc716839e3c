"""What a runner needs of a device, and the backend that rehearses it on the CPU.

A runner launches work and never asks for a result, except through a :class:`Download`. Work runs in the order launched.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Array = NDArray[Any]


@dataclass(frozen=True, slots=True)
class Padding:
    """What stands in the rows of a captured batch that no sequence has.

    A row at a negative position has context length 0 and stores nothing. Where kernels do not know of such rows, they
    are at position 0 of a block of their own, ``block``.
    """

    position: int
    block: int


class Download(Protocol):
    """Tensors on their way to the host."""

    def wait(self) -> tuple[Tensor, ...]:
        """The tensors, on the CPU, once they are there. From any thread."""
        ...


class Backend(Protocol):
    """A device that computes asynchronously. Methods are for one thread at a time."""

    @property
    def device(self) -> torch.device:
        """Where tensors live."""
        ...

    @property
    def skips_padding(self) -> bool:
        """Whether kernels store nothing at negative slots and read nothing at context length 0."""
        ...

    def scope(self) -> AbstractContextManager[object]:
        """Within it, operations go to the device, in order; every other method is called within it."""
        ...

    def upload(self, array: Array) -> Tensor:
        """A copy of ``array`` on the device. The array may be changed at once."""
        ...

    def download(self, tensors: Sequence[Tensor]) -> Download:
        """Start to copy the tensors, as they are when the work launched so far is done, to the host."""
        ...

    def capture(self, run: Callable[[], Tensor]) -> Callable[[], Tensor]:
        """Record what ``run`` launches; the result launches that again, on what is then in the tensors it reads.

        The tensor returned is the same every time: a replay overwrites what the one before it left. ``run`` is called
        several times meanwhile.

        Raises:
            RuntimeError: ``run`` does what cannot be recorded, such as waiting for a result.
        """
        ...


class HostBackend:
    """Runs everything at once on the CPU: the rehearsal that tests make without an accelerator."""

    def __init__(self) -> None:
        self.device = torch.device("cpu")
        self.skips_padding = False
        self.num_replays = 0

    def scope(self) -> AbstractContextManager[object]:
        """See :class:`Backend`."""
        return nullcontext()

    def upload(self, array: Array) -> Tensor:
        """See :class:`Backend`."""
        return torch.from_numpy(np.array(array))

    def download(self, tensors: Sequence[Tensor]) -> Download:
        """See :class:`Backend`."""
        return _Arrived(tuple(tensor.clone() for tensor in tensors))

    def capture(self, run: Callable[[], Tensor]) -> Callable[[], Tensor]:
        """See :class:`Backend`; as a graph's, the result lies in memory that the next replay writes to."""
        result = run().clone()

        def replay() -> Tensor:
            self.num_replays += 1
            return result.copy_(run())

        return replay


@dataclass(frozen=True, slots=True)
class _Arrived:
    tensors: tuple[Tensor, ...]

    def wait(self) -> tuple[Tensor, ...]:
        return self.tensors
