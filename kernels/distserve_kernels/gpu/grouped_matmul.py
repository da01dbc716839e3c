"""The experts' matrix products of a mixture: rows sorted by expert, every expert's own weight, one launch.

How many rows an expert has is known on the device only. Tiles of rows are numbered over all experts and find theirs
themselves (`tiles.find_segment`), so no count travels to the host.
"""

# mypy: disable-error-code="no-untyped-def,untyped-decorator,misc"

import torch
import triton
import triton.language as tl
from torch import Tensor

from distserve_kernels.gpu.tiles import find_segment


@triton.jit
def _matmul_kernel(
    x_ptr,
    w_ptr,
    starts_ptr,
    out_ptr,
    num_experts,
    num_outputs,
    num_inputs,
    x_stride,
    w_stride_e,
    w_stride_o,
    w_stride_i,
    out_stride,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    # Tiles of rows vary fastest: programs that run together read the same weights, which are what is large.
    tile = tl.program_id(0)
    expert = find_segment(starts_ptr, tile, num_experts, BLOCK_M)
    begin = tl.load(starts_ptr + expert)
    end = tl.load(starts_ptr + expert + 1)
    first = begin + (tile - (begin // BLOCK_M + expert)) * BLOCK_M
    if first >= end:
        return
    rows = first + tl.arange(0, BLOCK_M)
    columns = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    row_ok = rows < end
    column_ok = columns < num_outputs
    x_rows = x_ptr + rows.to(tl.int64)[:, None] * x_stride
    w_rows = w_ptr + expert.to(tl.int64) * w_stride_e + columns.to(tl.int64)[None, :] * w_stride_o
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in range(0, num_inputs, BLOCK_K):
        inner = start + tl.arange(0, BLOCK_K)
        inner_ok = inner < num_inputs
        x = tl.load(x_rows + inner[None, :], mask=row_ok[:, None] & inner_ok[None, :], other=0.0)
        w = tl.load(w_rows + inner[:, None] * w_stride_i, mask=inner_ok[:, None] & column_ok[None, :], other=0.0)
        acc = tl.dot(x, w, acc, input_precision=PRECISION)
    out = out_ptr + rows.to(tl.int64)[:, None] * out_stride + columns[None, :]
    tl.store(out, acc.to(out_ptr.dtype.element_ty), mask=row_ok[:, None] & column_ok[None, :])


def grouped_matmul(x: Tensor, weights: Tensor, expert_starts: Tensor, out: Tensor | None = None) -> Tensor:
    """`distserve_kernels.grouped_matmul`, its arguments checked there."""
    num_rows, num_inputs = x.shape
    num_experts, num_outputs, _ = weights.shape
    result = torch.empty((num_rows, num_outputs), dtype=x.dtype, device=x.device) if out is None else out
    if num_rows == 0:
        return result
    wide = x.dtype == torch.float32
    # A few rows per expert are bound by reading weights: small tiles waste least. Many are bound by the tensor cores.
    block_m = min(max(triton.next_power_of_2(triton.cdiv(num_rows, num_experts)), 16), 64 if wide else 128)
    block_n = 64 if wide else 128
    block_k = 32 if wide else 64
    _matmul_kernel[(num_rows // block_m + num_experts, triton.cdiv(num_outputs, block_n))](
        x,
        weights,
        expert_starts,
        result,
        num_experts,
        num_outputs,
        num_inputs,
        x.stride(0),
        weights.stride(0),
        weights.stride(1),
        weights.stride(2),
        result.stride(0),
        PRECISION="tf32x3" if wide else "ieee",
        BLOCK_M=block_m,
        BLOCK_N=block_n,
        BLOCK_K=block_k,
        num_warps=8 if block_m >= 64 else 4,
        num_stages=3,
    )
    return result
