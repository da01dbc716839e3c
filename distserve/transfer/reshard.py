"""Who sends which layers and KV heads to whom when the shapes of a prefill and a decode instance differ.

Pure, and the one truth of it: transports move by it, the simulator counts bytes by it. Every rank of the destination
gets exactly the layers and heads it holds, each once; where several ranks of the source hold the same head
(``tp`` above the number of KV heads) one of them sends it, and those who need it spread over those who have it.
"""

from dataclasses import dataclass

from distserve.core.config import KvConfig, KvLayout, ParallelConfig
from distserve.core.shards import check_shards, shard_heads, stage_layers
from distserve.transfer.plan import Part


@dataclass(frozen=True, slots=True)
class KvShard:
    """The part of a model that one rank of an instance has: its layers and KV heads, counted within the model.

    ``num_layers`` and ``num_kv_heads`` are the whole model's. Raises ConfigError for a shape that the model cannot be
    cut into.
    """

    parallel: ParallelConfig
    rank: int
    num_layers: int
    num_kv_heads: int

    def __post_init__(self) -> None:
        check_shards(self.parallel, self.num_layers, self.num_kv_heads)
        assert 0 <= self.rank < self.parallel.num_ranks, f"rank {self.rank} of {self.parallel}"

    @property
    def layers(self) -> range:
        """The rank's layers."""
        return stage_layers(self.num_layers, self.parallel.pp, self.rank // self.parallel.tp)

    @property
    def heads(self) -> range:
        """The rank's KV heads."""
        return shard_heads(self.num_kv_heads, self.parallel.tp, self.rank % self.parallel.tp)

    def layout(self, kv: KvConfig, head_dim: int, dtype: str) -> KvLayout:
        """How the rank's KV memory is laid out."""
        return KvLayout(len(self.layers), kv.num_blocks, kv.block_size, len(self.heads), head_dim, dtype)


@dataclass(frozen=True, slots=True)
class Share:
    """What rank ``src_rank`` of the source sends to rank ``dst_rank`` of the destination, of every block.

    ``layers`` and ``heads`` count within the whole model. They are one contiguous range each.
    """

    src_rank: int
    dst_rank: int
    layers: range
    heads: range

    @property
    def num_cells(self) -> int:
        """Layers times heads: the share's size, in keys and values of one head of one layer."""
        return len(self.layers) * len(self.heads)


def reshard(src: ParallelConfig, dst: ParallelConfig, num_layers: int, num_kv_heads: int) -> tuple[Share, ...]:
    """The shares that make up a migration, by destination rank, then by layer and head.

    With equal shapes rank ``i`` sends everything to rank ``i``. Raises ConfigError for a shape that the model cannot
    be cut into.
    """
    for parallel in (src, dst):
        check_shards(parallel, num_layers, num_kv_heads)
    shares = []
    for dst_stage in range(dst.pp):
        for dst_shard in range(dst.tp):
            for src_stage in range(src.pp):
                layers = _common(
                    stage_layers(num_layers, dst.pp, dst_stage), stage_layers(num_layers, src.pp, src_stage)
                )
                if not layers:
                    continue
                # Stages of the destination that draw on one stage of the source start at different replicas.
                shift = dst_stage - _first_stage(stage_layers(num_layers, src.pp, src_stage)[0], num_layers, dst.pp)
                shares += [
                    Share(src_stage * src.tp + src_shard, dst_stage * dst.tp + dst_shard, layers, heads)
                    for src_shard, heads in _sources(src.tp, dst.tp, dst_shard, num_kv_heads, shift)
                ]
    return tuple(shares)


def parts(src: ParallelConfig, dst: KvShard) -> dict[int, Part]:
    """What ``dst`` pulls from each rank of an instance of shape ``src`` that sends it anything.

    Raises ConfigError for a shape that the model cannot be cut into.
    """
    found = {}
    for share in reshard(src, dst.parallel, dst.num_layers, dst.num_kv_heads):
        if share.dst_rank == dst.rank:
            source = KvShard(src, share.src_rank, dst.num_layers, dst.num_kv_heads)
            found[share.src_rank] = Part(
                len(source.layers),
                len(source.heads),
                _within(share.layers, source.layers),
                _within(share.heads, source.heads),
                _within(share.layers, dst.layers),
                _within(share.heads, dst.heads),
            )
    return found


def _sources(src_tp: int, dst_tp: int, dst_shard: int, num_kv_heads: int, shift: int) -> list[tuple[int, range]]:
    """The source's shards that send to ``dst_shard``, with the heads of each."""
    wanted = shard_heads(num_kv_heads, dst_tp, dst_shard)
    if src_tp <= num_kv_heads:
        heads_each = num_kv_heads // src_tp
        first, last = wanted[0] // heads_each, wanted[-1] // heads_each
        return [(shard, _common(wanted, shard_heads(num_kv_heads, src_tp, shard))) for shard in range(first, last + 1)]
    num_having = src_tp // num_kv_heads
    num_wanting = max(dst_tp // num_kv_heads, 1)
    replica = (dst_shard % num_wanting * num_having // num_wanting + shift) % num_having
    return [(head * num_having + replica, range(head, head + 1)) for head in wanted]


def _first_stage(layer: int, num_layers: int, pp: int) -> int:
    """The stage that has ``layer``."""
    return next(stage for stage in range(pp) if layer in stage_layers(num_layers, pp, stage))


def _within(some: range, whole: range) -> range:
    return range(some.start - whole.start, some.stop - whole.start)


def _common(a: range, b: range) -> range:
    return range(max(a.start, b.start), min(a.stop, b.stop))
