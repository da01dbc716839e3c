"""Which transport a pair of ranks with KV in GPU memory uses: mapped memory where a card reaches it, else the network.

One pool is offered on both at once. What goes over the network (NCCL) is given: this module needs no library for it.
"""

from collections.abc import Callable

from torch import Tensor

from distserve.core.config import KvLayout
from distserve.core.errors import TransferError
from distserve.transfer.choose import Whereabouts, this_machine
from distserve.transfer.cuda_ipc.device import Device
from distserve.transfer.cuda_ipc.pool import DevicePool
from distserve.transfer.cuda_ipc.transport import CudaIpcTransport
from distserve.transfer.pairwise import PairwiseTransport
from distserve.transfer.transport import Clock, PartTransport


def is_near(ours: Whereabouts, theirs: Whereabouts, reaches: Callable[[str], bool]) -> bool:
    """Whether a pair maps each other's memory: both on one machine, on one card or cards with access to each other.

    Raises TransferError, saying what to do, if they have neither that nor the network in common.
    """
    is_here = bool(ours.machine == theirs.machine and ours.near and theirs.near)
    if is_here and reaches(theirs.near):
        return True
    if ours.far and theirs.far:
        return False
    why = "on a GPU that this one has no access to" if is_here else "not on this host"
    raise TransferError(
        f"the peer's memory is {why}, and {'the peer' if ours.far else 'this rank'} is not on the network: place both "
        "on one GPU, or start them with an interface for NCCL"
    )


class GpuTransport(PairwiseTransport):
    """Implements :class:`~distserve.transfer.transport.PartTransport` with memory of ``device``.

    ``far`` makes the transport to ranks that this card does not reach, over the pool that it is given; None leaves them
    out. ``machine`` says who is on one host (default: :func:`~distserve.transfer.choose.this_machine`). The rest is as
    of :class:`~distserve.transfer.cuda_ipc.transport.CudaIpcTransport`.
    """

    def __init__(
        self,
        layout: KvLayout,
        *,
        device: Device,
        secret: bytes,
        clock: Clock,
        on_lost: Callable[[TransferError], None],
        far: Callable[[Tensor], PartTransport] | None = None,
        machine: str | None = None,
    ) -> None:
        pool = DevicePool(layout, device)
        self._layout = layout
        self._near = CudaIpcTransport(layout, device=device, secret=secret, clock=clock, on_lost=on_lost, pool=pool)
        try:
            self._far = far(pool.bytes) if far is not None else None
        except BaseException:
            self._near.close()
            raise
        super().__init__([self._near, *([self._far] if self._far is not None else [])])
        self._where = Whereabouts(
            this_machine() if machine is None else machine,
            self._near.address,
            self._far.address if self._far is not None else "",
        )

    @property
    def layout(self) -> KvLayout:
        """See :class:`~distserve.transfer.transport.Transport`, here and below."""
        return self._layout

    @property
    def pool(self) -> Tensor:
        """The KV memory, flat uint8 on the device."""
        return self._near.pool

    @property
    def buffer(self) -> memoryview:
        """The pool, if the host can see it; raises TransferError if not: use :attr:`pool` there."""
        return self._near.buffer

    @property
    def address(self) -> str:
        """Where peers of either kind find the pool."""
        return self._where.encode()

    def begin_step(self, step_id: int) -> None:
        """Announce that a step starts, to all."""
        for transport in self._transports:
            transport.begin_step(step_id)

    def layer_done(self, step_id: int, layer: int) -> None:
        """Announce a layer, once the device has computed it."""
        for transport in self._transports:
            transport.layer_done(step_id, layer)

    def end_step(self, step_id: int) -> None:
        """Announce a step, once the device has computed it."""
        for transport in self._transports:
            transport.end_step(step_id)

    def _choose(self, address: str) -> tuple[PartTransport, str]:
        theirs = Whereabouts.decode(address)
        if is_near(self._where, theirs, self._near.reaches):
            return self._near, theirs.near
        assert self._far is not None, "the network was chosen without being there"
        return self._far, theirs.far
