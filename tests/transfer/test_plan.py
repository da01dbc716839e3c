import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from distserve.core.config import KvLayout
from distserve.core.errors import TransferError
from distserve.transfer.plan import batches, block_runs, layer_pieces, layout_difference


@st.composite
def block_lists(draw: st.DrawFn) -> tuple[int, int, list[int], list[int]]:
    """Pool sizes and equally long lists of distinct blocks, made of ascending stretches so that runs occur."""
    num_src, num_dst = draw(st.integers(1, 40)), draw(st.integers(1, 40))
    lists = []
    for num_blocks in (num_src, num_dst):
        starts = draw(st.lists(st.integers(0, num_blocks - 1), max_size=6))
        lengths = draw(st.lists(st.integers(1, 8), min_size=len(starts), max_size=len(starts)))
        blocks = [b for start, n in zip(starts, lengths, strict=True) for b in range(start, min(start + n, num_blocks))]
        lists.append(list(dict.fromkeys(blocks)))
    count = min(len(lists[0]), len(lists[1]))
    return num_src, num_dst, lists[0][:count], lists[1][:count]


def layout(num_blocks: int, num_layers: int = 3) -> KvLayout:
    return KvLayout(num_layers, num_blocks, block_size=2, num_kv_heads=1, head_dim=3, dtype="float16")


@given(block_lists(), st.integers(0, 3), st.integers(0, 3), st.integers(1, 100))
def test_pieces_are_the_brute_force_scatter(lists, first_layer, num_layers, max_bytes):
    num_src, num_dst, src_blocks, dst_blocks = lists
    end_layer = min(first_layer + num_layers, 3)
    src, dst = layout(num_src), layout(num_dst)
    source = np.random.default_rng(0).integers(0, 256, src.num_bytes).astype(np.uint8)
    got = np.zeros(dst.num_bytes, dtype=np.uint8)
    want = got.copy()

    def blocks_of(memory, of):
        return memory.reshape(of.num_layers, 2, of.num_blocks, of.block_bytes)

    for layer in range(first_layer, end_layer):
        for s, d in zip(src_blocks, dst_blocks, strict=True):
            blocks_of(want, dst)[layer, :, d] = blocks_of(source, src)[layer, :, s]
    written = np.zeros(dst.num_bytes, dtype=int)
    pieces = layer_pieces(block_runs(src_blocks, dst_blocks, num_src, num_dst), src, dst, first_layer, end_layer)
    cut = batches(pieces, max_bytes)
    for from_, to, length in np.concatenate([np.empty((0, 3), dtype=int), *cut]).tolist():
        got[to : to + length] = source[from_ : from_ + length]
        written[to : to + length] += 1
    assert np.array_equal(got, want)
    assert written.max(initial=0) <= 1, "a byte is written twice"
    assert written.sum() == max(0, end_layer - first_layer) * 2 * len(src_blocks) * src.block_bytes
    for batch in cut:
        assert 0 < batch[:, 2].sum() < 2 * max_bytes


@given(block_lists())
def test_runs_are_maximal_and_cover_the_lists(lists):
    num_src, num_dst, src_blocks, dst_blocks = lists
    runs = block_runs(src_blocks, dst_blocks, num_src, num_dst).tolist()
    assert [s + i for s, _, n in runs for i in range(n)] == src_blocks
    assert [d + i for _, d, n in runs for i in range(n)] == dst_blocks
    for (s, d, n), (next_s, next_d, _) in itertools.pairwise(runs):
        assert (s + n, d + n) != (next_s, next_d)


@pytest.mark.parametrize(
    ("src_blocks", "dst_blocks", "says"),
    [
        ((1, 2), (1,), "2 source blocks cannot go into 1"),
        ((1, 4), (1, 2), r"source blocks 1\.\.4 are not all within 0\.\.3"),
        ((1, -1), (1, 2), "source blocks -1"),
        ((1, 2), (1, 9), r"destination blocks 1\.\.9 .* 0\.\.7"),
    ],
)
def test_impossible_lists_are_refused(src_blocks, dst_blocks, says):
    with pytest.raises(TransferError, match=says):
        block_runs(src_blocks, dst_blocks, 4, 8)


def test_layouts_may_differ_in_pool_size_only():
    assert layout_difference(layout(3), layout(9)) is None
    assert layout_difference(layout(3, num_layers=2), layout(3)) == "num_layers 3 there, 2 here"
