"""The kernels as the engine calls them: each picks the fastest implementation that supports its arguments."""

import ctypes
import threading

import torch
from torch import Tensor

from distserve_kernels import native, reference
from distserve_kernels.gpu.support import runs_here

__all__ = [
    "add_rms_norm",
    "native_available",
    "paged_attention",
    "rms_norm",
    "rope",
    "rope_and_write_kv",
    "silu_mul",
    "write_kv",
]


class _PerThread(threading.local):
    def __init__(self) -> None:
        self.scratch = native.Scratch()


_per_thread = _PerThread()


def native_available() -> bool:
    """Whether this process runs native CPU code."""
    return native.library is not None


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
    """Causal attention over a paged cache; see `reference.paged_attention` for arguments and result.

    On a GPU every sequence must have a query, one of context length 0 (padding) yields zeros, and the host never waits.
    """
    if runs_here(q, k_cache, v_cache):
        from distserve_kernels.gpu import attention

        return attention.paged_attention(
            q,
            k_cache,
            v_cache,
            block_tables,
            query_starts,
            context_lens,
            scale=scale,
            sliding_window=sliding_window,
            softcap=softcap,
            sinks=sinks,
            out=out,
        )
    library = native.library
    _, num_heads, head_dim = q.shape
    if (
        library is None
        or not (native.is_native(q) and native.cache_is_native(k_cache) and native.cache_is_native(v_cache))
        or q.stride()[1:] != (head_dim, 1)
        or num_heads // k_cache.shape[2] > 256
        or (out is not None and not (native.is_native(out) and out.is_contiguous()))
    ):
        return reference.paged_attention(
            q,
            k_cache,
            v_cache,
            block_tables,
            query_starts,
            context_lens,
            scale=scale,
            sliding_window=sliding_window,
            softcap=softcap,
            sinks=sinks,
            out=out,
        )
    result = torch.empty(q.shape, dtype=q.dtype) if out is None else out
    tables, starts, lens = block_tables.int(), query_starts.int().contiguous(), context_lens.int().contiguous()
    wide_sinks = None if sinks is None else sinks.float().contiguous()
    if tables.stride(-1) != 1:
        tables = tables.contiguous()
    call = native.Attention(
        q=q.data_ptr(),
        ldq=q.stride(0),
        k_cache=k_cache.data_ptr(),
        v_cache=v_cache.data_ptr(),
        k_block_stride=k_cache.stride(0),
        v_block_stride=v_cache.stride(0),
        block_tables=tables.data_ptr(),
        table_stride=tables.stride(0),
        query_starts=starts.data_ptr(),
        context_lens=lens.data_ptr(),
        num_sequences=lens.shape[0],
        num_heads=num_heads,
        num_kv_heads=k_cache.shape[2],
        head_dim=head_dim,
        block_size=k_cache.shape[1],
        scale=scale,
        softcap=softcap or 0.0,
        sliding_window=sliding_window or 0,
        sinks=native.address(wide_sinks),
        out=result.data_ptr(),
        ldo=num_heads * head_dim,
    )
    num_threads = torch.get_num_threads()
    pointer = ctypes.addressof(call)
    scratch = _per_thread.scratch.take(library.ds_attention_scratch(pointer, num_threads))
    library.ds_paged_attention(pointer, scratch.data_ptr(), num_threads)
    return result


def write_kv(k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slots: Tensor) -> None:
    """Stores keys and values; see `reference.write_kv`. On a GPU tokens with negative slots (padding) are skipped."""
    if runs_here(k, v, k_cache, v_cache):
        from distserve_kernels.gpu import kv_write

        kv_write.write_kv(k, v, k_cache, v_cache, slots)
    else:
        reference.write_kv(k, v, k_cache, v_cache, slots)


def rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of each head; see `reference.rope`."""
    if runs_here(x, cos, sin):
        from distserve_kernels.gpu import rotary

        return rotary.rope(x, cos, sin)
    return reference.rope(x, cos, sin)


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
    """Splits, rotates and stores a fused projection; see `reference.rope_and_write_kv`.

    On a GPU tokens with negative slots (padding) are not stored.
    """
    if runs_here(qkv, k_cache, v_cache):
        from distserve_kernels.gpu import rotary

        return rotary.rope_and_write_kv(
            qkv, cos, sin, k_cache, v_cache, slots, num_heads, q_norm=q_norm, k_norm=k_norm, eps=eps
        )
    library = native.library
    norms = [norm for norm in (q_norm, k_norm) if norm is not None]
    if (
        library is None
        or not (native.is_native(qkv, *norms) and native.cache_is_native(k_cache) and native.cache_is_native(v_cache))
        or qkv.stride(1) != 1
    ):
        return reference.rope_and_write_kv(
            qkv, cos, sin, k_cache, v_cache, slots, num_heads, q_norm=q_norm, k_norm=k_norm, eps=eps
        )
    num_tokens = qkv.shape[0]
    _, block_size, num_kv_heads, head_dim = k_cache.shape
    q = torch.empty(num_tokens, num_heads, head_dim, dtype=qkv.dtype)
    cos, sin, slots = cos.float().contiguous(), sin.float().contiguous(), slots.contiguous()
    call = native.RopeWrite(
        cos=cos.data_ptr(),
        sin=sin.data_ptr(),
        rotary_dim=cos.shape[1],
        slots=slots.data_ptr(),
        q_norm=native.address(q_norm),
        k_norm=native.address(k_norm),
        eps=eps,
        k_cache=k_cache.data_ptr(),
        v_cache=v_cache.data_ptr(),
        k_block_stride=k_cache.stride(0),
        v_block_stride=v_cache.stride(0),
        block_size=block_size,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
    )
    library.ds_rope_write(
        ctypes.addressof(call), qkv.data_ptr(), qkv.stride(0), num_tokens, q.data_ptr(), torch.get_num_threads()
    )
    return q


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMS norm over the last dimension; see `reference.rms_norm`."""
    if runs_here(x, weight):
        from distserve_kernels.gpu import norm

        return norm.rms_norm(x, weight, eps)
    library = native.library
    if library is None or not (native.is_native(x, weight) and x.dim() == 2 and x.stride(1) == 1):
        return reference.rms_norm(x, weight, eps)
    out = torch.empty(x.shape, dtype=x.dtype)
    library.ds_rms_norm(
        x.data_ptr(),
        x.stride(0),
        None,
        weight.data_ptr(),
        eps,
        x.shape[0],
        x.shape[1],
        out.data_ptr(),
        torch.get_num_threads(),
    )
    return out


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Adds x to ``residual`` in place and norms the sum; see `reference.add_rms_norm`."""
    if runs_here(x, residual, weight):
        from distserve_kernels.gpu import norm

        return norm.add_rms_norm(x, residual, weight, eps)
    library = native.library
    if (
        library is None
        or not native.is_native(x, residual, weight)
        or x.dim() != 2
        or x.stride(1) != 1
        or not residual.is_contiguous()
    ):
        return reference.add_rms_norm(x, residual, weight, eps)
    out = torch.empty(x.shape, dtype=x.dtype)
    library.ds_rms_norm(
        x.data_ptr(),
        x.stride(0),
        residual.data_ptr(),
        weight.data_ptr(),
        eps,
        x.shape[0],
        x.shape[1],
        out.data_ptr(),
        torch.get_num_threads(),
    )
    return out


def silu_mul(gate_up: Tensor) -> Tensor:
    """``silu(gate) * up``; see `reference.silu_mul`."""
    if runs_here(gate_up):
        from distserve_kernels.gpu import gate

        return gate.silu_mul(gate_up)
    library = native.library
    if library is None or not (native.is_native(gate_up) and gate_up.dim() == 2 and gate_up.stride(1) == 1):
        return reference.silu_mul(gate_up)
    num_tokens, columns = gate_up.shape
    out = torch.empty(num_tokens, columns // 2, dtype=gate_up.dtype)
    library.ds_silu_mul(
        gate_up.data_ptr(),
        gate_up.stride(0),
        num_tokens,
        columns // 2,
        out.data_ptr(),
        torch.get_num_threads(),
    )
    return out
