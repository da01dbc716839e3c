import numpy as np
import pytest

from distserve.transfer import copy


@pytest.mark.parametrize("way", ["cached", "streaming", "numpy"])
@pytest.mark.parametrize("unit", [1, 48, 2048, 40_000, 70_000])
@pytest.mark.parametrize("longest_run", [1, 5])
@pytest.mark.parametrize("planes", [range(1), range(1, 4)])
def test_pieces_of_any_length_arrive_and_nothing_else_changes(unit, longest_run, planes, way, monkeypatch):
    rng = np.random.default_rng(unit + longest_run)
    src_stride, dst_stride = 64 * unit, 81 * unit
    src = rng.integers(0, 256, planes.stop * src_stride + 5).astype(np.uint8)
    dst = rng.integers(0, 256, planes.stop * dst_stride + 3).astype(np.uint8)
    want = dst.copy()
    src.flags.writeable = False
    pieces = []
    for slot in rng.permutation(16)[:9].tolist():
        length = int(rng.integers(1, longest_run + 1)) * unit
        offset, to = int(rng.integers(0, 59)) * unit, slot * 5 * unit
        pieces.append((offset, to, length))
        for plane in planes:
            piece = src[plane * src_stride + offset :][:length]
            want[plane * dst_stride + to :][:length] = piece
    monkeypatch.setattr(copy, "_CACHED_BYTES", 0 if way == "streaming" else dst.size)
    copy_pieces = copy.copy_pieces_with_numpy if way == "numpy" else copy.copy_pieces
    copy_pieces(src, dst, np.array(pieces), planes, src_stride, dst_stride)
    assert np.array_equal(dst, want)
