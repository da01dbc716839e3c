"""The CUDA backend: one stream, pinned memory for what travels, graphs of one memory pool.

Pinned memory comes from torch's caching allocator, which knows of copies under way: memory is not used again before a
copy from or to it has ended, however early its tensor is dropped.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from distserve.engine.device.backend import Array, Download
from distserve_kernels.gpu.support import has_triton

_WARM_UPS = 2
"""Calls before a capture: kernels are compiled, and libraries allocate their workspaces, at the first."""


class CudaBackend:
    """Implements :class:`distserve.engine.device.backend.Backend` on one CUDA device."""

    def __init__(self, device: torch.device) -> None:
        index = torch.cuda.current_device() if device.index is None else device.index
        self.device = torch.device("cuda", index)
        self.stream: torch.cuda.Stream = torch.cuda.Stream(self.device)  # type: ignore[no-untyped-call]
        self.skips_padding = has_triton()
        self._pool: Any = None

    @contextmanager
    def scope(self) -> Iterator[None]:
        """See :class:`Backend`."""
        with torch.cuda.device(self.device), torch.cuda.stream(self.stream):
            yield

    def upload(self, array: Array) -> Tensor:
        """See :class:`Backend`."""
        tensor = torch.from_numpy(array)
        return (tensor.pin_memory() if array.size else tensor).to(self.device, non_blocking=True)

    def download(self, tensors: Sequence[Tensor]) -> Download:
        """See :class:`Backend`."""
        copies = []
        for tensor in tensors:
            copy = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.numel() > 0)
            copies.append(copy.copy_(tensor, non_blocking=True))
        # Whoever waits sleeps: spinning would take a core from the thread that launches the next step.
        event: torch.cuda.Event = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
        event.record(self.stream)
        return _Travelling(tuple(copies), event)

    def capture(self, run: Callable[[], Tensor]) -> Callable[[], Tensor]:
        """See :class:`Backend`; all graphs share the memory of what they compute on the way."""
        for _ in range(_WARM_UPS):
            run()
        self.stream.synchronize()
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        # Other threads, such as a transport's, may go on using CUDA meanwhile.
        with torch.cuda.graph(graph, pool=self._pool, stream=self.stream, capture_error_mode="thread_local"):
            result = run()

        def replay() -> Tensor:
            graph.replay()
            return result

        return replay


@dataclass(frozen=True, slots=True)
class _Travelling:
    copies: tuple[Tensor, ...]
    event: torch.cuda.Event

    def wait(self) -> tuple[Tensor, ...]:
        self.event.synchronize()
        return self.copies
