"""Norms, gates, rotary writes and linear layers against their float64 definitions."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from distserve_kernels import (
    PackedLinear,
    add_rms_norm,
    reference,
    rms_norm,
    rope_and_write_kv,
    silu_mul,
    write_kv,
)

DTYPES = st.sampled_from([torch.float32, torch.bfloat16])
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2}


def assert_matches(actual: Tensor, exact: Tensor) -> None:
    tolerance = TOLERANCE[actual.dtype]
    torch.testing.assert_close(actual.double(), exact.double(), rtol=tolerance, atol=tolerance)


def random(*shape: int, dtype: torch.dtype, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@settings(max_examples=30, deadline=None)
@given(num_tokens=st.integers(1, 40), size=st.integers(1, 300), dtype=DTYPES, seed=st.integers(0, 2**31))
def test_norms_and_gate(num_tokens, size, dtype, seed):
    x, residual = random(2, num_tokens, size, dtype=dtype, seed=seed)
    weight = random(size, dtype=dtype, seed=seed + 1)
    assert_matches(rms_norm(x, weight, 1e-5), reference.rms_norm(x.double(), weight.double(), 1e-5))
    total = x.double() + residual.double()
    normed = add_rms_norm(x, residual, weight, 1e-5)
    assert_matches(residual, total)
    assert_matches(normed, reference.rms_norm(residual.double(), weight.double(), 1e-5))
    gate_up = random(num_tokens, 2 * size, dtype=dtype, seed=seed + 2) * 4
    assert_matches(silu_mul(gate_up), reference.silu_mul(gate_up.double()))


def test_the_gate_survives_extremes():
    gate_up = torch.tensor([[-300.0, 300.0, 0.0, -80.0, 1.0, 1.0, 1.0, 1.0]], dtype=torch.bfloat16)
    gated = silu_mul(gate_up)
    torch.testing.assert_close(gated, torch.tensor([[0.0, 300.0, 0.0, 0.0]]).bfloat16(), rtol=0, atol=1e-30)


@settings(max_examples=30, deadline=None)
@given(
    num_tokens=st.integers(1, 40),
    heads=st.sampled_from([(1, 1), (6, 2), (5, 1)]),
    head_dim=st.sampled_from([16, 32, 64, 96, 128]),
    rotary_share=st.sampled_from([1.0, 0.5, 0.25]),
    block_size=st.sampled_from([4, 16]),
    normed=st.booleans(),
    dtype=DTYPES,
    seed=st.integers(0, 2**31),
)
def test_rope_and_write(num_tokens, heads, head_dim, rotary_share, block_size, normed, dtype, seed):
    num_heads, num_kv_heads = heads
    rotary_dim = int(head_dim * rotary_share)
    qkv = random(num_tokens, (num_heads + 2 * num_kv_heads) * head_dim, dtype=dtype, seed=seed)
    angles = random(num_tokens, rotary_dim // 2, dtype=torch.float32, seed=seed + 1) * 10
    cos, sin = (torch.cat([t, t], dim=-1) for t in (angles.cos(), angles.sin()))
    num_blocks = -(-num_tokens // block_size) + 1
    shape = (num_blocks, block_size, num_kv_heads, head_dim)
    generator = torch.Generator().manual_seed(seed)
    slots = torch.randperm(num_blocks * block_size, generator=generator)[:num_tokens]
    norms = {"q_norm": None, "k_norm": None}
    if normed:
        norms = {name: random(head_dim, dtype=dtype, seed=seed + 2) for name in norms}

    def run(function, to):
        caches = [torch.full(shape, 7.0, dtype=to(qkv).dtype) for _ in range(2)]
        weights = {name: None if norm is None else to(norm) for name, norm in norms.items()}
        q = function(to(qkv), cos, sin, *caches, slots, num_heads, **weights, eps=1e-6)
        return q, *caches

    actual = run(rope_and_write_kv, lambda t: t)
    exact = run(reference.rope_and_write_kv, lambda t: t.double())
    for a, e in zip(actual, exact, strict=True):
        torch.testing.assert_close(a.double(), e, rtol=2 * TOLERANCE[dtype], atol=2 * TOLERANCE[dtype])


def test_write_kv_touches_only_its_slots():
    k, v = random(2, 3, 2, 8, dtype=torch.bfloat16, seed=0)
    k_cache, v_cache = torch.zeros(4, 4, 2, 8, dtype=torch.bfloat16), torch.zeros(4, 4, 2, 8, dtype=torch.bfloat16)
    write_kv(k, v, k_cache, v_cache, torch.tensor([5, 0, 15]))
    for cache, rows in ((k_cache, k), (v_cache, v)):
        assert torch.equal(cache.view(16, 2, 8)[[5, 0, 15]], rows)
        assert cache.view(16, 2, 8).abs().sum(dim=(1, 2)).count_nonzero() == 3


@settings(max_examples=40, deadline=None)
@given(
    num_rows=st.one_of(st.integers(1, 40), st.integers(41, 200)),
    outputs=st.integers(1, 200),
    inputs=st.sampled_from([8, 32, 33, 64, 96, 512, 2048]),
    with_bias=st.booleans(),
    out_dtype=st.sampled_from([None, torch.float32]),
    dtype=DTYPES,
    seed=st.integers(0, 2**31),
)
def test_packed_linear(num_rows, outputs, inputs, with_bias, out_dtype, dtype, seed):
    weight = random(outputs, inputs, dtype=dtype, seed=seed) * inputs**-0.5
    weight = weight.to(dtype)
    bias = random(outputs, dtype=dtype, seed=seed + 1) if with_bias else None
    x = random(num_rows, inputs, dtype=dtype, seed=seed + 2)
    y = PackedLinear(weight, bias, out_dtype=out_dtype)(x)
    assert y.dtype == (out_dtype or dtype)
    exact = reference.linear(x.double(), weight.double(), None if bias is None else bias.double())
    tolerance = TOLERANCE[dtype]
    torch.testing.assert_close(y.double(), exact, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("num_rows", range(1, 41))
def test_packed_linear_of_every_number_of_rows(num_rows):
    """Few rows are computed by a block of their very number, and what more there are by several."""
    weight = random(80, 96, dtype=torch.bfloat16, seed=0)
    x = random(num_rows, 96, dtype=torch.bfloat16, seed=num_rows)
    y = PackedLinear(weight, out_dtype=torch.float32)(x)
    torch.testing.assert_close(y.double(), reference.linear(x.double(), weight.double(), None), rtol=1e-4, atol=1e-4)


def test_packed_linear_reads_only_its_input():
    weight = random(48, 64, dtype=torch.bfloat16, seed=0)
    layer = PackedLinear(weight, out_dtype=torch.float32)
    for num_rows in (1, 2, 3, 17, 33, 70):
        around = torch.full((num_rows + 40, 128), float("nan"), dtype=torch.bfloat16)
        x = random(num_rows, 64, dtype=torch.bfloat16, seed=num_rows)
        around[:num_rows, :64] = x
        assert torch.equal(layer(around[:num_rows, :64]), layer(x))
    assert layer(x.view(7, 10, 64)).shape == (7, 10, 48)
