"""The KV pool of a rank and the two rings beside it: packing out of the one, unpacking out of the other.

All kernels run on the device's stream for copies, on which no NCCL kernel ever is: what NCCL hangs in holds none up.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from distserve.core.config import KvLayout
from distserve.transfer.nccl.device import Completion, Device
from distserve_kernels.kv_pieces import pack_kv, packed_shape, unpack_kv

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class Staging:
    """``pool`` is flat uint8 of ``layout``, and not owned. A ring has ``num_slots`` slots of ``slot_bytes``."""

    def __init__(self, layout: KvLayout, pool: Tensor, device: Device, num_slots: int, slot_bytes: int) -> None:
        self._dtype = _DTYPES[layout.dtype]
        self._pool = pool.view(self._dtype).view(layout.shape)
        self._device = device
        # Rounded up, so that every slot starts at an address that suits the widest loads.
        stride = -(-slot_bytes // 256) * 256
        self.outgoing, self.incoming = (
            [ring[slot * stride :][:slot_bytes] for slot in range(num_slots)]
            for ring in (device.empty(num_slots * stride), device.empty(num_slots * stride))
        )

    def pack(self, slot: int, blocks: Sequence[int], layers: range, heads: range) -> Completion:
        """Gather into a slot of the outgoing ring."""
        with self._device.apart():
            buffer = self._buffer(self.outgoing[slot], len(blocks), layers, heads)
            pack_kv(self._pool, self._device.index(blocks), layers, heads, buffer)
            return self._device.record()

    def unpack(self, slot: int, blocks: Sequence[int], layers: range, heads: range) -> Completion:
        """Scatter a slot of the incoming ring into the pool."""
        with self._device.apart():
            buffer = self._buffer(self.incoming[slot], len(blocks), layers, heads)
            unpack_kv(buffer, self._pool, self._device.index(blocks), layers, heads)
            return self._device.record()

    def _buffer(self, slot: Tensor, num_blocks: int, layers: range, heads: range) -> Tensor:
        numel = torch.Size(packed_shape(self._pool, num_blocks, layers, heads)).numel()
        return slot.view(self._dtype)[:numel]
