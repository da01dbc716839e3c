"""Packing KV of a migration: chosen layers, heads and blocks of a pool, to and from one buffer.

The pool of a rank is [L, 2, N, P, K, D], keys before values. What travels is [layers, 2, blocks, P, heads, D], so
that the two sides may number layers, heads and blocks differently: the sender packs its ``layers``, ``heads`` and
``blocks``, the receiver unpacks into its own, as many of each.
"""

import torch
from torch import Tensor

from distserve_kernels.gpu.support import runs_here


def packed_shape(pool: Tensor, num_blocks: int, layers: range, heads: range) -> tuple[int, int, int, int, int, int]:
    """Shape of the buffer that holds ``num_blocks`` blocks of these layers and heads."""
    return len(layers), 2, num_blocks, pool.shape[3], len(heads), pool.shape[5]


def pack_kv(pool: Tensor, blocks: Tensor, layers: range, heads: range, out: Tensor | None = None) -> Tensor:
    """Gathers KV into a contiguous buffer.

    Args:
        pool: [L, 2, N, P, K, D], the last three dimensions contiguous.
        blocks: [n] int32 or int64 indices into N, in the order they are to be packed.
        layers: of the pool, consecutive.
        heads: of the pool, consecutive.
        out: where to; contiguous, of `packed_shape` or flat, in the pool's data type. A part of a staging ring, say.

    Returns:
        ``out``, or a new tensor of `packed_shape`.

    Raises:
        ValueError: ``layers`` or ``heads`` are not consecutive or not the pool's, or ``out`` does not fit.
    """
    shape = packed_shape(pool, blocks.numel(), layers, heads)
    _check(pool, layers, heads)
    out = torch.empty(shape, dtype=pool.dtype, device=pool.device) if out is None else out
    buffer = _as_packed(out, shape, pool)
    if runs_here(pool, buffer):
        from distserve_kernels.gpu import kv_pieces

        kv_pieces.pack_kv(pool, blocks.contiguous(), layers, heads, buffer)
    else:
        selected = pool[layers.start : layers.stop, :, :, :, heads.start : heads.stop]
        buffer.copy_(selected.index_select(2, blocks))
    return out


def unpack_kv(buffer: Tensor, pool: Tensor, blocks: Tensor, layers: range, heads: range) -> None:
    """Scatters what `pack_kv` gathered into blocks of ``pool``, whose other bytes stay as they are.

    Arguments and errors as of `pack_kv`, ``buffer`` for ``out``; ``blocks`` are distinct.
    """
    _check(pool, layers, heads)
    buffer = _as_packed(buffer, packed_shape(pool, blocks.numel(), layers, heads), pool)
    if runs_here(pool, buffer):
        from distserve_kernels.gpu import kv_pieces

        kv_pieces.unpack_kv(buffer, pool, blocks.contiguous(), layers, heads)
    else:
        pool[layers.start : layers.stop, :, :, :, heads.start : heads.stop].index_copy_(2, blocks.long(), buffer)


def _check(pool: Tensor, layers: range, heads: range) -> None:
    if pool.dim() != 6 or pool.stride()[4:] != (pool.shape[5], 1):
        raise ValueError(f"a pool is [L, 2, N, P, K, D] with contiguous heads, not {tuple(pool.shape)}")
    for name, wanted, size in (("layers", layers, pool.shape[0]), ("heads", heads, pool.shape[4])):
        if wanted.step != 1 or not 0 <= wanted.start <= wanted.stop <= size:
            raise ValueError(f"{name} {wanted} are not consecutive ones of the pool's {size}")


def _as_packed(buffer: Tensor, shape: tuple[int, ...], pool: Tensor) -> Tensor:
    numel = torch.Size(shape).numel()
    if buffer.numel() != numel or not buffer.is_contiguous() or buffer.dtype != pool.dtype:
        raise ValueError(
            f"the buffer must be contiguous, {numel} elements of {pool.dtype}, not {tuple(buffer.shape)} {buffer.dtype}"
        )
    return buffer.view(shape)
