"""What every kernel of this package computes, in plain torch.

These functions define the results: a faster implementation must agree with them to rounding, and each is what runs
where no faster one exists. They work on any device and data type, compute in float32 (float64 stays float64), and
never touch a cache slot outside the sequences they are given. They know nothing of models, schedulers or processes.

Shapes: T tokens of a flattened batch, B sequences, H query heads, K key/value heads, D head dim, N cache blocks,
P tokens per block, I intermediate size.
"""

import torch
from torch import Tensor
from torch.nn import functional


def _compute_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def paged_attention(
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
    out: Tensor | None = None,
) -> Tensor:
    """Causal attention of a flattened batch over a paged cache that already holds this step's keys and values.

    Args:
        q: [T, H, D] queries; sequence b owns rows ``query_starts[b]:query_starts[b + 1]``, its newest tokens.
        k_cache: [N, P, K, D]; position p of sequence b is at ``[block_tables[b, p // P], p % P]``.
        v_cache: likewise.
        block_tables: [B, max blocks] int32; entries past a sequence's context are never read.
        query_starts: [B + 1] int32, ascending from 0.
        context_lens: [B] int32 tokens per sequence, this step's included.
        scale: factor on the dot products.
        sliding_window: a query sees itself and the ``sliding_window - 1`` positions before it; None sees all.
        softcap: scores become ``softcap * tanh(score / softcap)``.
        sinks: [H] extra logits per head that take part in the softmax and carry no value.
        out: [T, H, D] to write into.

    Returns:
        [T, H, D] in q's data type.
    """
    num_heads, head_dim = q.shape[1:]
    block_size, num_kv_heads = k_cache.shape[1:3]
    result = torch.empty_like(q) if out is None else out
    dtype = _compute_dtype(q)
    starts = query_starts.tolist()
    for b, context_len in enumerate(context_lens.tolist()):
        num_queries = starts[b + 1] - starts[b]
        if num_queries == 0:
            continue
        first_seen = 0 if sliding_window is None else max(0, context_len - num_queries - sliding_window + 1)
        first_block = first_seen // block_size
        blocks = block_tables[b, first_block : -(-context_len // block_size)].long()
        origin = first_block * block_size
        kept = slice(first_seen - origin, context_len - origin)
        k = k_cache[blocks].reshape(-1, num_kv_heads, head_dim)[kept].to(dtype)
        v = v_cache[blocks].reshape(-1, num_kv_heads, head_dim)[kept].to(dtype)
        rows = q[starts[b] : starts[b + 1]].to(dtype)
        rows = rows.view(num_queries, num_kv_heads, num_heads // num_kv_heads, head_dim)
        scores = torch.einsum("qkgd,skd->kgqs", rows, k) * scale
        if softcap is not None:
            scores = torch.tanh(scores / softcap) * softcap
        key_positions = torch.arange(first_seen, context_len, device=q.device)
        query_positions = torch.arange(context_len - num_queries, context_len, device=q.device)[:, None]
        visible = key_positions <= query_positions
        if sliding_window is not None:
            visible &= key_positions > query_positions - sliding_window
        scores = scores.masked_fill(~visible, float("-inf"))
        if sinks is not None:
            extra = sinks.to(dtype).view(num_kv_heads, -1, 1, 1).expand(*scores.shape[:3], 1)
            weights = torch.cat([scores, extra], dim=-1).softmax(dim=-1)[..., :-1]
        else:
            weights = scores.softmax(dim=-1)
        attended = torch.einsum("kgqs,skd->qkgd", weights, v)
        result[starts[b] : starts[b + 1]] = attended.reshape(num_queries, num_heads, head_dim).to(q.dtype)
    return result


def write_kv(k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slots: Tensor) -> None:
    """Stores k and v [T, K, D] at ``slots`` [T] int64 (``block * P + offset``) of the caches [N, P, K, D]."""
    block_size = k_cache.shape[1]
    blocks, offsets = slots // block_size, slots % block_size
    k_cache[blocks, offsets] = k
    v_cache[blocks, offsets] = v


def rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates the two halves of each head's first R dimensions: x [T, heads, D]; cos, sin [T, R], R <= D."""
    dtype = _compute_dtype(x)
    rotary_dim = cos.shape[-1]
    rotated, rest = x[..., :rotary_dim].to(dtype), x[..., rotary_dim:]
    first, second = rotated.chunk(2, dim=-1)
    turned = rotated * cos.to(dtype)[:, None] + torch.cat([-second, first], dim=-1) * sin.to(dtype)[:, None]
    return torch.cat([turned.to(x.dtype), rest], dim=-1)


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
    """Splits a fused projection, normalises heads if asked, rotates, and stores keys and values in the cache.

    Args:
        qkv: [T, (H + 2 K) * D], the heads of q, then k, then v.
        cos: [T, R] of the tokens' positions, halves repeated as transformers has them; R <= D.
        sin: likewise.
        k_cache: [N, P, K, D], written at ``slots``.
        v_cache: likewise.
        slots: [T] int64, ``block * P + offset``.
        num_heads: H.
        q_norm: [D] weight of an RMS norm of each query head, applied before the rotation.
        k_norm: the same for key heads.
        eps: of those norms.

    Returns:
        The rotated queries, [T, H, D].
    """
    num_kv_heads, head_dim = k_cache.shape[2:]
    heads = qkv.view(qkv.shape[0], num_heads + 2 * num_kv_heads, head_dim)
    q, k = heads[:, :num_heads], heads[:, num_heads : num_heads + num_kv_heads]
    v = heads[:, num_heads + num_kv_heads :]
    if q_norm is not None:
        q = rms_norm(q, q_norm, eps)
    if k_norm is not None:
        k = rms_norm(k, k_norm, eps)
    write_kv(rope(k, cos, sin), v, k_cache, v_cache, slots)
    return rope(q, cos, sin)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """``x / sqrt(mean(x^2) + eps) * weight`` over the last dimension (Zhang and Sennrich, 2019)."""
    wide = x.to(_compute_dtype(x))
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps) * weight).to(x.dtype)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Adds x to ``residual`` in place and returns the RMS norm of the sum."""
    residual += x
    return rms_norm(residual, weight, eps)


def silu_mul(gate_up: Tensor) -> Tensor:
    """``silu(gate) * up`` of [T, 2 I], gate in the first half: [T, I]."""
    gate, up = gate_up.to(_compute_dtype(gate_up)).chunk(2, dim=-1)
    return (functional.silu(gate) * up).to(gate_up.dtype)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``x @ weight.T + bias``."""
    return functional.linear(x, weight, bias)
