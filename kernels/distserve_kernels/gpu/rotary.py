"""Rotary embedding, alone and as part of what happens between a layer's projection and its attention."""

# mypy: disable-error-code="no-untyped-def,untyped-decorator,misc"

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _partners(dims, ROTARY_DIM: tl.constexpr):
    """For each dimension the one it is rotated with, and the sign that one comes with."""
    HALF: tl.constexpr = ROTARY_DIM // 2
    partners = tl.where(dims < HALF, dims + HALF, tl.where(dims < ROTARY_DIM, dims - HALF, dims))
    return partners, tl.where(dims < HALF, -1.0, 1.0)


@triton.jit
def _rotated(x, partner, dims, sign, cos, sin, ROTARY_DIM: tl.constexpr):
    """X [heads, D] turned by the angles of cos and sin [D]; dimensions past ROTARY_DIM stay."""
    turned = x * cos[None, :] + sign[None, :] * partner * sin[None, :]
    return tl.where((dims < ROTARY_DIM)[None, :], turned, x)


@triton.jit
def _rope_kernel(
    x_ptr,
    cos_ptr,
    sin_ptr,
    out_ptr,
    x_stride_t,
    x_stride_h,
    cos_stride,
    sin_stride,
    NUM_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    ROTARY_DIM: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    heads = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    dims = tl.arange(0, BLOCK_D)
    keep = (heads < NUM_HEADS)[:, None] & (dims < HEAD_DIM)[None, :]
    partners, sign = _partners(dims, ROTARY_DIM)
    rows = x_ptr + token * x_stride_t + heads[:, None] * x_stride_h
    x = tl.load(rows + dims[None, :], mask=keep, other=0.0).to(tl.float32)
    partner = tl.load(rows + partners[None, :], mask=keep, other=0.0).to(tl.float32)
    cos = tl.load(cos_ptr + token * cos_stride + dims, mask=dims < ROTARY_DIM, other=0.0).to(tl.float32)
    sin = tl.load(sin_ptr + token * sin_stride + dims, mask=dims < ROTARY_DIM, other=0.0).to(tl.float32)
    result = _rotated(x, partner, dims, sign, cos, sin, ROTARY_DIM)
    out = out_ptr + (token * NUM_HEADS + heads[:, None]) * HEAD_DIM + dims[None, :]
    tl.store(out, result.to(out_ptr.dtype.element_ty), mask=keep)


@triton.jit
def _rope_write_kernel(
    qkv_ptr,
    cos_ptr,
    sin_ptr,
    q_norm_ptr,
    k_norm_ptr,
    q_ptr,
    k_cache_ptr,
    v_cache_ptr,
    slots_ptr,
    eps,
    qkv_stride,
    cos_stride,
    sin_stride,
    k_stride_n,
    k_stride_p,
    k_stride_h,
    v_stride_n,
    v_stride_p,
    v_stride_h,
    NUM_HEADS: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    ROTARY_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    HAS_Q_NORM: tl.constexpr,
    HAS_K_NORM: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    heads = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    dims = tl.arange(0, BLOCK_D)
    dim_ok = dims < HEAD_DIM
    keep = (heads < NUM_HEADS + 2 * NUM_KV_HEADS)[:, None] & dim_ok[None, :]
    partners, sign = _partners(dims, ROTARY_DIM)
    rows = qkv_ptr + token * qkv_stride + heads[:, None] * HEAD_DIM
    stored = tl.load(rows + dims[None, :], mask=keep, other=0.0)
    x = stored.to(tl.float32)
    partner = tl.load(rows + partners[None, :], mask=keep, other=0.0).to(tl.float32)
    is_q = heads < NUM_HEADS
    is_k = (heads >= NUM_HEADS) & (heads < NUM_HEADS + NUM_KV_HEADS)
    is_v = (heads >= NUM_HEADS + NUM_KV_HEADS) & (heads < NUM_HEADS + 2 * NUM_KV_HEADS)
    if HAS_Q_NORM or HAS_K_NORM:
        inverse = 1.0 / tl.sqrt_rn(tl.sum(x * x, 1) / HEAD_DIM + eps)
        # The norm is rounded to the data type before the rotation, as by the reference.
        kind = stored.dtype
        if HAS_Q_NORM:
            weight = tl.load(q_norm_ptr + dims, mask=dim_ok, other=0.0).to(tl.float32)
            partner_weight = tl.load(q_norm_ptr + partners, mask=dim_ok, other=0.0).to(tl.float32)
            normed = (x * inverse[:, None] * weight[None, :]).to(kind).to(tl.float32)
            normed_partner = (partner * inverse[:, None] * partner_weight[None, :]).to(kind).to(tl.float32)
            x = tl.where(is_q[:, None], normed, x)
            partner = tl.where(is_q[:, None], normed_partner, partner)
        if HAS_K_NORM:
            weight = tl.load(k_norm_ptr + dims, mask=dim_ok, other=0.0).to(tl.float32)
            partner_weight = tl.load(k_norm_ptr + partners, mask=dim_ok, other=0.0).to(tl.float32)
            normed = (x * inverse[:, None] * weight[None, :]).to(kind).to(tl.float32)
            normed_partner = (partner * inverse[:, None] * partner_weight[None, :]).to(kind).to(tl.float32)
            x = tl.where(is_k[:, None], normed, x)
            partner = tl.where(is_k[:, None], normed_partner, partner)
    cos = tl.load(cos_ptr + token * cos_stride + dims, mask=dims < ROTARY_DIM, other=0.0).to(tl.float32)
    sin = tl.load(sin_ptr + token * sin_stride + dims, mask=dims < ROTARY_DIM, other=0.0).to(tl.float32)
    result = _rotated(x, partner, dims, sign, cos, sin, ROTARY_DIM)

    q_out = q_ptr + (token * NUM_HEADS + heads[:, None]) * HEAD_DIM + dims[None, :]
    tl.store(q_out, result.to(q_ptr.dtype.element_ty), mask=is_q[:, None] & keep)
    slot = tl.load(slots_ptr + token)
    if slot < 0:
        return
    block, offset = slot // BLOCK_SIZE, slot % BLOCK_SIZE
    k_heads = heads - NUM_HEADS
    k_out = k_cache_ptr + block * k_stride_n + offset * k_stride_p + k_heads[:, None] * k_stride_h + dims[None, :]
    tl.store(k_out, result.to(k_cache_ptr.dtype.element_ty), mask=is_k[:, None] & keep)
    v_heads = k_heads - NUM_KV_HEADS
    v_out = v_cache_ptr + block * v_stride_n + offset * v_stride_p + v_heads[:, None] * v_stride_h + dims[None, :]
    tl.store(v_out, stored.to(v_cache_ptr.dtype.element_ty), mask=is_v[:, None] & keep)


def _unit_stride(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """`reference.rope`: x [T, heads, D]; cos, sin [T, R], R <= D."""
    num_tokens, num_heads, head_dim = x.shape
    x, cos, sin = _unit_stride(x), _unit_stride(cos), _unit_stride(sin)
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if num_tokens == 0:
        return out
    block_d = triton.next_power_of_2(head_dim)
    block_h = min(triton.next_power_of_2(num_heads), max(2048 // block_d, 1))
    _rope_kernel[(num_tokens, triton.cdiv(num_heads, block_h))](
        x,
        cos,
        sin,
        out,
        x.stride(0),
        x.stride(1),
        cos.stride(0),
        sin.stride(0),
        NUM_HEADS=num_heads,
        HEAD_DIM=head_dim,
        ROTARY_DIM=cos.shape[1],
        BLOCK_H=block_h,
        BLOCK_D=block_d,
        num_warps=4,
    )
    return out


def rope_and_write_kv(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slots: Tensor,
    num_heads: int,
    *,
    q_norm: Tensor | None = None,
    k_norm: Tensor | None = None,
    eps: float = 1e-6,
) -> Tensor:
    """`reference.rope_and_write_kv`; a token with a negative slot is not stored (padding of a captured batch)."""
    num_tokens = qkv.shape[0]
    block_size, num_kv_heads, head_dim = k_cache.shape[1:]
    qkv, cos, sin = _unit_stride(qkv), _unit_stride(cos), _unit_stride(sin)
    q = torch.empty((num_tokens, num_heads, head_dim), dtype=qkv.dtype, device=qkv.device)
    if num_tokens == 0:
        return q
    block_d = triton.next_power_of_2(head_dim)
    all_heads = num_heads + 2 * num_kv_heads
    block_h = min(triton.next_power_of_2(all_heads), max(2048 // block_d, 1))
    _rope_write_kernel[(num_tokens, triton.cdiv(all_heads, block_h))](
        qkv,
        cos,
        sin,
        qkv if q_norm is None else q_norm,
        qkv if k_norm is None else k_norm,
        q,
        k_cache,
        v_cache,
        slots.contiguous(),
        eps,
        qkv.stride(0),
        cos.stride(0),
        sin.stride(0),
        k_cache.stride(0),
        k_cache.stride(1),
        k_cache.stride(2),
        v_cache.stride(0),
        v_cache.stride(1),
        v_cache.stride(2),
        NUM_HEADS=num_heads,
        NUM_KV_HEADS=num_kv_heads,
        HEAD_DIM=head_dim,
        ROTARY_DIM=cos.shape[1],
        BLOCK_SIZE=block_size,
        HAS_Q_NORM=q_norm is not None,
        HAS_K_NORM=k_norm is not None,
        BLOCK_H=block_h,
        BLOCK_D=block_d,
        num_warps=4,
    )
    return q
