"""Whether a call is for these kernels, and what a launch needs to know of the card. Imports no triton."""

import functools
import importlib.util

import torch
from torch import Tensor

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
"""What the kernels compute with; sums are in float32."""

_INTERPRETED_SM_COUNT = 132


@functools.cache
def has_triton() -> bool:
    """Whether triton is installed; looks for it without importing it."""
    return importlib.util.find_spec("triton") is not None


def runs_here(*tensors: Tensor) -> bool:
    """Whether the kernels take these floating point tensors: all on CUDA, of one of `DTYPES`, and triton installed."""
    return all(t.is_cuda and t.dtype in DTYPES for t in tensors) and has_triton()


def sm_count(device: torch.device) -> int:
    """Streaming multiprocessors of a card; an H200's for the interpreter, so that it takes the same paths."""
    return _multiprocessors(device.index) if device.type == "cuda" else _INTERPRETED_SM_COUNT


@functools.cache
def _multiprocessors(index: int | None) -> int:
    count: int = torch.cuda.get_device_properties(
        torch.cuda.current_device() if index is None else index
    ).multi_processor_count
    return count
