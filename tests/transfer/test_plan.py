import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from distserve.core.config import KvLayout
from distserve.core.errors import TransferError
from distserve.transfer.plan import layout_difference, plane_bytes, plane_pieces, portions


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


@given(block_lists(), st.integers(1, 100))
def test_pieces_are_the_brute_force_scatter(lists, max_bytes):
    num_src, num_dst, src_blocks, dst_blocks = lists
    src, dst = layout(num_src), layout(num_dst)
    source = np.random.default_rng(0).integers(0, 256, src.num_bytes).astype(np.uint8)
    got = np.zeros(dst.num_bytes, dtype=np.uint8)
    want = got.copy()

    def blocks_of(memory, of):
        return memory.reshape(of.num_layers, 2, of.num_blocks, of.block_bytes)

    for s, d in zip(src_blocks, dst_blocks, strict=True):
        blocks_of(want, dst)[:, :, d] = blocks_of(source, src)[:, :, s]
    written = np.zeros(dst.num_bytes, dtype=int)
    cut = portions(plane_pieces(src_blocks, dst_blocks, src, dst), max_bytes)
    for plane in range(2 * src.num_layers):
        for offset, to, length in np.concatenate([np.empty((0, 3), dtype=int), *cut]).tolist():
            src_start, dst_start = plane * plane_bytes(src) + offset, plane * plane_bytes(dst) + to
            got[dst_start : dst_start + length] = source[src_start : src_start + length]
            written[dst_start : dst_start + length] += 1
    assert np.array_equal(got, want)
    assert written.max(initial=0) <= 1, "a byte is written twice"
    assert written.sum() == src.num_layers * 2 * len(src_blocks) * src.block_bytes
    for portion in cut:
        assert 0 < portion[:, 2].sum() < 2 * max_bytes


@given(block_lists())
def test_pieces_are_as_long_as_can_be(lists):
    num_src, num_dst, src_blocks, dst_blocks = lists
    pieces = plane_pieces(src_blocks, dst_blocks, layout(num_src), layout(num_dst)).tolist()
    for (s, d, n), (next_s, next_d, _) in itertools.pairwise(pieces):
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
        plane_pieces(src_blocks, dst_blocks, layout(4), layout(8))


def test_layouts_may_differ_in_pool_size_only():
    assert layout_difference(layout(3), layout(9)) is None
    assert layout_difference(layout(3, num_layers=2), layout(3)) == "num_layers 3 there, 2 here"
