"""Paged attention against the float64 definition, and the definition against textbook attention."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional

from distserve_kernels import paged_attention, reference
from tests.kernels.paged_batches import make_batch

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}


def assert_matches(actual: torch.Tensor, exact: torch.Tensor) -> None:
    tolerance = TOLERANCE[actual.dtype]
    torch.testing.assert_close(actual.double(), exact, rtol=tolerance, atol=tolerance)


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.tuples(st.integers(0, 300), st.integers(1, 70)), min_size=1, max_size=4),
    heads=st.sampled_from([(1, 1), (4, 4), (6, 2), (12, 4), (5, 1), (20, 1), (3, 1)]),
    head_dim=st.sampled_from([16, 32, 64, 96, 128, 256]),
    block_size=st.sampled_from([1, 8, 16, 32]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.bfloat16]),
    window=st.sampled_from([None, None, 1, 17, 64, 200]),
    softcap=st.sampled_from([None, None, 5.0]),
    with_sinks=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_equals_the_definition_in_float64(
    lengths, heads, head_dim, block_size, dtype, window, softcap, with_sinks, seed
):
    batch = make_batch(
        lengths,
        num_heads=heads[0],
        num_kv_heads=heads[1],
        head_dim=head_dim,
        block_size=block_size,
        dtype=dtype,
        seed=seed,
        visible_window=window,
    )
    sinks = torch.randn(heads[0], generator=torch.Generator().manual_seed(seed)) if with_sinks else None
    options = {"scale": head_dim**-0.5, "sliding_window": window, "softcap": softcap, "sinks": sinks}
    out = torch.full_like(batch.q, float("nan"))
    returned = paged_attention(*batch.arguments(), **options, out=out)
    assert returned is out
    assert_matches(out, reference.paged_attention(*batch.exact().arguments(), **options))


@settings(max_examples=25, deadline=None)
@given(
    contexts=st.lists(st.integers(1, 500), min_size=1, max_size=9),
    heads=st.sampled_from([(12, 4), (8, 1), (2, 2), (16, 1), (17, 1)]),
    head_dim=st.sampled_from([32, 64, 128]),
    window=st.sampled_from([None, 100]),
    seed=st.integers(0, 2**31),
)
def test_decode_batches(contexts, heads, head_dim, window, seed):
    batch = make_batch(
        [(context - 1, 1) for context in contexts],
        num_heads=heads[0],
        num_kv_heads=heads[1],
        head_dim=head_dim,
        block_size=16,
        dtype=torch.bfloat16,
        seed=seed,
        visible_window=window,
    )
    options = {"scale": head_dim**-0.5, "sliding_window": window}
    exact = reference.paged_attention(*batch.exact().arguments(), **options)
    assert_matches(paged_attention(*batch.arguments(), **options), exact)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_long_prompt_in_pieces_equals_the_prompt_at_once(dtype):
    whole = make_batch([(0, 600)], num_heads=6, num_kv_heads=2, head_dim=64, block_size=16, dtype=dtype, seed=1)
    expected = paged_attention(*whole.arguments(), scale=0.125)
    pieces = []
    for start, end in [(0, 256), (256, 257), (257, 600)]:
        starts, lens = torch.tensor([0, end - start]).int(), torch.tensor([end]).int()
        arguments = (whole.q[start:end], whole.k_cache, whole.v_cache, whole.block_tables, starts, lens)
        pieces.append(paged_attention(*arguments, scale=0.125))
    torch.testing.assert_close(torch.cat(pieces), expected, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


def test_large_scores_do_not_overflow():
    batch = make_batch(
        [(40, 30), (200, 1)], num_heads=4, num_kv_heads=2, head_dim=64, block_size=16, dtype=torch.bfloat16, seed=3
    )
    exact = reference.paged_attention(*batch.exact().arguments(), scale=50.0)
    assert_matches(paged_attention(*batch.arguments(), scale=50.0), exact)


def test_the_definition_is_causal_attention():
    batch = make_batch([(0, 40)], num_heads=6, num_kv_heads=2, head_dim=16, block_size=8, dtype=torch.float64, seed=2)
    blocks = batch.block_tables[0, :5].long()
    k = batch.k_cache[blocks].reshape(40, 2, 16).transpose(0, 1)
    v = batch.v_cache[blocks].reshape(40, 2, 16).transpose(0, 1)
    expected = functional.scaled_dot_product_attention(
        batch.q.transpose(0, 1)[None], k[None], v[None], is_causal=True, enable_gqa=True
    )[0].transpose(0, 1)
    torch.testing.assert_close(reference.paged_attention(*batch.arguments(), scale=0.25), expected)


def test_caches_may_be_interleaved_per_block():
    batch = make_batch(
        [(50, 3), (10, 1), (0, 40)],
        num_heads=4,
        num_kv_heads=2,
        head_dim=32,
        block_size=16,
        dtype=torch.bfloat16,
        seed=4,
    )
    both = torch.stack([batch.k_cache, batch.v_cache], dim=1)
    q, k_cache, v_cache, *rest = batch.arguments()
    expected = paged_attention(q, k_cache, v_cache, *rest, scale=0.2)
    assert torch.equal(paged_attention(q, both[:, 0], both[:, 1], *rest, scale=0.2), expected)
