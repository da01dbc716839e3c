"""A rank's part of a model, loaded: what host and device workers have in common."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from distserve.core.config import KvConfig, KvLayout, ParallelConfig
from distserve.engine.description import ModelDescription, describe_config, load_config
from distserve.engine.kv import KvPool
from distserve.engine.sharding.comm import Communicator
from distserve.engine.sharding.load import load_shard
from distserve.engine.sharding.meeting import Meeting
from distserve.engine.sharding.shard import Shard, shard_of
from distserve.engine.sharding.stage import StageModel


@dataclass(frozen=True, slots=True)
class LoadedPart:
    """What rank ``shard`` computes with."""

    description: ModelDescription
    shard: Shard
    comm: Communicator
    kv: KvPool
    model: StageModel


def load_part(
    model_dir: Path,
    *,
    dtype: str,
    kv: KvConfig,
    parallel: ParallelConfig,
    rank: int,
    meeting: Meeting,
    device: torch.device,
    timeout: float,
    make_pool: Callable[[KvLayout], KvPool],
) -> LoadedPart:
    """Load rank ``rank``'s part of the model in ``model_dir``, while the other ranks load theirs.

    Args:
        model_dir: a Hugging Face directory.
        dtype: of weights, activations and KV.
        kv: blocks of the pool, the same on all ranks.
        parallel: the instance's shape.
        rank: which rank this is.
        meeting: where they find each other.
        device: where to compute.
        timeout: seconds to wait for a rank that is alive but silent.
        make_pool: makes the rank's KV memory.

    Raises:
        ConfigError: the model directory is damaged, or the shape does not divide the model.
        UnsupportedModelError: the model can only be served by one rank.
        PeerError: another rank is gone.
    """
    config = load_config(model_dir)
    description = describe_config(config, model_dir)
    shard = shard_of(description, config.num_attention_heads, parallel, rank)
    comm = Communicator(shard, meeting, device=device, timeout=timeout)
    pool = make_pool(shard.layout(kv, dtype))
    module, cut = load_shard(config, model_dir, dtype, shard, comm)
    # NCCL's ranks meet at the first operation, and would wait for ever for one that is lost by then.
    comm.wait_for_all("loaded")
    return LoadedPart(description, shard, comm, pool, StageModel(module, cut, pool, comm, device))
