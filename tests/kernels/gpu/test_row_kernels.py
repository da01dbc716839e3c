"""Norms, gate and rotary embedding on the GPU against their float64 definitions."""

import torch
from hypothesis import given
from hypothesis import strategies as st

import distserve_kernels
from distserve_kernels import reference
from distserve_kernels.gpu import gate, norm, rotary
from tests.kernels.gpu.checking import DTYPES, NAN, SEEDS, assert_matches, bits, examples, random


@examples(15)
@given(num_tokens=st.integers(0, 9), size=st.integers(1, 1100), dtype=DTYPES, seed=SEEDS)
def test_norms_and_gate(device, num_tokens, size, dtype, seed):
    x, residual = (t.to(device) for t in random(2, num_tokens, size, dtype=dtype, seed=seed))
    weight = random(size, dtype=dtype, seed=seed + 1).to(device)
    assert_matches(norm.rms_norm(x, weight, 1e-5), reference.rms_norm(x.double(), weight.double(), 1e-5))
    total = (x.double() + residual.double()).to(dtype)
    normed = norm.add_rms_norm(x, residual, weight, 1e-5)
    assert_matches(residual, total)
    assert_matches(normed, reference.rms_norm(residual.double(), weight.double(), 1e-5))
    gate_up = (random(num_tokens, 2 * size, dtype=dtype, seed=seed + 2) * 4).to(device)
    assert_matches(gate.silu_mul(gate_up), reference.silu_mul(gate_up.double()))


def test_rows_of_a_wider_tensor_and_their_neighbours(device):
    wide = torch.full((5, 40), NAN, device=device)
    wide[:, 8:32] = random(5, 24, dtype=torch.float32, seed=1)
    before = wide.clone()
    x, residual = random(5, 24, dtype=torch.float32, seed=2).to(device), wide[:, 8:32]
    weight = torch.ones(24, device=device)
    exact = x.double() + residual.double()
    assert_matches(norm.add_rms_norm(x, residual, weight, 1e-6), reference.rms_norm(exact, weight.double(), 1e-6))
    assert_matches(residual, exact)
    assert torch.equal(bits(wide[:, :8]), bits(before[:, :8]))
    assert torch.equal(bits(wide[:, 32:]), bits(before[:, 32:]))
    assert_matches(gate.silu_mul(residual), reference.silu_mul(residual.double()))
    assert_matches(norm.rms_norm(residual, weight, 1e-6), reference.rms_norm(residual.double(), weight.double(), 1e-6))


def test_the_gate_survives_extremes(device):
    gate_up = torch.tensor([[-300.0, 300.0, 0.0, -80.0, 1.0, 1.0, 1.0, 1.0]], dtype=torch.bfloat16, device=device)
    expected = torch.tensor([[0.0, 300.0, 0.0, 0.0]]).bfloat16()
    torch.testing.assert_close(gate.silu_mul(gate_up).cpu(), expected, rtol=0, atol=1e-30)


@examples(15)
@given(
    num_tokens=st.integers(0, 9),
    heads=st.integers(1, 9),
    head_dim=st.sampled_from([16, 48, 64, 128]),
    rotary_share=st.sampled_from([1.0, 0.5, 0.25]),
    dtype=DTYPES,
    seed=SEEDS,
)
def test_rotation(device, num_tokens, heads, head_dim, rotary_share, dtype, seed):
    x = random(heads, num_tokens, head_dim, dtype=dtype, seed=seed).transpose(0, 1)
    angles = random(num_tokens, int(head_dim * rotary_share) // 2, dtype=torch.float32, seed=seed + 1)
    cos, sin = angles.cos().repeat(1, 2), angles.sin().repeat(1, 2)
    exact = reference.rope(x.double(), cos.double(), sin.double())
    assert_matches(rotary.rope(x.to(device), cos.to(device), sin.to(device)), exact)


@examples(20)
@given(
    num_tokens=st.integers(1, 9),
    heads=st.sampled_from([(1, 1), (6, 2), (5, 1), (32, 8)]),
    head_dim=st.sampled_from([16, 48, 64, 128]),
    rotary_share=st.sampled_from([1.0, 0.5]),
    block_size=st.sampled_from([4, 16]),
    normed=st.booleans(),
    padded=st.booleans(),
    dtype=DTYPES,
    seed=SEEDS,
)
def test_rotary_write(device, num_tokens, heads, head_dim, rotary_share, block_size, normed, padded, dtype, seed):
    num_heads, num_kv_heads = heads
    qkv = random(num_tokens, (num_heads + 2 * num_kv_heads) * head_dim, dtype=dtype, seed=seed)
    angles = random(num_tokens, int(head_dim * rotary_share) // 2, dtype=torch.float32, seed=seed + 1)
    cos, sin = angles.cos().repeat(1, 2), angles.sin().repeat(1, 2)
    norms = random(2, head_dim, dtype=dtype, seed=seed + 2) if normed else [None, None]
    generator = torch.Generator().manual_seed(seed)
    num_blocks = num_tokens // block_size + 2
    slots = torch.randperm(num_blocks * block_size, generator=generator)[:num_tokens]
    shape = (num_blocks, block_size, num_kv_heads, head_dim)
    exact_caches = [torch.full(shape, NAN, dtype=torch.float64) for _ in range(2)]
    exact = reference.rope_and_write_kv(
        qkv.double(), cos.double(), sin.double(), *exact_caches, slots, num_heads,
        q_norm=norms[0].double() if normed else None, k_norm=norms[1].double() if normed else None, eps=1e-5,
    )  # fmt: skip
    if padded:
        for cache in exact_caches:
            cache[slots[-1] // block_size, slots[-1] % block_size] = NAN
        slots[-1] = -1
    caches = [torch.full(shape, NAN, dtype=dtype, device=device) for _ in range(2)]
    on_device = [None if norm is None else norm.to(device) for norm in norms]
    q = rotary.rope_and_write_kv(
        qkv.to(device), cos.to(device), sin.to(device), *caches, slots.to(device), num_heads,
        q_norm=on_device[0], k_norm=on_device[1], eps=1e-5,
    )  # fmt: skip
    assert_matches(q, exact)
    for cache, exact_cache in zip(caches, exact_caches, strict=True):
        written = ~exact_cache.isnan()
        assert torch.equal(cache.isnan().cpu(), ~written)
        assert_matches(cache.cpu()[written], exact_cache[written])


def test_the_public_functions_hand_tensors_over(device, monkeypatch):
    monkeypatch.setattr("distserve_kernels.ops.runs_here", lambda *_: True)
    x, weight = random(3, 32, dtype=torch.float32, seed=1), random(32, dtype=torch.float32, seed=2)
    on_device = x.to(device), weight.to(device)
    assert_matches(distserve_kernels.rms_norm(*on_device, 1e-6), reference.rms_norm(x, weight, 1e-6))
    residual = torch.ones(3, 32, device=device)
    normed = distserve_kernels.add_rms_norm(on_device[0], residual, on_device[1], 1e-6)
    assert_matches(normed, reference.rms_norm(x + 1, weight, 1e-6))
    assert_matches(residual, x + 1)
    assert_matches(distserve_kernels.silu_mul(on_device[0]), reference.silu_mul(x))
    heads, cos, sin = x.view(3, 2, 16), x[:, :16].cos(), x[:, :16].sin()
    assert_matches(
        distserve_kernels.rope(heads.to(device), cos.to(device), sin.to(device)), reference.rope(heads, cos, sin)
    )
    caches, exact_caches = torch.zeros(2, 1, 4, 1, 16, device=device), torch.zeros(2, 1, 4, 1, 16)
    qkv, slots = random(3, 48, dtype=torch.float32, seed=3), torch.tensor([2, 0, 1])
    exact = reference.rope_and_write_kv(qkv, cos, sin, *exact_caches, slots, 1)
    arguments = (qkv.to(device), cos.to(device), sin.to(device), *caches, slots.to(device), 1)
    assert_matches(distserve_kernels.rope_and_write_kv(*arguments), exact)
    assert_matches(caches, exact_caches)
    distserve_kernels.write_kv(*(torch.zeros(3, 1, 16, device=device),) * 2, *caches, slots.to(device))
    assert not caches.any()
