"""Mixtures of experts without waiting for the device: which rows go to which expert, and each expert's product."""

import torch
from torch import Tensor

from distserve_kernels.gpu.support import runs_here


def sort_by_expert(expert_ids: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
    """The order that brings rows of the same expert together, and where each expert's rows then start.

    Args:
        expert_ids: any shape, integers in ``range(num_experts)``; flattened, entry i is assignment i.
        num_experts: E.

    Returns:
        The assignments in order [A] int64, stable, and ``starts`` [E + 1] int32: expert e has
        ``order[starts[e]:starts[e + 1]]``. Neither is known to the host.
    """
    sorted_ids, order = expert_ids.flatten().sort(stable=True)
    bounds = torch.arange(num_experts + 1, device=expert_ids.device, dtype=sorted_ids.dtype)
    return order, torch.searchsorted(sorted_ids, bounds).int()


def grouped_matmul(x: Tensor, weights: Tensor, expert_starts: Tensor, out: Tensor | None = None) -> Tensor:
    """``x[starts[e]:starts[e + 1]] @ weights[e].T`` for every expert e.

    Args:
        x: [A, in], rows of one expert together; rows before ``starts[0]`` or from ``starts[E]`` on are not computed.
        weights: [E, out, in], as a linear layer has them; a transposed view of [E, in, out] will do.
        expert_starts: [E + 1] int32, ascending.
        out: [A, out] to write into.

    Returns:
        [A, out] in x's data type; sums are in float32.
    """
    assert x.shape[1] == weights.shape[2]
    assert expert_starts.shape[0] == weights.shape[0] + 1
    if runs_here(x, weights):
        from distserve_kernels.gpu import grouped_matmul as gpu

        x = x if x.stride(1) == 1 else x.contiguous()
        return gpu.grouped_matmul(x, weights, expert_starts.int().contiguous(), out)
    result = torch.empty((x.shape[0], weights.shape[1]), dtype=x.dtype, device=x.device) if out is None else out
    starts = expert_starts.tolist()
    for expert, weight in enumerate(weights):
        rows = slice(starts[expert], starts[expert + 1])
        result[rows] = x[rows] @ weight.T
    return result
