"""The order of a pull's bytes: alike at both ends of a wire, whoever is faster."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from distserve.core.config import KvLayout
from distserve.core.errors import TransferError
from distserve.transfer.plan import stream_pieces
from distserve.transfer.stream import Stream, pause

LAYOUT = KvLayout(num_layers=3, num_blocks=8, block_size=2, num_kv_heads=2, head_dim=2, dtype="float16")


@given(
    st.permutations(range(8)),
    st.permutations(range(8)),
    st.integers(0, 8),
    st.integers(0, 8),
    st.sampled_from([8, 24, 64, 1000]),
    st.lists(st.integers(0, 3), max_size=20),
)
def test_both_ends_cut_alike_whatever_the_places_of_the_blocks(src, dst, count, num_ready, max_bytes, steps):
    """One side has one of two heads in rows, the other has a whole block, and the step passes layers at will."""
    narrow = replace(LAYOUT, num_kv_heads=1)
    num_ready = min(num_ready, count)

    def stream(blocks, layout, heads):
        pieces = (stream_pieces(some, layout, heads) for some in (blocks[:num_ready], blocks[num_ready:count]))
        return Stream(*pieces, LAYOUT.num_layers, max_bytes)

    sender, receiver = stream(src, LAYOUT, range(1, 2)), stream(dst, narrow, range(1))
    assert sender.num_bytes == receiver.num_bytes == count * narrow.block_bytes * 2 * narrow.num_layers
    moved, passed, left = 0, 0, iter([*sorted(steps), 3])
    while not sender.is_done:
        sent = sender.next(passed)
        if sent is None:
            assert sender.waits
            passed = next(left)
            continue
        got = receiver.take(len(sent.planes))
        assert (got.planes, got.num_bytes) == (sent.planes, sent.num_bytes)
        assert sent.num_bytes <= max_bytes
        assert got.pieces[0, 1] == sent.pieces[0, 1], "the portion starts elsewhere in the plane"
        if sender.waits and num_ready == 0:
            assert max(sent.planes) < 2 * passed
        moved += sent.num_bytes
    assert receiver.is_done
    assert moved == sender.num_bytes


def test_what_cannot_follow_is_refused():
    pieces = stream_pieces(range(4), LAYOUT, range(2))
    stream = Stream(pieces, pieces[:0], 3, max_bytes=int(4 * pieces[:, 2].sum()))
    for wrong in (0, 5):
        with pytest.raises(TransferError, match="not what was asked for"):
            stream.take(wrong)
    stream.take(4)
    with pytest.raises(TransferError, match="more than was asked for"):
        stream.take(3)
    stream.take(2)
    with pytest.raises(TransferError, match="not what was asked for"):
        stream.take(1)


@given(st.integers(0, 80), st.floats(0, 100))
def test_looks_get_rarer_within_bounds_and_are_frequent_for_the_last_layer(missing, waited):
    assert 50e-6 <= pause(missing, waited) <= (500e-6 if missing <= 1 else 4e-3)
