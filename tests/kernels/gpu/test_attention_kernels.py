"""Attention on the GPU against the float64 definition; what must not be read is NaN or an invalid address."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import distserve_kernels
from distserve_kernels import reference
from distserve_kernels.gpu import decode_attention as decode_module
from distserve_kernels.gpu.attention import paged_attention
from distserve_kernels.gpu.decode_attention import decode_attention, num_shares
from distserve_kernels.gpu.prefill_attention import prefill_attention
from tests.kernels.gpu.checking import DTYPES, NAN, SEEDS, assert_matches, examples, random
from tests.kernels.paged_batches import PagedBatch, make_batch

HEADS = st.sampled_from([(1, 1), (4, 4), (6, 2), (8, 1), (5, 1), (3, 1), (20, 1)])
HEAD_DIMS = st.sampled_from([16, 48, 64, 128])
BLOCK_SIZES = st.sampled_from([1, 8, 16])


def on(device: torch.device, batch: PagedBatch) -> PagedBatch:
    return PagedBatch(*(tensor.to(device) for tensor in batch.arguments()))


def options(
    head_dim: int, num_heads: int, window: int | None, softcap: float | None, with_sinks: bool, seed: int
) -> dict:
    sinks = random(num_heads, dtype=torch.float32, seed=seed) if with_sinks else None
    return {"scale": head_dim**-0.5, "sliding_window": window, "softcap": softcap, "sinks": sinks}


def moved(device: torch.device, chosen: dict) -> dict:
    return {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in chosen.items()}


@examples(40)
@given(
    lengths=st.lists(st.tuples(st.integers(0, 150), st.sampled_from([1, 1, 2, 7, 60])), min_size=1, max_size=4),
    heads=HEADS,
    head_dim=HEAD_DIMS,
    block_size=BLOCK_SIZES,
    dtype=DTYPES,
    window=st.sampled_from([None, None, 1, 17, 64]),
    softcap=st.sampled_from([None, 5.0]),
    with_sinks=st.booleans(),
    seed=SEEDS,
)
def test_any_batch(device, lengths, heads, head_dim, block_size, dtype, window, softcap, with_sinks, seed):
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
    chosen = options(head_dim, heads[0], window, softcap, with_sinks, seed)
    exact = reference.paged_attention(*batch.exact().arguments(), **chosen)
    batch = on(device, batch)
    out = torch.full_like(batch.q, NAN)
    assert paged_attention(*batch.arguments(), **moved(device, chosen), out=out) is out
    assert_matches(out, exact)


@examples(15)
@given(
    contexts=st.lists(st.integers(1, 700), min_size=1, max_size=3),
    shares=st.sampled_from([1, 2, 4, 8]),
    heads=HEADS,
    dtype=DTYPES,
    window=st.sampled_from([None, 100, 300]),
    with_sinks=st.booleans(),
    seed=SEEDS,
)
def test_any_number_of_shares(device, contexts, shares, heads, dtype, window, with_sinks, seed):
    batch = make_batch(
        [(context - 1, 1) for context in contexts],
        num_heads=heads[0],
        num_kv_heads=heads[1],
        head_dim=32,
        block_size=16,
        dtype=dtype,
        seed=seed,
        visible_window=window,
    )
    chosen = options(32, heads[0], window, None, with_sinks, seed)
    exact = reference.paged_attention(*batch.exact().arguments(), **chosen)
    batch = on(device, batch)
    out = torch.full_like(batch.q, NAN)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(decode_module, "num_shares", lambda *_: shares)
        decode_attention(*batch.arguments(), **moved(device, chosen), out=out)
    assert_matches(out, exact)


def test_each_kernel_leaves_the_other_ones_rows_alone(device):
    lengths = [(9, 1), (3, 5), (40, 1), (0, 20)]
    batch = on(
        device,
        make_batch(lengths, num_heads=4, num_kv_heads=2, head_dim=16, block_size=8, dtype=torch.float32, seed=0),
    )
    single = torch.tensor([queries == 1 for _, queries in lengths for _ in range(queries)])
    decoded, prefilled = torch.full_like(batch.q, NAN), torch.full_like(batch.q, NAN)
    decode_attention(*batch.arguments(), scale=0.25, out=decoded)
    prefill_attention(*batch.arguments(), scale=0.25, out=prefilled, skip_single=True)
    assert torch.equal(decoded.isnan().all(-1).all(-1).cpu(), ~single)
    assert torch.equal(prefilled.isnan().all(-1).all(-1).cpu(), single)


def test_padding_yields_zeros_and_reads_nothing(device):
    batch = on(
        device,
        make_batch(
            [(30, 1), (4, 1)], num_heads=4, num_kv_heads=2, head_dim=16, block_size=8, dtype=torch.float16, seed=0
        ),
    )
    batch.context_lens[1] = 0
    batch.block_tables[1] = 2**30
    out = paged_attention(*batch.arguments(), scale=0.25)
    assert torch.equal(out[1], torch.zeros_like(out[1]))
    assert out[0].abs().sum() > 0


@pytest.mark.parametrize("scale", [50.0, 1e-3])
def test_large_scores_do_not_overflow(device, scale):
    batch = make_batch(
        [(40, 30), (200, 1)], num_heads=4, num_kv_heads=2, head_dim=64, block_size=16, dtype=torch.float16, seed=3
    )
    exact = reference.paged_attention(*batch.exact().arguments(), scale=scale)
    assert_matches(paged_attention(*on(device, batch).arguments(), scale=scale), exact)


def test_views_as_the_engine_passes_them(device):
    batch = on(
        device,
        make_batch(
            [(50, 3), (10, 1)], num_heads=4, num_kv_heads=2, head_dim=32, block_size=16, dtype=torch.float32, seed=4
        ),
    )
    q, k_cache, v_cache, tables, starts, lens = batch.arguments()
    expected = paged_attention(*batch.arguments(), scale=0.2)
    by_head = q.transpose(0, 1).contiguous().transpose(0, 1)
    both = torch.stack([k_cache, v_cache], dim=1)
    wide_tables = torch.cat([tables, tables], dim=1).long()[:, : tables.shape[1]]
    assert torch.equal(paged_attention(by_head, both[:, 0], both[:, 1], wide_tables, starts, lens, scale=0.2), expected)


def test_shares_fill_the_card_and_are_worth_starting():
    assert num_shares(1, 4096, 132) == 16
    assert num_shares(64 * 8, 4096, 132) in {2, 4}
    assert num_shares(4096, 4096, 132) == 1
    assert num_shares(1, 100, 132) == 1


def test_the_public_function_hands_tensors_over(device, monkeypatch):
    monkeypatch.setattr("distserve_kernels.ops.runs_here", lambda *_: True)
    batch = make_batch([(50, 3)], num_heads=4, num_kv_heads=2, head_dim=32, block_size=16, dtype=torch.float32, seed=5)
    chosen = options(32, 4, 20, 3.0, True, 5)
    out = torch.full_like(batch.q, NAN, device=device)
    distserve_kernels.paged_attention(*on(device, batch).arguments(), **moved(device, chosen), out=out)
    assert_matches(out, reference.paged_attention(*batch.exact().arguments(), **chosen))
