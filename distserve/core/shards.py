"""Which part of a model each rank of an instance has: its layers and its KV heads.

The one truth for the engine that loads the weights, the transfers that move the KV cache between shapes, and the
simulator that counts the bytes. Rank ``s * tp + t`` is shard ``t`` of pipeline stage ``s``.
"""

from distserve.core.config import ParallelConfig
from distserve.core.errors import ConfigError


def check_shards(parallel: ParallelConfig, num_layers: int, num_kv_heads: int) -> None:
    """Raise ConfigError unless every stage gets a layer and every shard a whole number of KV heads, or a whole one.

    So ``tp`` divides ``num_kv_heads``, or is a multiple of it (each head is then held by several shards).
    """
    if parallel.tp < 1 or parallel.pp < 1:
        raise ConfigError(f"tp and pp must be at least 1, not {parallel.tp} and {parallel.pp}")
    if parallel.pp > num_layers:
        raise ConfigError(f"pp {parallel.pp} is more than the model's {num_layers} layers")
    if num_kv_heads % parallel.tp and parallel.tp % num_kv_heads:
        raise ConfigError(
            f"tp {parallel.tp} does not divide the model's {num_kv_heads} KV heads, and is no multiple of them"
        )


def stage_layers(num_layers: int, pp: int, stage: int) -> range:
    """The layers of one pipeline stage: as even as can be, the first stages have the extra ones."""
    size, extra = divmod(num_layers, pp)
    start = stage * size + min(stage, extra)
    return range(start, start + size + (stage < extra))


def shard_heads(num_kv_heads: int, tp: int, shard: int) -> range:
    """The KV heads of one tensor-parallel shard; with more shards than heads, neighbours hold the same one."""
    if tp <= num_kv_heads:
        size = num_kv_heads // tp
        return range(shard * size, (shard + 1) * size)
    head = shard * num_kv_heads // tp
    return range(head, head + 1)
