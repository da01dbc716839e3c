"""Instances on one GPU: which one their processes see, what of its memory each gets, and what they move KV with."""

import logging
import os
from dataclasses import dataclass

import torch
from torch import Tensor

from distserve.cluster.clock import cluster_time
from distserve.core.config import KvLayout
from distserve.core.errors import TransferError
from distserve.engine.device.backend import Backend
from distserve.engine.sharding.shard import Shard
from distserve.transfer import reshard
from distserve.transfer.cuda_ipc.cuda import CudaDevice
from distserve.transfer.cuda_ipc.device import Device
from distserve.transfer.gpu import GpuTransport
from distserve.transfer.sharded import ShardedTransport

logger = logging.getLogger(__name__)

_EXIT_UNAVAILABLE = 69


@dataclass(frozen=True, slots=True)
class Hardware:
    """What an instance computes and moves KV with; ``backend`` None: what the engine has for the plan's device."""

    device: Device
    backend: Backend | None = None


def cuda_hardware(device: str) -> Hardware:
    """The card ``device`` (``cuda`` or ``cuda:N``); raises ConfigError if there is none."""
    return Hardware(CudaDevice(torch.device(device).index or 0))


def gpu_transport(layout: KvLayout, shard: Shard, secret: bytes, device: Device) -> tuple[ShardedTransport, Tensor]:
    """The transport of a rank on ``device``, and its KV memory. Raises TransferError if there is no memory for it."""
    transport = GpuTransport(layout, device=device, secret=secret, clock=cluster_time, on_lost=_end_process)
    part = reshard.Shard(shard.parallel, shard.rank, shard.num_layers, shard.num_kv_heads)
    return ShardedTransport(transport, part), transport.pool


def _end_process(error: TransferError) -> None:
    """The device is lost: nothing may be reported any more, so the process ends at once, and is replaced."""
    logger.critical("the instance ends: %s", error)
    os._exit(_EXIT_UNAVAILABLE)
