"""The gate of a gated MLP: ``silu(gate) * up`` in one pass."""

# mypy: disable-error-code="no-untyped-def,untyped-decorator,misc"

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 2048


@triton.jit
def _gate_kernel(x_ptr, out_ptr, stride, size, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    keep = columns < size
    gate = tl.load(x_ptr + row * stride + columns, mask=keep, other=0.0).to(tl.float32)
    up = tl.load(x_ptr + row * stride + size + columns, mask=keep, other=0.0).to(tl.float32)
    # exp of a large negative gate's opposite is infinite, and the gate divided by it 0, as it should be.
    gated = gate / (1.0 + tl.exp(-gate)) * up
    tl.store(out_ptr + row * size + columns, gated.to(out_ptr.dtype.element_ty), mask=keep)


def silu_mul(gate_up: Tensor) -> Tensor:
    """`reference.silu_mul`: [..., 2 I], gate in the first half, to [..., I]."""
    size = gate_up.shape[-1] // 2
    rows = gate_up if gate_up.dim() == 2 and gate_up.stride(1) == 1 else gate_up.reshape(-1, 2 * size).contiguous()
    out = torch.empty((*gate_up.shape[:-1], size), dtype=gate_up.dtype, device=gate_up.device)
    if rows.shape[0] == 0:
        return out
    block = min(triton.next_power_of_2(size), _BLOCK)
    _gate_kernel[(rows.shape[0], triton.cdiv(size, block))](
        rows, out, rows.stride(0), size, BLOCK=block, num_warps=max(block // 256, 1)
    )
    return out
