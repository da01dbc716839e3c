"""Random tensors and tolerances of the kernel checks."""

import torch
from hypothesis import settings
from hypothesis import strategies as st
from torch import Tensor

DTYPES = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])
SEEDS = st.integers(0, 2**31)
NAN = float("nan")
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}


def examples(count: int) -> settings:
    """``count`` examples, without a deadline: the first of a shape compiles on a GPU."""
    return settings(max_examples=count, deadline=None)


def assert_matches(actual: Tensor, exact: Tensor) -> None:
    """Within the rounding of ``actual``'s data type."""
    assert not torch.isnan(actual).any()
    tolerance = TOLERANCE[actual.dtype]
    torch.testing.assert_close(actual.double().cpu(), exact.double().cpu(), rtol=tolerance, atol=tolerance)


def random(*shape: int, dtype: torch.dtype, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def bits(x: Tensor) -> Tensor:
    """The tensor's bytes: equal only where NaNs are too."""
    return x.contiguous().view(torch.uint8).cpu()
