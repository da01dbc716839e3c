"""NCCL through CuPy, which allocates nothing: torch's pointers and streams go in.

Everything is sent as bytes, since CuPy has no bfloat16. The GIL is free inside NCCL's calls. CuPy 14 makes blocking
communicators only, so every call here may hold up its thread; only ``abort`` gets it out again, and nothing while the
communicator is being made.
"""

import threading
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from distserve.core.errors import ConfigError
from distserve.transfer.nccl.device import Completion, Device

_EXTRA = "install the extra `cuda`: pip install -e '.[cuda]' in distserve's checkout"


class CupyCollectives:
    """Implements :class:`~distserve.transfer.nccl.collectives.Collectives` on ``device``, a CUDA card.

    Raises ConfigError if CuPy or NCCL is missing, or if CuPy and torch would use different copies of NCCL.
    """

    def __init__(self, device: Device) -> None:
        self._nccl = _import_nccl()
        self.version = _checked_version(self._nccl)
        self._device = device

    def unique_id(self) -> bytes:
        """See :class:`~distserve.transfer.nccl.collectives.Collectives`, here and below."""
        self._device.bind()
        # CuPy has signed chars.
        return bytes(char & 0xFF for char in self._nccl.get_unique_id())

    def communicator(self, unique_id: bytes, rank: int, num_ranks: int = 2) -> "CupyCommunicator":
        """Make it on the calling thread."""
        self._device.bind()
        chars = tuple(byte - 256 if byte > 127 else byte for byte in unique_id)
        if len(chars) != 128:
            raise RuntimeError(f"a unique id of NCCL has 128 bytes, not {len(chars)}")
        made = self._nccl.NcclCommunicator(num_ranks, chars, rank)
        return CupyCommunicator(self._nccl, made, self._device, peer=num_ranks - 1 - rank)


class CupyCommunicator:
    """Implements :class:`~distserve.transfer.nccl.collectives.Communicator`, on a stream of its own."""

    def __init__(self, nccl: Any, made: Any, device: Device, peer: int) -> None:
        self._nccl = nccl
        self._made = made
        self._device = device
        self._peer = peer
        self._stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        # Calls from outside must not meet a communicator that abort() is freeing.
        self._lock = threading.Lock()
        self._is_aborted = False

    def send(self, memory: Tensor) -> Completion:
        """Behind what was sent before."""
        self._enter()
        self._made.send(memory.data_ptr(), memory.numel(), self._nccl.NCCL_UINT8, self._peer, self._stream.cuda_stream)
        return self._recorded()

    def recv(self, memory: Tensor) -> Completion:
        """Behind what was received before."""
        self._enter()
        self._made.recv(memory.data_ptr(), memory.numel(), self._nccl.NCCL_UINT8, self._peer, self._stream.cuda_stream)
        return self._recorded()

    def exchange(self, outgoing: Tensor, incoming: Tensor) -> Completion:
        """Send and receive in one group: what a communicator of one rank can do."""
        self._device.bind()
        self._nccl.groupStart()
        try:
            for call, memory in ((self._made.send, outgoing), (self._made.recv, incoming)):
                call(
                    memory.data_ptr(), memory.numel(), self._nccl.NCCL_UINT8, self._peer, self._stream.cuda_stream
                )  # fmt: skip
        finally:
            self._nccl.groupEnd()
        return self._recorded()

    def check(self) -> None:
        """Ask for NCCL's asynchronous error."""
        with self._lock:
            if not self._is_aborted:
                self._made.check_async_error()

    def abort(self) -> None:
        """Abort; the host thread that is held up in a call gets an error."""
        with self._lock:
            self._is_aborted = True
        self._device.bind()
        self._made.abort()

    def destroy(self) -> None:
        """Destroy."""
        with self._lock:
            self._is_aborted = True
        self._device.bind()
        self._made.destroy()

    def _enter(self) -> None:
        with self._lock:
            if self._is_aborted:
                raise RuntimeError("the communicator was ended")
        self._device.bind()

    def _recorded(self) -> Completion:
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record(self._stream)
        return event


def _import_nccl() -> Any:
    # torch first: the library it has loaded is the one that CuPy then finds.
    try:
        from cupy.cuda import nccl
    except ImportError as error:
        raise ConfigError(f"KV between GPUs' memories needs CuPy, which is not installed: {_EXTRA}") from error
    if not getattr(nccl, "available", False):
        raise ConfigError(f"CuPy is installed without NCCL, which KV between GPUs' memories needs: {_EXTRA}")
    return nccl


def _checked_version(nccl: Any) -> str:
    """The version of the only NCCL of the process; raises ConfigError if there are two."""
    cupys = _version(nccl.get_version())
    # A fourth field may name a vendor's build.
    torchs = ".".join(map(str, torch.cuda.nccl.version()[:3]))  # type: ignore[no-untyped-call]
    if cupys != torchs:
        raise ConfigError(f"CuPy uses NCCL {cupys} and torch {torchs}: one process must have one; {_EXTRA}")
    loaded = loaded_libraries()
    if len(loaded) > 1:
        raise ConfigError(f"several copies of NCCL are loaded: {', '.join(loaded)}; one process must have one")
    return cupys


def _version(code: int) -> str:
    """``2.27.3`` of 22703."""
    return f"{code // 10000}.{code // 100 % 100}.{code % 100}"


def loaded_libraries(maps: str | None = None) -> list[str]:
    """Paths of the NCCL libraries in this process; ``maps`` is what ``/proc/self/maps`` says."""
    text = Path("/proc/self/maps").read_text() if maps is None else maps
    paths = {line.split(maxsplit=5)[5] for line in text.splitlines() if "libnccl.so" in line}
    return sorted(paths)
