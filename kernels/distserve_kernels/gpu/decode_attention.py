"""Attention of sequences with one query each over a paged cache, split over the KV length.

A decode step reads every key and value once and computes next to nothing, so it is bound by memory: what counts is
that enough bytes are in flight on all multiprocessors. One program reads one share of one sequence's keys for all query
heads of one KV head; a second kernel combines the shares (flash decoding: Dao, Haziza, Massa, Sizov, 2023).

Sequences with any other number of queries are left alone, and so are their rows of the result.
"""

# mypy: disable-error-code="no-untyped-def,untyped-decorator,misc"

import torch
import triton
import triton.language as tl
from torch import Tensor

from distserve_kernels.gpu.support import sm_count
from distserve_kernels.gpu.tiles import LOG2E, fold, log2_scores

_PROGRAMS_PER_SM = 8
"""Programs wanted in all: two waves at the four that fit at a time, so that the last wave's idle share is small."""
_FEWEST_KEYS = 256
"""Keys that a share should have at least; below, starting and combining cost more than the reading."""


# What changes from step to step is not specialised on: no kernel is compiled while requests wait.
@triton.jit(do_not_specialize=["table_stride"])
def _share_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    tables_ptr,
    starts_ptr,
    lens_ptr,
    sinks_ptr,
    out_ptr,
    part_ptr,
    part_log_ptr,
    scale,
    softcap,
    window,
    q_stride_t,
    q_stride_h,
    k_stride_n,
    k_stride_p,
    k_stride_h,
    v_stride_n,
    v_stride_p,
    v_stride_h,
    table_stride,
    out_stride_t,
    out_stride_h,
    NUM_KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    NUM_SHARES: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_SINKS: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    kv_head = tl.program_id(0)
    share = tl.program_id(1)
    sequence = tl.program_id(2)
    row = tl.load(starts_ptr + sequence)
    if tl.load(starts_ptr + sequence + 1) - row != 1:
        return
    context_len = tl.load(lens_ptr + sequence)
    first = 0
    if HAS_WINDOW:
        first = tl.maximum(context_len - window, 0)
    # Shares are whole tiles of the keys that are seen; the last ones of a short sequence are empty.
    first_tile = first // BLOCK_N
    num_tiles = tl.cdiv(context_len, BLOCK_N) - first_tile
    tiles_each = tl.cdiv(num_tiles, NUM_SHARES)
    begin = (first_tile + share * tiles_each) * BLOCK_N
    end = tl.minimum(begin + tiles_each * BLOCK_N, context_len)

    heads = tl.arange(0, BLOCK_G)
    dims = tl.arange(0, BLOCK_D)
    head_ok = heads < GROUP
    dim_ok = dims < HEAD_DIM
    query_heads = kv_head * GROUP + heads
    q_offsets = row.to(tl.int64) * q_stride_t + query_heads[:, None] * q_stride_h + dims[None, :]
    q = tl.load(q_ptr + q_offsets, mask=head_ok[:, None] & dim_ok[None, :], other=0.0)

    best = tl.full([BLOCK_G], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_G], tl.float32)
    acc = tl.zeros([BLOCK_G, BLOCK_D], tl.float32)
    if HAS_SINKS and share == 0:
        # A sink is a key without a value; the first share counts it.
        best = tl.load(sinks_ptr + query_heads, mask=head_ok, other=0.0).to(tl.float32) * LOG2E
        total += 1.0
    for start in range(begin, end, BLOCK_N):
        positions = start + tl.arange(0, BLOCK_N)
        seen = positions < context_len
        if HAS_WINDOW:
            seen = seen & (positions >= first)
        table = tables_ptr + sequence.to(tl.int64) * table_stride
        blocks = tl.load(table + positions // BLOCK_SIZE, mask=seen, other=0).to(tl.int64)
        slots = positions % BLOCK_SIZE
        keep = seen[:, None] & dim_ok[None, :]
        k_rows = blocks * k_stride_n + slots * k_stride_p + kv_head * k_stride_h
        v_rows = blocks * v_stride_n + slots * v_stride_p + kv_head * v_stride_h
        k = tl.load(k_ptr + k_rows[:, None] + dims[None, :], mask=keep, other=0.0)
        v = tl.load(v_ptr + v_rows[:, None] + dims[None, :], mask=keep, other=0.0)
        scores = log2_scores(q, k, scale, softcap, HAS_SOFTCAP, PRECISION)
        scores = tl.where(seen[None, :], scores, float("-inf"))
        best, total, acc = fold(scores, v, best, total, acc, PRECISION)

    keep_out = head_ok[:, None] & dim_ok[None, :]
    # An empty share weighs nothing, and a sequence without context (padding) yields zeros.
    result = acc / tl.where(total > 0, total, 1.0)[:, None]
    if NUM_SHARES == 1:
        out_offsets = row.to(tl.int64) * out_stride_t + query_heads[:, None] * out_stride_h + dims[None, :]
        tl.store(out_ptr + out_offsets, result.to(out_ptr.dtype.element_ty), mask=keep_out)
    else:
        parts = (sequence * NUM_KV_HEADS * GROUP + query_heads).to(tl.int64) * NUM_SHARES + share
        tl.store(part_ptr + parts[:, None] * HEAD_DIM + dims[None, :], result, mask=keep_out)
        logs = tl.where(total > 0, best + tl.log2(tl.where(total > 0, total, 1.0)), float("-inf"))
        tl.store(part_log_ptr + parts, logs, mask=head_ok)


@triton.jit
def _combine_kernel(
    part_ptr,
    part_log_ptr,
    starts_ptr,
    out_ptr,
    out_stride_t,
    out_stride_h,
    NUM_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    NUM_SHARES: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    head = tl.program_id(0)
    sequence = tl.program_id(1)
    row = tl.load(starts_ptr + sequence)
    if tl.load(starts_ptr + sequence + 1) - row != 1:
        return
    shares = tl.arange(0, BLOCK_S)
    dims = tl.arange(0, BLOCK_D)
    share_ok = shares < NUM_SHARES
    dim_ok = dims < HEAD_DIM
    parts = (sequence * NUM_HEADS + head).to(tl.int64) * NUM_SHARES + shares
    logs = tl.load(part_log_ptr + parts, mask=share_ok, other=float("-inf"))
    best = tl.max(logs, 0)
    weights = tl.exp2(logs - tl.where(best == float("-inf"), 0.0, best))
    total = tl.sum(weights, 0)
    keep = share_ok[:, None] & dim_ok[None, :]
    values = tl.load(part_ptr + parts[:, None] * HEAD_DIM + dims[None, :], mask=keep, other=0.0)
    result = tl.sum(values * weights[:, None], 0) / tl.where(total > 0, total, 1.0)
    out = out_ptr + row.to(tl.int64) * out_stride_t + head * out_stride_h + dims
    tl.store(out, result.to(out_ptr.dtype.element_ty), mask=dim_ok)


def num_shares(num_programs: int, max_keys: int, num_multiprocessors: int) -> int:
    """Shares per sequence and KV head: enough to fill the card, each of `_FEWEST_KEYS` keys or more.

    ``num_programs`` is sequences times KV heads; ``max_keys`` the longest a context can be (what the block table has
    room for), since the lengths themselves are on the device. Powers of two, so that few variants are compiled.
    """
    wanted: int = triton.next_power_of_2(triton.cdiv(_PROGRAMS_PER_SM * num_multiprocessors, num_programs))
    allowed = max(max_keys // _FEWEST_KEYS, 1)
    return min(wanted, 1 << (allowed.bit_length() - 1), 128)


def decode_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_tables: Tensor,
    query_starts: Tensor,
    context_lens: Tensor,
    *,
    scale: float,
    sliding_window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    out: Tensor,
) -> Tensor:
    """Writes and returns ``out`` [T, H, D] for the sequences that have exactly one query, as `paged_attention` would.

    The last dimension of q, ``out`` and the caches is contiguous. A sequence of context length 0 yields zeros.
    """
    num_heads, head_dim = q.shape[1:]
    block_size, num_kv_heads = k_cache.shape[1:3]
    group = num_heads // num_kv_heads
    num_sequences, max_blocks = block_tables.shape
    max_keys = max_blocks * block_size
    if sliding_window is not None:
        max_keys = min(max_keys, sliding_window)
    shares = num_shares(num_sequences * num_kv_heads, max_keys, sm_count(q.device))
    block_d = max(triton.next_power_of_2(head_dim), 16)
    wide = q.dtype == torch.float32
    # Two buffers of 32 KiB of keys and values per program: three programs fit a multiprocessor's 228 KiB.
    block_n = max(min(8192 // block_d // (2 if wide else 1), 64), 16)
    parts = torch.empty(0, dtype=torch.float32, device=q.device)
    part_logs = parts
    if shares > 1:
        parts = torch.empty((num_sequences, num_heads, shares, head_dim), dtype=torch.float32, device=q.device)
        part_logs = torch.empty((num_sequences, num_heads, shares), dtype=torch.float32, device=q.device)
    _share_kernel[(num_kv_heads, shares, num_sequences)](
        q,
        k_cache,
        v_cache,
        block_tables,
        query_starts,
        context_lens,
        q if sinks is None else sinks,
        out,
        parts,
        part_logs,
        scale,
        softcap or 0.0,
        sliding_window or 0,
        q.stride(0),
        q.stride(1),
        k_cache.stride(0),
        k_cache.stride(1),
        k_cache.stride(2),
        v_cache.stride(0),
        v_cache.stride(1),
        v_cache.stride(2),
        block_tables.stride(0),
        out.stride(0),
        out.stride(1),
        NUM_KV_HEADS=num_kv_heads,
        GROUP=group,
        HEAD_DIM=head_dim,
        BLOCK_SIZE=block_size,
        NUM_SHARES=shares,
        HAS_WINDOW=sliding_window is not None,
        HAS_SOFTCAP=softcap is not None,
        HAS_SINKS=sinks is not None,
        PRECISION="tf32x3" if wide else "ieee",
        BLOCK_G=max(triton.next_power_of_2(group), 16),
        BLOCK_D=block_d,
        BLOCK_N=block_n,
        num_warps=4,
        # The loads hang on the load of the block table, and each link takes a stage: 5 is one tile ahead.
        num_stages=5,
    )
    if shares > 1:
        _combine_kernel[(num_heads, num_sequences)](
            parts,
            part_logs,
            query_starts,
            out,
            out.stride(0),
            out.stride(1),
            NUM_HEADS=num_heads,
            HEAD_DIM=head_dim,
            NUM_SHARES=shares,
            BLOCK_S=triton.next_power_of_2(shares),
            BLOCK_D=block_d,
            num_warps=2,
        )
    return out
