"""RMS norm, alone and with the addition to the residual stream before it: one program per row, one pass over memory."""

# mypy: disable-error-code="no-untyped-def,untyped-decorator,misc"

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _norm_kernel(
    x_ptr,
    residual_ptr,
    weight_ptr,
    out_ptr,
    x_stride,
    residual_stride,
    size,
    eps,
    ADDS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    keep = columns < size
    x = tl.load(x_ptr + row * x_stride + columns, mask=keep, other=0.0)
    weight = tl.load(weight_ptr + columns, mask=keep, other=0.0).to(tl.float32)
    if ADDS:
        residual = residual_ptr + row * residual_stride + columns
        total = tl.load(residual, mask=keep, other=0.0).to(tl.float32) + x.to(tl.float32)
        # What is normed is what the residual stream keeps: the rounded sum.
        x = total.to(residual_ptr.dtype.element_ty)
        tl.store(residual, x, mask=keep)
    wide = x.to(tl.float32)
    mean = tl.sum(wide * wide, 0) / size
    normed = wide * (1.0 / tl.sqrt_rn(mean + eps)) * weight
    tl.store(out_ptr + row * size + columns, normed.to(out_ptr.dtype.element_ty), mask=keep)


def _launch(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float) -> Tensor:
    size = x.shape[-1]
    rows = x if x.dim() == 2 and x.stride(1) == 1 else x.reshape(-1, size).contiguous()
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    block = triton.next_power_of_2(size)
    if rows.shape[0] == 0:
        return out
    _norm_kernel[(rows.shape[0],)](
        rows,
        rows if residual is None else residual,
        weight,
        out,
        rows.stride(0),
        0 if residual is None else residual.stride(-2),
        size,
        eps,
        ADDS=residual is not None,
        BLOCK=block,
        num_warps=min(max(block // 512, 1), 16),
    )
    return out


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`reference.rms_norm`: x [..., size], weight [size]."""
    return _launch(x, None, weight, eps)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`reference.add_rms_norm`: x, residual [..., size]; the residual contiguous, or rows of a wider tensor."""
    assert residual.is_contiguous() or (residual.dim() == 2 and residual.stride(1) == 1)
    return _launch(x, residual, weight, eps)
