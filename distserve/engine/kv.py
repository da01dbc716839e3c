"""The paged KV memory of one rank: tensors over one flat buffer, which may be shared with other processes."""

from collections.abc import Sequence

import torch
from torch import Tensor

from distserve.core.config import KvLayout

TORCH_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
"""Data types the engine computes in, by their names in configurations."""


class KvPool:
    """KV blocks of all layers. ``keys[l]`` and ``values[l]`` are layer l's caches, [N, P, K, D].

    Nothing here knows which block belongs to whom; which blocks are in use is the scheduler's business.
    """

    def __init__(self, layout: KvLayout, buffer: Tensor | None = None) -> None:
        """Lay ``layout`` over ``buffer`` (flat uint8, ``layout.num_bytes`` long), or over memory of its own."""
        if buffer is None:
            buffer = torch.zeros(layout.num_bytes, dtype=torch.uint8)
        assert buffer.dtype == torch.uint8
        assert buffer.numel() == layout.num_bytes
        self.layout = layout
        self.blocks = buffer.view(TORCH_DTYPES[layout.dtype]).view(layout.shape)
        self.keys = [layer[0] for layer in self.blocks]
        self.values = [layer[1] for layer in self.blocks]

    def copy(self, pairs: Sequence[tuple[int, int]]) -> None:
        """Copy blocks (source, destination) in all layers; no destination is another pair's source."""
        sources, destinations = (torch.tensor(ids) for ids in zip(*pairs, strict=True))
        self.blocks[:, :, destinations] = self.blocks[:, :, sources]
