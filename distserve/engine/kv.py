"""The paged KV memory of one rank: tensors over one flat buffer, which may be shared with other processes."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from distserve.core.config import KvLayout
from distserve.core.errors import ConfigError

TORCH_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
"""Data types the engine computes in, by their names in configurations."""
_NOT_ON_CPU = {"float16"}
_CPU = torch.device("cpu")


def check_dtype(dtype: str, *, on_cpu: bool) -> None:
    """Raise ConfigError unless the engine computes in ``dtype``."""
    known = [name for name in TORCH_DTYPES if not (on_cpu and name in _NOT_ON_CPU)]
    if dtype not in known:
        raise ConfigError(f"dtype {dtype!r} is not one of {', '.join(known)}" + (" on a CPU" if on_cpu else ""))


class KvPool:
    """KV blocks of all layers. ``keys[l]`` and ``values[l]`` are layer l's caches, [N, P, K, D].

    Nothing here knows which block belongs to whom; which blocks are in use is the scheduler's business.
    """

    def __init__(
        self, layout: KvLayout, buffer: Tensor | None = None, *, device: torch.device = _CPU, num_spare: int = 0
    ) -> None:
        """Lay ``layout`` over ``buffer`` (flat uint8, ``layout.num_bytes`` long), or over memory of its own.

        Memory of its own is on ``device``, and has ``num_spare`` blocks behind the layout's that no scheduler knows.
        """
        whole = replace(layout, num_blocks=layout.num_blocks + num_spare)
        if buffer is None:
            buffer = torch.zeros(whole.num_bytes, dtype=torch.uint8, device=device)
        assert buffer.dtype == torch.uint8
        assert buffer.numel() == whole.num_bytes
        self.layout = layout
        self.num_spare = num_spare
        self.blocks = buffer.view(TORCH_DTYPES[layout.dtype]).view(whole.shape)
        self.keys = [layer[0] for layer in self.blocks]
        self.values = [layer[1] for layer in self.blocks]

    def copy(self, pairs: Sequence[tuple[int, int]]) -> None:
        """Copy blocks (source, destination) in all layers; no destination is another pair's source."""
        self.copy_blocks(*(torch.tensor(ids) for ids in zip(*pairs, strict=True)))

    def copy_blocks(self, sources: Tensor, destinations: Tensor) -> None:
        """As :meth:`copy`, the pairs' halves as int64 tensors, where the blocks are."""
        self.blocks[:, :, destinations] = self.blocks[:, :, sources]
