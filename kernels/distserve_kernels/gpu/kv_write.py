"""Stores a step's keys and values in the paged cache."""

# mypy: disable-error-code="no-untyped-def,untyped-decorator,misc"

import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _write_kernel(
    k_ptr,
    v_ptr,
    k_cache_ptr,
    v_cache_ptr,
    slots_ptr,
    k_stride_t,
    k_stride_h,
    v_stride_t,
    v_stride_h,
    k_stride_n,
    k_stride_p,
    k_stride_c,
    v_stride_n,
    v_stride_p,
    v_stride_c,
    NUM_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots_ptr + token)
    if slot < 0:
        return
    heads = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    dims = tl.arange(0, BLOCK_D)
    keep = (heads < NUM_HEADS)[:, None] & (dims < HEAD_DIM)[None, :]
    block, offset = slot // BLOCK_SIZE, slot % BLOCK_SIZE
    k = tl.load(k_ptr + token * k_stride_t + heads[:, None] * k_stride_h + dims[None, :], mask=keep)
    v = tl.load(v_ptr + token * v_stride_t + heads[:, None] * v_stride_h + dims[None, :], mask=keep)
    k_at = k_cache_ptr + block * k_stride_n + offset * k_stride_p
    v_at = v_cache_ptr + block * v_stride_n + offset * v_stride_p
    tl.store(k_at + heads[:, None] * k_stride_c + dims[None, :], k, mask=keep)
    tl.store(v_at + heads[:, None] * v_stride_c + dims[None, :], v, mask=keep)


def write_kv(k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slots: Tensor) -> None:
    """`reference.write_kv`; a token with a negative slot is not stored (padding of a captured batch).

    The heads' dimension of every tensor is contiguous. Values are converted to the caches' data type.
    """
    num_tokens, num_heads, head_dim = k.shape
    if num_tokens == 0:
        return
    if k.stride(2) != 1:
        k = k.contiguous()
    if v.stride(2) != 1:
        v = v.contiguous()
    block_d = triton.next_power_of_2(head_dim)
    block_h = min(triton.next_power_of_2(num_heads), max(2048 // block_d, 1))
    _write_kernel[(num_tokens, triton.cdiv(num_heads, block_h))](
        k,
        v,
        k_cache,
        v_cache,
        slots.contiguous(),
        k.stride(0),
        k.stride(1),
        v.stride(0),
        v.stride(1),
        k_cache.stride(0),
        k_cache.stride(1),
        k_cache.stride(2),
        v_cache.stride(0),
        v_cache.stride(1),
        v_cache.stride(2),
        NUM_HEADS=num_heads,
        HEAD_DIM=head_dim,
        BLOCK_SIZE=k_cache.shape[1],
        BLOCK_H=block_h,
        BLOCK_D=block_d,
        num_warps=4,
    )
