"""Which part of a model one rank has, in sizes. Pure arithmetic over :mod:`distserve.core.shards`."""

from dataclasses import dataclass
from pathlib import Path

from distserve.core.config import KvConfig, KvLayout, ParallelConfig
from distserve.core.errors import ConfigError
from distserve.core.shards import check_shards, shard_heads, stage_layers
from distserve.engine.description import ModelDescription, describe_config, load_config

Span = tuple[int, int]
"""Rows ``[start, stop)`` of a dimension."""


@dataclass(frozen=True, slots=True)
class Shard:
    """Rank ``stage * tp + index`` of a ``parallel`` instance of a model with these sizes."""

    parallel: ParallelConfig
    rank: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int

    @property
    def stage(self) -> int:
        """Pipeline stage."""
        return self.rank // self.parallel.tp

    @property
    def index(self) -> int:
        """Shard within the stage."""
        return self.rank % self.parallel.tp

    @property
    def is_first(self) -> bool:
        """Whether the stage embeds the tokens."""
        return self.stage == 0

    @property
    def is_last(self) -> bool:
        """Whether the stage computes the logits."""
        return self.stage == self.parallel.pp - 1

    @property
    def samples(self) -> bool:
        """Whether the rank draws the instance's tokens."""
        return self.is_last and self.index == 0

    @property
    def layers(self) -> range:
        """The stage's layers, by their numbers in the model."""
        return stage_layers(self.num_layers, self.parallel.pp, self.stage)

    @property
    def kv_heads(self) -> range:
        """The shard's KV heads, by their numbers in the model."""
        return shard_heads(self.num_kv_heads, self.parallel.tp, self.index)

    @property
    def num_local_heads(self) -> int:
        """Query heads of the shard."""
        return self.num_heads // self.parallel.tp

    @property
    def query_rows(self) -> Span:
        """Rows of the query projection."""
        rows = self.num_local_heads * self.head_dim
        return (self.index * rows, (self.index + 1) * rows)

    @property
    def kv_rows(self) -> Span:
        """Rows of the key projection, and of the value projection."""
        return (self.kv_heads.start * self.head_dim, self.kv_heads.stop * self.head_dim)

    def even_rows(self, size: int, what: str) -> Span:
        """The shard's rows where ``size`` rows are split evenly.

        Raises:
            ConfigError: they cannot be; ``what`` names them.
        """
        rows, rest = divmod(size, self.parallel.tp)
        if rest:
            raise ConfigError(f"tp {self.parallel.tp} does not divide the {size} rows of the model's {what}")
        return (self.index * rows, (self.index + 1) * rows)

    def layout(self, kv: KvConfig, dtype: str) -> KvLayout:
        """KV memory of the rank: its own layers and heads."""
        return KvLayout(len(self.layers), kv.num_blocks, kv.block_size, len(self.kv_heads), self.head_dim, dtype)


def shard_of_model(model_dir: Path, parallel: ParallelConfig, rank: int) -> Shard:
    """As :func:`shard_of`, of the model in ``model_dir``; raises what :func:`describe_config` does, too."""
    config = load_config(model_dir)
    return shard_of(describe_config(config, model_dir), config.num_attention_heads, parallel, rank)


def shard_of(description: ModelDescription, num_heads: int, parallel: ParallelConfig, rank: int) -> Shard:
    """Rank ``rank``'s part of a model with ``num_heads`` query heads.

    Raises:
        ConfigError: the shape does not divide the model, in one sentence that says which number is in the way.
    """
    check_shards(parallel, description.num_layers, description.num_kv_heads)
    if num_heads % parallel.tp:
        raise ConfigError(f"tp {parallel.tp} does not divide the model's {num_heads} attention heads")
    assert 0 <= rank < parallel.num_ranks
    return Shard(parallel, rank, description.num_layers, num_heads, description.num_kv_heads, description.head_dim)
