"""Copies chosen layers, heads and blocks between the paged KV memory and one contiguous buffer.

Bound by memory alone: bytes are moved as the widest words that the addresses allow, neighbouring threads move
neighbouring words, and one program has 32 KiB in flight. Values are never interpreted, so NaNs keep their payload.
"""

# mypy: disable-error-code="no-untyped-def,untyped-decorator,misc"

import torch
import triton
import triton.language as tl
from torch import Tensor

_PROGRAM_BYTES = 32 * 1024
_WORDS = (torch.int64, torch.int32, torch.int16)


@triton.jit(do_not_specialize=["num_blocks"])  # not to compile another for each migration's size
def _copy_kernel(
    pool_ptr,
    buffer_ptr,
    blocks_ptr,
    stride_l,
    stride_kv,
    stride_n,
    stride_p,
    num_blocks,
    PACKS: tl.constexpr,
    ROWS: tl.constexpr,
    ROW: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One piece, of a layer, keys or values, and a block, is ROWS rows of ROW words.

    They are ``stride_p`` apart in the pool and adjacent in the buffer.
    """
    layer = tl.program_id(2).to(tl.int64)
    part = tl.program_id(1).to(tl.int64)
    CHUNKS: tl.constexpr = (ROWS * ROW + BLOCK - 1) // BLOCK
    index = tl.program_id(0) // CHUNKS
    chunk = tl.program_id(0) % CHUNKS
    block = tl.load(blocks_ptr + index).to(tl.int64)
    words = chunk * BLOCK + tl.arange(0, BLOCK)
    keep = words < ROWS * ROW
    pool = pool_ptr + layer * stride_l + part * stride_kv + block * stride_n
    pool += (words // ROW) * stride_p + words % ROW
    buffer = buffer_ptr + ((layer * 2 + part) * num_blocks + index) * (ROWS * ROW) + words
    if PACKS:
        tl.store(buffer, tl.load(pool, mask=keep), mask=keep)
    else:
        tl.store(pool, tl.load(buffer, mask=keep), mask=keep)


def _in_words(selected: Tensor, buffer: Tensor) -> tuple[Tensor, Tensor]:
    """Both viewed as the widest integers that divide a head, every stride and both starts."""
    size = selected.element_size()
    spans = (selected.shape[5], *selected.stride()[:5], selected.storage_offset(), buffer.storage_offset())
    word = next(w for w in _WORDS if w.itemsize >= size and all(span * size % w.itemsize == 0 for span in spans))
    return selected.view(word), buffer.view(word)


def _copy(pool: Tensor, buffer: Tensor, blocks: Tensor, layers: range, heads: range, *, packs: bool) -> None:
    selected, buffer = _in_words(pool[layers.start : layers.stop, :, :, :, heads.start : heads.stop], buffer)
    num_layers, _, _, block_size, num_heads, head_words = selected.shape
    row, rows = num_heads * head_words, block_size
    if selected.stride(3) == row:
        row, rows = row * rows, 1
    block = min(triton.next_power_of_2(rows * row), _PROGRAM_BYTES // selected.element_size())
    if blocks.numel() == 0 or num_layers == 0:
        return
    _copy_kernel[(blocks.numel() * triton.cdiv(rows * row, block), 2, num_layers)](
        selected,
        buffer,
        blocks,
        selected.stride(0),
        selected.stride(1),
        selected.stride(2),
        selected.stride(3),
        blocks.numel(),
        PACKS=packs,
        ROWS=rows,
        ROW=row,
        BLOCK=block,
        num_warps=8 if block * selected.element_size() >= _PROGRAM_BYTES // 2 else 4,
    )


def pack_kv(pool: Tensor, blocks: Tensor, layers: range, heads: range, out: Tensor) -> Tensor:
    """`distserve_kernels.pack_kv`, its arguments checked there."""
    _copy(pool, out, blocks, layers, heads, packs=True)
    return out


def unpack_kv(buffer: Tensor, pool: Tensor, blocks: Tensor, layers: range, heads: range) -> None:
    """`distserve_kernels.unpack_kv`, its arguments checked there."""
    _copy(pool, buffer, blocks, layers, heads, packs=False)
