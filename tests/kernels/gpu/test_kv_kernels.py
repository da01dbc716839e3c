"""KV write, pack and unpack on the GPU: exact, and no byte beside what was asked for."""

from dataclasses import dataclass

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import distserve_kernels
from distserve_kernels import pack_kv, reference, unpack_kv
from distserve_kernels.gpu.kv_write import write_kv
from tests.kernels.gpu.checking import DTYPES, NAN, SEEDS, bits, examples, random


@examples(15)
@given(
    num_tokens=st.integers(0, 9),
    heads=st.integers(1, 5),
    head_dim=st.sampled_from([8, 48, 128]),
    padded=st.booleans(),
    dtype=DTYPES,
    seed=SEEDS,
)
def test_write(device, num_tokens, heads, head_dim, padded, dtype, seed):
    k, v = random(2, heads, num_tokens, head_dim, dtype=dtype, seed=seed).transpose(1, 2)
    slots = torch.randperm(32, generator=torch.Generator().manual_seed(seed))[:num_tokens]
    expected = torch.full((4, 2, 8, heads, head_dim), NAN, dtype=dtype)
    kept = slice(0, num_tokens - 1) if padded else slice(0, num_tokens)
    reference.write_kv(k[kept], v[kept], expected[:, 0], expected[:, 1], slots[kept])
    if padded and num_tokens:
        slots[-1] = -1
    caches = torch.full_like(expected, NAN, device=device)
    write_kv(k.to(device), v.to(device), caches[:, 0], caches[:, 1], slots.to(device))
    assert torch.equal(bits(caches), bits(expected))


@dataclass(frozen=True)
class Migration:
    """Pools of two ranks of a model, and the ranges of each that stand for the same layers and heads."""

    num_heads: tuple[int, int]
    layers: tuple[range, range]
    heads: tuple[range, range]
    blocks: tuple[list[int], list[int]]


@st.composite
def migrations(draw: st.DrawFn) -> Migration:
    """Two head splits of the same model, other layers, other blocks."""
    num_layers, num_heads, num_blocks = draw(st.integers(0, 3)), draw(st.integers(1, 4)), draw(st.integers(0, 4))
    layers, heads, all_heads = [], [], []
    for _ in range(2):
        first_layer, first_head = draw(st.integers(0, 3 - num_layers)), draw(st.integers(0, 2))
        layers.append(range(first_layer, first_layer + num_layers))
        heads.append(range(first_head, first_head + num_heads))
        all_heads.append(first_head + num_heads + draw(st.integers(0, 1)))
    blocks = [draw(st.permutations(range(6)))[:num_blocks] for _ in range(2)]
    return Migration(tuple(all_heads), tuple(layers), tuple(heads), tuple(blocks))


@examples(40)
@given(
    migration=migrations(),
    head_dim=st.sampled_from([4, 17, 64, 128]),
    block_size=st.sampled_from([1, 3, 16]),
    index=st.sampled_from([torch.int32, torch.int64]),
    dtype=DTYPES,
    seed=SEEDS,
)
def test_pack_and_unpack_move_what_was_chosen_and_nothing_else(
    device, migration, head_dim, block_size, index, dtype, seed
):
    generator = torch.Generator().manual_seed(seed)
    size = {torch.float32: 2}.get(dtype, 1)
    words = [
        torch.randint(-(2**15), 2**15, (3, 2, 6, block_size, heads, head_dim * size), generator=generator).short()
        for heads in migration.num_heads
    ]
    # Any bits, NaNs among them: bytes are moved, not numbers.
    source, target = (pool.view(dtype) for pool in words)
    src_blocks, dst_blocks = (torch.tensor(blocks, dtype=index) for blocks in migration.blocks)
    chosen = source[migration.layers[0].start : migration.layers[0].stop]
    chosen = chosen[:, :, src_blocks.long()][..., migration.heads[0].start : migration.heads[0].stop, :]
    expected = target.clone()
    part = expected[migration.layers[1].start : migration.layers[1].stop]
    part[:, :, dst_blocks.long(), :, migration.heads[1].start : migration.heads[1].stop] = chosen

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("distserve_kernels.kv_pieces.runs_here", lambda *_: True)
        ring = torch.full((chosen.numel() + 8,), 7.0, dtype=dtype, device=device)
        inside = ring[4 : chosen.numel() + 4]
        packed = pack_kv(source.to(device), src_blocks.to(device), migration.layers[0], migration.heads[0], inside)
        assert packed is inside
        assert torch.equal(bits(packed), bits(chosen).flatten())
        assert torch.equal(ring[:4].cpu(), torch.full((4,), 7.0, dtype=dtype))
        assert torch.equal(ring[-4:].cpu(), torch.full((4,), 7.0, dtype=dtype))
        target = target.to(device)
        unpack_kv(packed, target, dst_blocks.to(device), migration.layers[1], migration.heads[1])
    assert torch.equal(bits(target), bits(expected))


def test_packed_on_one_device_unpacked_on_another(device, monkeypatch):
    pool = random(2, 2, 5, 4, 3, 8, dtype=torch.bfloat16, seed=1)
    blocks = torch.tensor([4, 0])
    by_torch = pack_kv(pool, blocks, range(1, 2), range(1, 3))
    assert by_torch.shape == distserve_kernels.packed_shape(pool, 2, range(1, 2), range(1, 3))
    monkeypatch.setattr("distserve_kernels.kv_pieces.runs_here", lambda *_: True)
    by_kernel = pack_kv(pool.to(device), blocks.to(device), range(1, 2), range(1, 3))
    assert torch.equal(by_kernel.cpu(), by_torch)
