"""Copies scattered rows of bytes from one memory to another, the same rows in each of many planes.

Bound by memory alone: bytes are moved as the widest words that all offsets allow, neighbouring threads move
neighbouring words, and one program has 32 KiB in flight: a part of a long row, or several short ones.
"""

# mypy: disable-error-code="no-untyped-def,untyped-decorator,misc"

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

_PROGRAM_BYTES = 32 * 1024
_WORDS = (torch.int64, torch.int32, torch.int16, torch.uint8)


# Not to compile another for each peer, or for each size of a migration.
@triton.jit(do_not_specialize=["row", "num_rows", "src_stride", "dst_stride"])
def _copy_kernel(
    src_ptr,
    dst_ptr,
    starts_ptr,
    row,
    num_rows,
    src_stride,
    dst_stride,
    WORD_BYTES: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """ROWS rows of ``row`` words, BLOCK words of each; ``starts_ptr`` is in bytes, strides are in words."""
    plane = tl.program_id(2).to(tl.int64)
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    words = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    keep = (rows < num_rows)[:, None] & (words < row)[None, :]
    src_start = tl.load(starts_ptr + rows, mask=rows < num_rows, other=0) // WORD_BYTES
    dst_start = tl.load(starts_ptr + num_rows + rows, mask=rows < num_rows, other=0) // WORD_BYTES
    src = src_ptr + plane * src_stride + src_start[:, None] + words[None, :]
    dst = dst_ptr + plane * dst_stride + dst_start[:, None] + words[None, :]
    tl.store(dst, tl.load(src, mask=keep), mask=keep)


def copy_rows(
    src: Tensor,
    dst: Tensor,
    starts: Tensor,
    row_bytes: int,
    num_planes: int,
    src_stride: int,
    dst_stride: int,
    unit: int,
) -> None:
    """`distserve_kernels.copy_rows`."""
    unit = math.gcd(unit, row_bytes, src_stride, dst_stride, src.data_ptr(), dst.data_ptr())
    word = next(w for w in _WORDS if unit % w.itemsize == 0)
    num_rows, row = starts.shape[1], row_bytes // word.itemsize
    block = min(triton.next_power_of_2(row), _PROGRAM_BYTES // word.itemsize)
    rows = _PROGRAM_BYTES // word.itemsize // block
    size = word.itemsize
    usable = src.numel() // size * size, dst.numel() // size * size
    _copy_kernel[(triton.cdiv(num_rows, rows), triton.cdiv(row, block), num_planes)](
        src[: usable[0]].view(word),
        dst[: usable[1]].view(word),
        starts.contiguous(),
        row,
        num_rows,
        src_stride // size,
        dst_stride // size,
        WORD_BYTES=size,
        ROWS=rows,
        BLOCK=block,
        num_warps=8,
    )
