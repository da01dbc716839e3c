"""The transport between processes whose KV pools are in memory of one card, or of cards with access to each other.

See :mod:`distserve.transfer.mapped` for how peers meet and part, and :mod:`~distserve.transfer.cuda_ipc.driver` for why
memory of a process that has died stays readable for as long as a copy out of it may be under way.
"""

import os
from collections.abc import Callable

from torch import Tensor

from distserve.core.config import KvLayout
from distserve.core.errors import TransferError
from distserve.transfer import handshake, progress, segment
from distserve.transfer.cuda_ipc.device import Device
from distserve.transfer.cuda_ipc.mover import COPY_PATIENCE, DeviceMover, DeviceSource
from distserve.transfer.cuda_ipc.pool import DevicePool
from distserve.transfer.cuda_ipc.readiness import ReadinessThread
from distserve.transfer.mapped import MappedTransport
from distserve.transfer.mapped_pulls import Source
from distserve.transfer.plan import Part, row_bytes
from distserve.transfer.progress import SourceProgress
from distserve.transfer.transport import Clock

_PREFIX = "cuda-ipc:"


class CudaIpcTransport(MappedTransport[DeviceSource]):
    """Implements :class:`~distserve.transfer.transport.PartTransport` with memory of ``device``.

    ``on_lost`` is called if a copy hangs for ``patience`` seconds or the device fails: end the process, as
    :class:`~distserve.transfer.cuda_ipc.mover.DeviceMover` says. The rest is as of
    :class:`~distserve.transfer.shm.ShmTransport`.

    ``begin_step``, ``layer_done`` and ``end_step`` are to be called once the work has been *launched*, by the thread
    that launched it; it is announced to peers once the device has done it.
    """

    def __init__(
        self,
        layout: KvLayout,
        *,
        device: Device,
        secret: bytes,
        clock: Clock,
        on_lost: Callable[[TransferError], None],
        pool: DevicePool | None = None,
        patience: float = COPY_PATIENCE,
    ) -> None:
        self._device = device
        self._memory = pool or DevicePool(layout, device)
        self._readiness = ReadinessThread(device, self._memory.progress)
        mover = DeviceMover(layout, self._memory.bytes, device, clock, on_lost, patience)
        super().__init__(layout, offered=self._memory, mover=mover, secret=secret)

    @property
    def layout(self) -> KvLayout:
        """See :class:`~distserve.transfer.transport.Transport`, here and below."""
        return self._layout

    @property
    def pool(self) -> Tensor:
        """The KV memory, flat uint8 on the device."""
        return self._memory.bytes

    @property
    def buffer(self) -> memoryview:
        """The pool, if the host can see it; raises TransferError if not: use :attr:`pool` there."""
        if self.pool.device.type != "cpu":
            raise TransferError(f"the KV memory is on {self.pool.device}: the host cannot see it")
        return memoryview(self.pool.numpy().data)

    @property
    def address(self) -> str:
        """The card, and where the process listens."""
        return f"{_PREFIX}{self._device.name}/{self.name}"

    def reaches(self, address: str) -> bool:
        """Whether the card has access to the memory of the rank at ``address``; raises TransferError if it is none."""
        return self._device.reaches(_parse(address)[0])

    def begin_step(self, step_id: int) -> None:
        """Announce that a step starts."""
        self._readiness.begin_step(step_id)

    def layer_done(self, step_id: int, layer: int) -> None:
        """Announce a layer once the device has computed it; only the last one where nobody would hear of it."""
        if self.has_peers or layer == self._layout.num_layers - 1:
            self._readiness.layer_done(step_id, layer)

    def end_step(self, step_id: int) -> None:
        """Announce a step once the device has computed it."""
        self._readiness.end_step(step_id)

    def close(self) -> None:
        """As :meth:`MappedTransport.close`."""
        super().close()
        self._readiness.close()

    def _locate(self, address: str) -> str:
        card, name = _parse(address)
        if not self._device.reaches(card):
            raise TransferError(
                f"its memory is on GPU {card}, to which GPU {self._device.name} has no access: use the transport nccl"
            )
        return name

    def _map(self, address: str, offered: handshake.Offered, part: Part) -> DeviceSource:
        try:
            card, _ = _parse(address)
            memory = self._device.open(offered.pool_fd, offered.layout.num_bytes, card)
            words = segment.attach(offered.progress_fd, progress.NUM_BYTES)
        finally:
            os.close(offered.pool_fd)
            os.close(offered.progress_fd)
        self._device.prepare(row_bytes(offered.layout, self._layout, part))
        return Source(offered.layout, memory, SourceProgress(memoryview(words)), offered.generation, part)


def _parse(address: str) -> tuple[str, str]:
    """Return the card and the name in an address; raises TransferError if it is none."""
    card, slash, name = address.removeprefix(_PREFIX).partition("/")
    if not address.startswith(_PREFIX) or not slash:
        raise TransferError(f"{address!r} is not an address of KV in GPU memory")
    return card, name
