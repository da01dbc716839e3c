"""Ranks that share a card, a fake or a real one: device, KV pool, transport, and an engine if there is a model."""

import os
import time

import torch

from distserve.core.config import KvConfig, KvLayout
from distserve.engine.description import describe
from distserve.engine.device.backend import HostBackend
from distserve.engine.worker import Worker
from distserve.transfer.cuda_ipc.cuda import CudaDevice
from distserve.transfer.cuda_ipc.pool import DevicePool
from distserve.transfer.cuda_ipc.transport import CudaIpcTransport
from tests.engine.harness import Harness
from tests.transfer.fake_device import LOST_STATUS, FakeDevice
from tests.transfer.pools import SECRET

KV = KvConfig(num_blocks=48, block_size=4)


class CardRank:
    """A rank on ``card`` ("fake" or "cuda"). Without a model its pool has ``layout``."""

    def __init__(self, card: str, *, layout: KvLayout | None = None, model: str | None = None) -> None:
        self.device = CudaDevice(0) if card == "cuda" else FakeDevice()
        self.layout = layout or describe(model).layout(KV, "float32")
        pool = DevicePool(self.layout, self.device)
        self.pool = pool.bytes
        self.transport = CudaIpcTransport(
            self.layout,
            device=self.device,
            secret=SECRET,
            clock=time.time,
            on_lost=lambda error: os._exit(LOST_STATUS),
            pool=pool,
        )
        if model:
            self.harness = Harness(
                Worker(
                    model,
                    kv=KV,
                    kv_buffer=self.pool,
                    device="cuda:0" if card == "cuda" else "cpu",
                    backend=HostBackend() if card == "fake" else None,
                )
            )

    def fill(self, seed: int) -> None:
        self.pool.copy_(pattern(self.layout, seed))
        if self.pool.is_cuda:
            torch.cuda.synchronize()


def pattern(layout: KvLayout, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(1, 256, (layout.num_bytes,), dtype=torch.uint8, generator=generator)
