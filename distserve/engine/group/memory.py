"""Whether an instance has its devices, and they have room for weights and KV cache, before anything is started."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import psutil
import torch
from torch import distributed

from distserve.core.config import KvConfig, ParallelConfig
from distserve.core.errors import ConfigError
from distserve.engine.description import ModelDescription
from distserve.engine.sharding.shard import Shard


def check_devices(parallel: ParallelConfig, device: str, ranks: Sequence[int]) -> None:
    """Raise ConfigError unless there is a GPU for each of ``ranks``, those here of an instance that is on ``cuda``."""
    if device != "cuda":
        return
    if not torch.cuda.is_available():
        raise ConfigError("torch finds no CUDA device on this machine: compute on `cpu`, or install torch with CUDA")
    found = torch.cuda.device_count()
    if len(ranks) > found:
        raise ConfigError(
            f"an instance of tp {parallel.tp} and pp {parallel.pp} needs {len(ranks)} GPUs here, one for each rank; "
            f"this process sees {found}"
        )
    check_alike(parallel, {rank: torch.cuda.get_device_name(device) for device, rank in enumerate(ranks)})
    if parallel.num_ranks > 1 and not distributed.is_nccl_available():
        raise ConfigError("ranks on GPUs speak through NCCL, which this build of torch lacks: install torch with CUDA")


def check_alike(parallel: ParallelConfig, names: Mapping[int, str]) -> None:
    """Raise ConfigError if a stage has GPUs of several types, ``names`` by rank: its shards compute in step."""
    for stage in range(parallel.pp):
        kinds = sorted({name for rank, name in names.items() if rank // parallel.tp == stage})
        if len(kinds) > 1:
            raise ConfigError(
                f"stage {stage} of an instance of tp {parallel.tp} has different GPUs: {', '.join(kinds)}. Its "
                "shards compute in step and hold equal parts: give it GPUs that are alike (CUDA_VISIBLE_DEVICES)"
            )


def check_memory(
    description: ModelDescription,
    first: Shard,
    kv: KvConfig,
    dtype: str,
    device: torch.device,
    ranks: Sequence[int],
    *,
    has_kv: bool = False,
) -> None:
    """Raise ConfigError, saying how much is missing, unless the instance of rank ``first`` fits.

    On the CPU all ``ranks`` of the node share its memory; a GPU holds one rank, of which rank 0's is as large as any.
    There ``has_kv`` says that its KV memory is taken already.
    """
    weights = description.weight_bytes(dtype)
    if device.type == "cuda":
        room, _ = torch.cuda.mem_get_info(device)
        share = -(-weights // first.parallel.num_ranks)
        require(share, 0 if has_kv else first.layout(kv, dtype).num_bytes, room, f"rank 0 on {device}")
        return
    cache = sum(_kv_bytes(first, rank, kv, dtype) for rank in ranks)
    what = f"an instance of tp {first.parallel.tp} and pp {first.parallel.pp}"
    if len(ranks) < first.parallel.num_ranks:
        weights = -(-weights * len(ranks) // first.parallel.num_ranks)
        what += f", with {len(ranks)} of its ranks here,"
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
