from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from distserve.core.config import ParallelConfig
from distserve.core.errors import ConfigError
from distserve.core.shards import shard_heads, stage_layers
from distserve.transfer.reshard import Share, reshard


@st.composite
def shapes(draw: st.DrawFn) -> tuple[int, int, ParallelConfig, ParallelConfig]:
    heads = draw(st.sampled_from([1, 2, 3, 4, 6, 8, 12]))
    layers = draw(st.integers(1, 13))
    degrees = [tp for tp in range(1, 17) if heads % tp == 0 or tp % heads == 0]
    one = st.builds(ParallelConfig, tp=st.sampled_from(degrees), pp=st.integers(1, layers))
    return layers, heads, draw(one), draw(one)


def cells(layers: range, heads: range) -> set[tuple[int, int]]:
    return {(layer, head) for layer in layers for head in heads}


def held(parallel: ParallelConfig, rank: int, num_layers: int, num_heads: int) -> set[tuple[int, int]]:
    stage, shard = divmod(rank, parallel.tp)
    return cells(stage_layers(num_layers, parallel.pp, stage), shard_heads(num_heads, parallel.tp, shard))


@given(shapes())
def test_every_rank_gets_what_it_holds_once_from_ranks_that_hold_it(
    shape: tuple[int, int, ParallelConfig, ParallelConfig],
) -> None:
    num_layers, num_heads, src, dst = shape
    shares = reshard(src, dst, num_layers, num_heads)
    got: dict[int, Counter[tuple[int, int]]] = {rank: Counter() for rank in range(dst.num_ranks)}
    for share in shares:
        moved = cells(share.layers, share.heads)
        assert share.num_cells == len(moved) > 0
        assert moved <= held(src, share.src_rank, num_layers, num_heads)
        got[share.dst_rank].update(moved)
    for rank, counts in got.items():
        assert counts == Counter(held(dst, rank, num_layers, num_heads))
    # All bytes: what the destination holds, replicas included.
    copies = max(dst.tp // num_heads, 1)
    assert sum(share.num_cells for share in shares) == num_layers * num_heads * copies


@given(shapes())
def test_pairs_are_named_once_per_range(shape: tuple[int, int, ParallelConfig, ParallelConfig]) -> None:
    num_layers, num_heads, src, dst = shape
    pairs = Counter((share.src_rank, share.dst_rank) for share in reshard(src, dst, num_layers, num_heads))
    assert set(pairs.values()) == {1}


@given(shapes())
def test_equal_shapes_send_rank_to_rank(shape: tuple[int, int, ParallelConfig, ParallelConfig]) -> None:
    num_layers, num_heads, src, _ = shape
    assert [(share.src_rank, share.dst_rank) for share in reshard(src, src, num_layers, num_heads)] == [
        (rank, rank) for rank in range(src.num_ranks)
    ]


@given(st.integers(1, 100), st.integers(1, 20))
def test_stages_are_even_contiguous_and_the_first_have_more(num_layers: int, pp: int) -> None:
    stages = [stage_layers(num_layers, pp, stage) for stage in range(pp)]
    assert [layer for stage in stages for layer in stage] == list(range(num_layers))
    sizes = [len(stage) for stage in stages]
    assert sizes == sorted(sizes, reverse=True)
    assert max(sizes) - min(sizes) <= 1


@given(shapes())
def test_replicas_of_a_head_share_the_sending(shape: tuple[int, int, ParallelConfig, ParallelConfig]) -> None:
    num_layers, num_heads, src, dst = shape
    for stage in range(dst.pp):
        sent: Counter[tuple[int, int]] = Counter()
        for share in reshard(src, dst, num_layers, num_heads):
            if share.dst_rank // dst.tp == stage and src.tp > num_heads:
                sent[share.src_rank, share.layers.start] += 1
        num_having, num_wanting = max(src.tp // num_heads, 1), max(dst.tp // num_heads, 1)
        assert max(sent.values(), default=0) <= -(-num_wanting // num_having)


def test_the_papers_66b_shape() -> None:
    # Four shards of 18 heads become two stages of two shards of 36 heads; 64 layers.
    shares = reshard(ParallelConfig(4, 1), ParallelConfig(2, 2), 64, 72)
    assert shares[:2] == (Share(0, 0, range(32), range(18)), Share(1, 0, range(32), range(18, 36)))
    assert len(shares) == 8


@pytest.mark.parametrize("bad", [ParallelConfig(3, 1), ParallelConfig(1, 5), ParallelConfig(6, 1)])
def test_impossible_shapes_are_refused(bad: ParallelConfig) -> None:
    with pytest.raises(ConfigError, match=r"KV heads|layers"):
        reshard(ParallelConfig(), bad, 4, 4)
