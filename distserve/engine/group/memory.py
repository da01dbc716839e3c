"""Whether an instance's weights and KV cache have room where they are to go, before anything is started for them."""

from dataclasses import replace

import psutil
import torch

from distserve.core.config import KvConfig
from distserve.core.errors import ConfigError
from distserve.engine.description import ModelDescription
from distserve.engine.sharding.shard import Shard


def check_memory(description: ModelDescription, first: Shard, kv: KvConfig, dtype: str, device: torch.device) -> None:
    """Raise ConfigError, saying how much is missing, unless the instance of rank ``first`` fits.

    On the CPU all ranks share the host's memory; a GPU holds one rank, of which rank 0's is as large as any.
    """
    weights = description.weight_bytes(dtype)
    if device.type == "cuda":
        room, _ = torch.cuda.mem_get_info(device)
        share = -(-weights // first.parallel.num_ranks)
        require(share, first.layout(kv, dtype).num_bytes, room, f"rank 0 on {device}")
        return
    cache = sum(_kv_bytes(first, rank, kv, dtype) for rank in range(first.parallel.num_ranks))
    what = f"an instance of tp {first.parallel.tp} and pp {first.parallel.pp}"
    require(weights, cache, psutil.virtual_memory().available, what)


def require(weights: int, cache: int, room: int, what: str) -> None:
    """Raise ConfigError if ``weights`` and ``cache`` (bytes) of ``what`` are more than ``room``."""
    missing = weights + cache - room
    if missing > 0:
        raise ConfigError(
            f"{what} needs {_size(weights)} for weights and {_size(cache)} for its KV cache, and {_size(room)} are "
            f"free: {_size(missing)} are missing; give it fewer KV blocks or more ranks with memory of their own"
        )


def _kv_bytes(first: Shard, rank: int, kv: KvConfig, dtype: str) -> int:
    return replace(first, rank=rank).layout(kv, dtype).num_bytes


def _size(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:.1f} GiB" if num_bytes >= 2**30 else f"{num_bytes / 2**20:.1f} MiB"
