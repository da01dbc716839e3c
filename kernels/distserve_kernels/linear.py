"""A linear layer that keeps its weight in the layout its kernel reads, and only there."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class PackedLinear(nn.Module):
    """``y = x @ weight.T + bias`` for inference.

    The weight is copied into the kernel's own layout; drop the original to have the memory back. Called with
    x [..., in_features], it returns [..., out_features] in ``out_dtype`` (the weight's by default).
    """

    def __init__(
        self, weight: Tensor, bias: Tensor | None = None, *, out_dtype: torch.dtype | None = None
    ) -> None:
        """Packs weight [out_features, in_features] and keeps bias [out_features]."""
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.dtype = weight.dtype
        self.out_dtype = out_dtype or weight.dtype
        self.weight = weight.detach()
        self.bias = None if bias is None else bias.detach()

    def forward(self, x: Tensor) -> Tensor:
        """Applies the layer to x [..., in_features]."""
        return F.linear(x, self.weight, self.bias).to(self.out_dtype)
