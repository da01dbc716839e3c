"""Causal attention of sequences with many queries each (prompts, or chunks of them) over a paged cache.

One program computes a tile of queries times all query heads of one KV head, so a key is loaded once for the whole group
(flash attention 2: Dao, 2023). Tiles are numbered over the flattened batch and find their sequence themselves: the host
needs no lengths. Keys come in two loops, first those that every row of the tile sees, then those at the borders of
causality, window and context, where scores are masked.
"""

# mypy: disable-error-code="no-untyped-def,untyped-decorator,misc"

import torch
import triton
import triton.language as tl
from torch import Tensor

from distserve_kernels.gpu.tiles import LOG2E, find_segment, fold, log2_scores


@triton.jit
def _attend(
    q,
    k_ptr,
    v_ptr,
    table,
    positions_q,
    context_len,
    scale,
    softcap,
    window,
    best,
    total,
    acc,
    begin,
    end,
    k_stride_n,
    k_stride_p,
    v_stride_n,
    v_stride_p,
    HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    PRECISION: tl.constexpr,
    MASKED: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """The state after keys ``begin`` (a multiple of BLOCK_N) to ``end``; unmasked, every row sees all of them."""
    dims = tl.arange(0, BLOCK_D)
    for start in range(begin, end, BLOCK_N):
        positions = start + tl.arange(0, BLOCK_N)
        if MASKED:
            exists = positions < context_len
            blocks = tl.load(table + positions // BLOCK_SIZE, mask=exists, other=0).to(tl.int64)
            seen = positions[None, :] <= positions_q[:, None]
            if HAS_WINDOW:
                # Positions that no row sees may be unmapped: their table entries are read, their keys are not.
                nearest = tl.min(positions_q, 0) - window
                exists = exists & (positions > nearest)
                seen = seen & (positions[None, :] > positions_q[:, None] - window)
            keep = exists[:, None] & (dims < HEAD_DIM)[None, :]
        else:
            blocks = tl.load(table + positions // BLOCK_SIZE).to(tl.int64)
            keep = (positions >= 0)[:, None] & (dims < HEAD_DIM)[None, :]
        slots = positions % BLOCK_SIZE
        k_offsets = (blocks * k_stride_n + slots * k_stride_p)[:, None] + dims[None, :]
        v_offsets = (blocks * v_stride_n + slots * v_stride_p)[:, None] + dims[None, :]
        if MASKED or HEAD_DIM != BLOCK_D:
            k = tl.load(k_ptr + k_offsets, mask=keep, other=0.0)
            v = tl.load(v_ptr + v_offsets, mask=keep, other=0.0)
        else:
            k = tl.load(k_ptr + k_offsets)
            v = tl.load(v_ptr + v_offsets)
        scores = log2_scores(q, k, scale, softcap, HAS_SOFTCAP, PRECISION)
        if MASKED:
            scores = tl.where(seen, scores, float("-inf"))
        best, total, acc = fold(scores, v, best, total, acc, PRECISION)
    return best, total, acc


# What changes from step to step is not specialised on: no kernel is compiled while requests wait.
@triton.jit(do_not_specialize=["num_sequences", "table_stride"])
def _prefill_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    tables_ptr,
    starts_ptr,
    lens_ptr,
    sinks_ptr,
    out_ptr,
    num_sequences,
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
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_SINKS: tl.constexpr,
    SKIP_SINGLE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    QUERIES: tl.constexpr = BLOCK_M // GROUP
    # The last tiles of a prompt see most keys: they start first, so that none of them is what the card waits for.
    tile = tl.num_programs(1) - 1 - tl.program_id(1)
    kv_head = tl.program_id(0)
    sequence = find_segment(starts_ptr, tile, num_sequences, QUERIES)
    row_begin = tl.load(starts_ptr + sequence)
    num_queries = tl.load(starts_ptr + sequence + 1) - row_begin
    first_query = (tile - (row_begin // QUERIES + sequence)) * QUERIES
    if first_query >= num_queries:
        return
    if SKIP_SINGLE and num_queries == 1:
        return
    context_len = tl.load(lens_ptr + sequence)

    # Row r of the tile is query r // GROUP under head r % GROUP of the group.
    rows = tl.arange(0, BLOCK_M)
    queries = first_query + rows // GROUP
    row_ok = (rows < QUERIES * GROUP) & (queries < num_queries)
    # Rows that do not exist stand at the last query's place, so that bounds over all rows hold without them.
    last_query = tl.minimum(first_query + QUERIES, num_queries) - 1
    origin = context_len - num_queries
    positions_q = origin + tl.minimum(queries, last_query)
    dims = tl.arange(0, BLOCK_D)
    dim_ok = dims < HEAD_DIM
    query_heads = kv_head * GROUP + rows % GROUP
    q_rows = (row_begin + queries).to(tl.int64) * q_stride_t + query_heads * q_stride_h
    keep = row_ok[:, None] & dim_ok[None, :]
    q = tl.load(q_ptr + q_rows[:, None] + dims[None, :], mask=keep, other=0.0)

    best = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    if HAS_SINKS:
        best = tl.load(sinks_ptr + query_heads, mask=row_ok, other=0.0).to(tl.float32) * LOG2E
        total += 1.0

    # Keys [all_begin, all_end) are seen by every row; both are multiples of BLOCK_N. [begin, end) by some.
    nearest_query = origin + first_query
    begin = 0
    all_begin = 0
    if HAS_WINDOW:
        begin = tl.maximum(nearest_query - window + 1, 0) // BLOCK_N * BLOCK_N
        all_begin = tl.cdiv(tl.maximum(origin + last_query - window + 1, 0), BLOCK_N) * BLOCK_N
    end = origin + last_query + 1
    all_end = (nearest_query + 1) // BLOCK_N * BLOCK_N
    table = tables_ptr + sequence.to(tl.int64) * table_stride
    k_ptr += kv_head * k_stride_h
    v_ptr += kv_head * v_stride_h
    if HAS_WINDOW:
        all_begin = tl.minimum(all_begin, end)
        all_end = tl.maximum(all_end, all_begin)
        best, total, acc = _attend(
            q, k_ptr, v_ptr, table, positions_q, context_len, scale, softcap, window, best, total, acc,
            begin, all_begin, k_stride_n, k_stride_p, v_stride_n, v_stride_p,
            HEAD_DIM, BLOCK_SIZE, HAS_WINDOW, HAS_SOFTCAP, PRECISION, True, BLOCK_D, BLOCK_N,
        )  # fmt: skip
    best, total, acc = _attend(
        q, k_ptr, v_ptr, table, positions_q, context_len, scale, softcap, window, best, total, acc,
        all_begin, all_end, k_stride_n, k_stride_p, v_stride_n, v_stride_p,
        HEAD_DIM, BLOCK_SIZE, HAS_WINDOW, HAS_SOFTCAP, PRECISION, False, BLOCK_D, BLOCK_N,
    )  # fmt: skip
    best, total, acc = _attend(
        q, k_ptr, v_ptr, table, positions_q, context_len, scale, softcap, window, best, total, acc,
        all_end, end, k_stride_n, k_stride_p, v_stride_n, v_stride_p,
        HEAD_DIM, BLOCK_SIZE, HAS_WINDOW, HAS_SOFTCAP, PRECISION, True, BLOCK_D, BLOCK_N,
    )  # fmt: skip

    result = acc / tl.where(total > 0, total, 1.0)[:, None]
    out_rows = (row_begin + queries).to(tl.int64) * out_stride_t + query_heads * out_stride_h
    tl.store(out_ptr + out_rows[:, None] + dims[None, :], result.to(out_ptr.dtype.element_ty), mask=keep)


def prefill_attention(
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
    skip_single: bool = False,
) -> Tensor:
    """Writes and returns ``out`` [T, H, D] as `paged_attention` would, for all sequences.

    With ``skip_single``, those with one query are left alone (`decode_attention` does them). The last dimension of q,
    ``out`` and the caches is contiguous.
    """
    num_tokens, num_heads, head_dim = q.shape
    block_size, num_kv_heads = k_cache.shape[1:3]
    group = num_heads // num_kv_heads
    num_sequences = context_lens.shape[0]
    block_d = max(triton.next_power_of_2(head_dim), 16)
    wide = q.dtype == torch.float32
    # A tile of 128 rows fills the tensor cores of two warp groups; three buffers of keys and values fit beside it.
    block_m = max(64 if wide else 128, triton.next_power_of_2(group))
    block_n = max(min(8192 // block_d // (2 if wide else 1), 64), 16)
    num_tiles = num_tokens // (block_m // group) + num_sequences
    _prefill_kernel[(num_kv_heads, num_tiles)](
        q,
        k_cache,
        v_cache,
        block_tables,
        query_starts,
        context_lens,
        q if sinks is None else sinks,
        out,
        num_sequences,
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
        GROUP=group,
        HEAD_DIM=head_dim,
        BLOCK_SIZE=block_size,
        HAS_WINDOW=sliding_window is not None,
        HAS_SOFTCAP=softcap is not None,
        HAS_SINKS=sinks is not None,
        SKIP_SINGLE=skip_single,
        PRECISION="tf32x3" if wide else "ieee",
        BLOCK_M=block_m,
        BLOCK_D=block_d,
        BLOCK_N=block_n,
        num_warps=8,
        # The loads hang on the load of the block table, and each link takes a stage: 5 is one tile ahead.
        num_stages=2 if wide else 5,
    )
    return out
