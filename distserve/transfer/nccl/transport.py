"""The transport between the memories of GPUs: KV pools that torch has allocated, NCCL between each pair of ranks."""

import threading
from collections.abc import Callable

import torch
from torch import Tensor

from distserve.core.commands import Migrate
from distserve.core.config import KvLayout
from distserve.core.errors import ConfigError, TransferError
from distserve.core.events import Migrated
from distserve.transfer.nccl.bootstrap import TcpBootstrap
from distserve.transfer.nccl.collectives import Collectives
from distserve.transfer.nccl.cupy_nccl import CupyCollectives
from distserve.transfer.nccl.device import Device, device_of
from distserve.transfer.nccl.driver import Driver
from distserve.transfer.nccl.hub import Hub
from distserve.transfer.nccl.pieces import slot_bytes
from distserve.transfer.nccl.room import Limits
from distserve.transfer.nccl.staging import Staging
from distserve.transfer.nccl.steps import DeviceSteps
from distserve.transfer.plan import Part, whole
from distserve.transfer.transport import Clock


def staging_bytes(layout: KvLayout, limits: Limits | None = None) -> int:
    """Memory that the transport takes beside the pool of ``layout``, but for NCCL's own: about 52 MB a communicator."""
    limits = limits or Limits()
    return 2 * limits.num_slots * slot_bytes(layout, limits.min_piece_bytes)


class NcclTransport:
    """Implements :class:`~distserve.transfer.transport.PartTransport` for memory on a device.

    ``pool`` is the KV memory: flat uint8, ``layout.num_bytes`` long, not owned, and not touched any more once
    :meth:`close` has returned. ``host`` is the interface that peers reach. Peers agree over TCP, on which ``secret``,
    shared by all ranks of a cluster, proves who they are; the bytes travel as NCCL sends them, neither encrypted nor
    authenticated. ``collectives`` and ``device`` are NCCL's and the pool's if not given.

    ``layer_done`` and ``end_step`` record an event on the caller's current stream and return: a step's blocks count as
    ready when the device has passed it. For ``layer_done`` that stream must be the one that computes; ``end_step`` is
    behind all layers that were announced, on whatever stream. ``clock`` also measures the limits.

    Raises ConfigError if CuPy or NCCL is missing, TransferError if this host has no such interface.
    """

    def __init__(
        self,
        layout: KvLayout,
        pool: Tensor,
        *,
        host: str,
        secret: bytes,
        clock: Clock,
        limits: Limits | None = None,
        collectives: Collectives | None = None,
        device: Device | None = None,
    ) -> None:
        if pool.dtype != torch.uint8 or pool.dim() != 1 or pool.numel() != layout.num_bytes:
            raise ConfigError(
                f"a KV pool is {layout.num_bytes} bytes, flat uint8, not {tuple(pool.shape)} of {pool.dtype}"
            )
        limits = limits or Limits()
        device = device or device_of(pool)
        collectives = collectives or CupyCollectives(device)
        self._layout = layout
        self._pool = pool
        self._steps = DeviceSteps(device, layout.num_layers)
        size = slot_bytes(layout, limits.min_piece_bytes)
        staging = Staging(layout, pool, device, limits.num_slots, size)
        self._bootstrap = TcpBootstrap(layout, host=host, secret=secret, version=collectives.version)
        self._hub = Hub(layout, limits, self._steps.layers_passed)
        self._driver = Driver(layout, self._hub, staging, device, collectives, clock)
        # Guards the one below; held while a connection is handed to the driver.
        self._lock = threading.Lock()
        self._closed = False
        self._bootstrap.listen(self._driver.admit)

    @property
    def layout(self) -> KvLayout:
        """See :class:`~distserve.transfer.transport.Transport`, here and below."""
        return self._layout

    @property
    def pool(self) -> Tensor:
        """The KV memory."""
        return self._pool

    @property
    def buffer(self) -> memoryview:
        """The pool, if it is in the host's memory; raises TransferError if a device has it: use :attr:`pool` there."""
        if self._pool.device.type != "cpu":
            raise TransferError(f"the KV memory is on {self._pool.device}: the host cannot see it")
        return self._pool.numpy().data

    @property
    def address(self) -> str:
        """Where peers meet this rank."""
        return self._bootstrap.address

    @property
    def num_communicators(self) -> int:
        """How many exist, are being made, or hang; never more than the limit."""
        return len(self._hub.seats)

    def begin_step(self, step_id: int) -> None:
        """A step is being launched."""
        self._steps.begin_step(step_id)

    def layer_done(self, step_id: int, layer: int) -> None:
        """A layer was launched."""
        self._steps.layer_done(step_id, layer)

    def end_step(self, step_id: int) -> None:
        """A step was launched."""
        self._steps.end_step(step_id)

    def connect(self, instance_id: str, address: str, part: Part | None = None) -> None:
        """Meet a rank; a communicator is made when the first pull needs it."""
        part = part or whole(self._layout)
        try:
            connection, layout = self._bootstrap.meet(address, part.source_layout(self._layout))
        except TransferError as error:
            raise TransferError(f"cannot connect to instance {instance_id}: {error}") from error
        with self._lock:
            if self._closed:
                connection.close()
                raise TransferError("transport closed")
            self._driver.attach(instance_id, connection, layout, part)

    def pull(self, migrate: Migrate, done: Callable[[Migrated], None]) -> None:
        """Queue a pull."""
        self._driver.pull(migrate, done)

    def cancel(self, pull_id: int) -> None:
        """End a pull."""
        self._driver.cancel(pull_id)

    def forget(self, instance_id: str) -> None:
        """Drop a peer."""
        self._driver.detach(instance_id, f"instance {instance_id} is gone")

    def close(self) -> None:
        """Hang up on everyone, end communicators and threads; waits for what is on its way, for ``close_timeout``."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
        self._bootstrap.close()
        self._driver.close()
