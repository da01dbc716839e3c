"""Packing KV for a migration, as every device does it."""

import pytest
import torch

from distserve_kernels import pack_kv, packed_shape, unpack_kv

POOL = torch.arange(3 * 2 * 5 * 4 * 6 * 8, dtype=torch.float32).view(3, 2, 5, 4, 6, 8)


def test_a_round_trip_into_another_head_split():
    blocks = torch.tensor([4, 1, 2], dtype=torch.int32)
    packed = pack_kv(POOL, blocks, range(1, 3), range(2, 4))
    assert packed.shape == packed_shape(POOL, 3, range(1, 3), range(2, 4)) == (2, 2, 3, 4, 2, 8)
    assert torch.equal(packed[1, 0, 2, 3, 1], POOL[2, 0, 2, 3, 3])
    target = torch.full((2, 2, 7, 4, 2, 8), float("nan"))
    unpack_kv(packed, target, torch.tensor([0, 6, 3]), range(2), range(2))
    assert torch.equal(target[:, :, [0, 6, 3]], packed)
    assert target[:, :, [1, 2, 4, 5]].isnan().all()


def test_what_does_not_fit_is_refused():
    blocks = torch.tensor([0])
    with pytest.raises(ValueError, match="heads"):
        pack_kv(POOL, blocks, range(1), range(5, 7))
    with pytest.raises(ValueError, match="layers"):
        pack_kv(POOL, blocks, range(0, 3, 2), range(1))
    with pytest.raises(ValueError, match="contiguous, 64 elements"):
        pack_kv(POOL, blocks, range(1), range(1), torch.empty(65))
    with pytest.raises(ValueError, match="float32"):
        unpack_kv(torch.empty(64).half(), POOL.clone(), blocks, range(1), range(1))
    with pytest.raises(ValueError, match="a pool is"):
        pack_kv(POOL.transpose(4, 5), blocks, range(1), range(1))
