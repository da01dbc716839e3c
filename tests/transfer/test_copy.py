import numpy as np
import pytest

from distserve.transfer.copy import copy_pieces, copy_pieces_with_numpy


@pytest.mark.parametrize("copy", [copy_pieces, copy_pieces_with_numpy])
@pytest.mark.parametrize("unit", [1, 48, 2048, 40_000, 100_000])
@pytest.mark.parametrize("longest_run", [1, 5])
def test_pieces_of_any_length_arrive_and_nothing_else_changes(unit, longest_run, copy):
    rng = np.random.default_rng(unit + longest_run)
    src = rng.integers(0, 256, 64 * unit + 5).astype(np.uint8)
    dst = rng.integers(0, 256, 80 * unit + 3).astype(np.uint8)
    want = dst.copy()
    src.flags.writeable = False
    pieces = []
    for slot in rng.permutation(16)[:9].tolist():
        length = int(rng.integers(1, longest_run + 1)) * unit
        from_ = int(rng.integers(0, 59)) * unit
        pieces.append((from_, slot * 5 * unit, length))
        want[slot * 5 * unit : slot * 5 * unit + length] = src[from_ : from_ + length]
    copy(src, dst, np.array(pieces))
    assert np.array_equal(dst, want)
