"""Instances on GPUs: what they compute with, and which transports move their KV.

Between cards that map each other's memory that is :mod:`distserve.transfer.cuda_ipc`; else NCCL, or TCP through the
memory of the hosts where NCCL is not to be had.
"""

import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from pkgutil import resolve_name

import torch
from torch import Tensor

from distserve.cluster.clock import cluster_time
from distserve.core.config import KvLayout
from distserve.core.errors import ConfigError, TransferError
from distserve.engine.device.backend import Backend
from distserve.engine.sharding.shard import Shard
from distserve.transfer import reshard
from distserve.transfer.choose import TransportKind
from distserve.transfer.cuda_ipc.cuda import CudaDevice
from distserve.transfer.cuda_ipc.device import Device
from distserve.transfer.gpu import GpuTransport
from distserve.transfer.nccl.collectives import Collectives
from distserve.transfer.nccl.cupy_nccl import CupyCollectives
from distserve.transfer.nccl.device import device_of
from distserve.transfer.nccl.sockets import SocketCollectives
from distserve.transfer.nccl.transport import NcclTransport
from distserve.transfer.sharded import ShardedTransport

logger = logging.getLogger(__name__)

_EXIT_UNAVAILABLE = 69


def cupy_nccl(pool: Tensor) -> Collectives:
    """NCCL on the card of ``pool``; raises ConfigError, with the extra to install, if CuPy or NCCL is missing."""
    return CupyCollectives(device_of(pool))


@dataclass(frozen=True, slots=True)
class Hardware:
    """What an instance computes and moves KV with.

    ``backend`` None: what the engine has for the plan's device. ``open_nccl`` gives what makes communicators for a pool
    of the device; it raises ConfigError if that cannot be.
    """

    device: Device
    backend: Backend | None = None
    open_nccl: Callable[[Tensor], Collectives] = cupy_nccl


def cuda_hardware(device: str) -> Hardware:
    """The card ``device`` (``cuda`` or ``cuda:N``); raises ConfigError if there is none."""
    return Hardware(CudaDevice(torch.device(device).index or 0))


def rank_backend(local_rank: int, hardware: str) -> Backend:
    """What a node's rank ``local_rank`` computes on if ``hardware`` names what opens a card with a backend."""
    opened: Hardware = resolve_name(hardware)(f"cuda:{local_rank}")
    assert opened.backend is not None
    return opened.backend


def gpu_transport(
    layout: KvLayout, shard: Shard, secret: bytes, hardware: Hardware, kind: TransportKind, host: str | None
) -> tuple[ShardedTransport, Tensor]:
    """The transport of a rank on ``hardware``, and its KV memory.

    ``kind`` auto maps the memory of peers that the card reaches; others are reached through ``host``, if it is given:
    over NCCL, or over TCP if that is missing. ``nccl`` and ``tcp`` take nothing else.

    Raises TransferError if there is no memory for ``layout``, ConfigError if ``nccl`` is missing.
    """
    assert kind is not TransportKind.SHM, "checked with the configuration"

    def far(pool: Tensor) -> NcclTransport:
        assert host is not None, "a port is opened for all kinds but auto"
        collectives = _collectives(hardware, pool, kind, host)
        return NcclTransport(layout, pool, host=host, secret=secret, clock=cluster_time, collectives=collectives)

    part = reshard.KvShard(shard.parallel, shard.rank, shard.num_layers, shard.num_kv_heads)
    if kind is TransportKind.AUTO:
        either = GpuTransport(
            layout,
            device=hardware.device,
            secret=secret,
            clock=cluster_time,
            on_lost=_end_process,
            far=far if host is not None else None,
        )
        return ShardedTransport(either, part), either.pool
    descriptor, pool = hardware.device.allocate(layout.num_bytes)
    os.close(descriptor)
    return ShardedTransport(far(pool), part), pool


def _collectives(hardware: Hardware, pool: Tensor, kind: TransportKind, host: str) -> Collectives:
    """What moves KV over the network; raises ConfigError if it is to be NCCL, which is missing."""
    if kind is not TransportKind.TCP:
        try:
            return hardware.open_nccl(pool)
        except ConfigError as error:
            if kind is TransportKind.NCCL:
                raise
            logger.warning("KV between GPUs goes over TCP through the hosts' memory, which is slower: %s", error)
    return SocketCollectives(device_of(pool), host=host)


def _end_process(error: TransferError) -> None:
    """The device is lost: nothing may be reported any more, so the process ends at once, and is replaced."""
    logger.critical("the instance ends: %s", error)
    os._exit(_EXIT_UNAVAILABLE)
