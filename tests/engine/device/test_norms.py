"""Fused norms do what transformers' own do, or are not taken."""

import pytest
import torch
from torch import nn
from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from distserve.engine.device.norms import fuse_norms


class ScaledRMSNorm(LlamaRMSNorm):
    """One of another kind under a name that says too little."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return super().forward(hidden_states) * 1.05


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("kind", "num_fused"), [(LlamaRMSNorm, 1), (Gemma2RMSNorm, 1), (ScaledRMSNorm, 0)])
def test_norms_that_agree_are_taken(kind: type[nn.Module], num_fused: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    norm = kind(48).to(dtype)
    with torch.inference_mode():
        norm.weight.normal_(1.0, 0.3)
        x = torch.randn(2, 5, 48).to(dtype)
        expected = norm(x)
        assert fuse_norms(nn.Sequential(norm)) == num_fused
        torch.testing.assert_close(norm(x), expected, rtol=2e-2, atol=1e-2 if dtype != torch.float32 else 1e-5)


def test_norms_per_head_keep_their_shape() -> None:
    norm = LlamaRMSNorm(16)
    x = torch.randn(1, 7, 4, 16)
    with torch.inference_mode():
        expected = norm(x)
        assert fuse_norms(norm) == 1
        torch.testing.assert_close(norm(x), expected)
