"""A linear layer that keeps its weight in the layout its kernel reads, and only there."""

import threading

import torch
from torch import Tensor, nn
from torch.nn import functional

from distserve_kernels import native

_TILE_ROWS = 16
_PANEL_PAIR = 32
_L1_WAY_BYTES = 4096


class _PerThread(threading.local):
    def __init__(self) -> None:
        self.scratch = native.Scratch()


_per_thread = _PerThread()


def packs_natively(weight: Tensor) -> bool:
    """Whether the native library can hold weight [out, in]: bfloat16 on the CPU, in a multiple of 32."""
    return native.is_native(weight) and weight.shape[1] % 32 == 0


def packed_numel(weight: Tensor) -> int:
    """Elements of the packed form of weight [out, in]: the outputs are padded to a multiple of 32."""
    out_features, in_features = weight.shape
    return -(-out_features // _PANEL_PAIR) * _PANEL_PAIR * in_features


def pack(weight: Tensor, storage: Tensor) -> None:
    """Writes weight [out, in] in the library's layout to ``storage`` [packed_numel(weight)]."""
    assert native.library is not None
    assert storage.numel() == packed_numel(weight)
    source = weight if weight.stride(1) == 1 else weight.contiguous()
    native.library.ds_pack_weight(source.data_ptr(), source.stride(0), *source.shape, storage.data_ptr())


class PackedLinear(nn.Module):
    """``y = x @ weight.T + bias`` for inference.

    The weight is copied into the kernel's own layout; drop the original to have the memory back. Called with
    x [..., in_features], it returns [..., out_features] in ``out_dtype`` (the weight's by default); where the
    kernel computes, float32 results of bfloat16 weights are not rounded on the way.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None = None, *, out_dtype: torch.dtype | None = None) -> None:
        """Packs weight [out_features, in_features] and keeps bias [out_features]."""
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.dtype = weight.dtype
        self.out_dtype = out_dtype or weight.dtype
        self.bias = None if bias is None else bias.detach()
        self.is_packed = packs_natively(weight) and self.out_dtype in (torch.bfloat16, torch.float32)
        if self.is_packed:
            self.weight = native.huge_bytes(packed_numel(weight) * 2).view(torch.bfloat16)
            pack(weight, self.weight)
        else:
            self.weight = weight.detach()

    def forward(self, x: Tensor) -> Tensor:
        """Applies the layer to x [..., in_features]."""
        if not self.is_packed:
            return functional.linear(x, self.weight, self.bias).to(self.out_dtype)
        assert native.library is not None
        assert x.dtype == self.dtype
        rows = x.reshape(-1, self.in_features)
        assert rows.stride(1) == 1
        num_rows = rows.shape[0]
        out = torch.empty(num_rows, self.out_features, dtype=self.out_dtype)
        address, stride = rows.data_ptr(), rows.stride(0)
        # The tile kernels read whole tiles of rows, and are slow where every row begins in the same cache set.
        if num_rows > 2 and (num_rows % _TILE_ROWS or stride * 2 % _L1_WAY_BYTES == 0):
            stride = self.in_features + 32
            padded_rows = -(-num_rows // _TILE_ROWS) * _TILE_ROWS
            copy = _per_thread.scratch.take(padded_rows * stride * 2).view(torch.bfloat16).view(padded_rows, stride)
            copy[:num_rows, : self.in_features] = rows
            address = copy.data_ptr()
        native.library.ds_linear(
            address,
            stride,
            num_rows,
            self.weight.data_ptr(),
            native.address(self.bias),
            self.out_features,
            self.in_features,
            out.data_ptr(),
            self.out_features,
            self.out_dtype == torch.float32,
            torch.get_num_threads(),
        )
        return out.view(*x.shape[:-1], self.out_features)
