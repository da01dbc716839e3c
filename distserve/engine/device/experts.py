"""Mixtures of experts on a device without waiting for it: transformers' experts, computed by grouped products.

transformers calls the experts function that a model's configuration names; ours is registered under
:data:`EXPERTS`. Its own implementations ask the host which experts are hit, or leave that to a product that not every
data type has.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.integrations.moe import ExpertsInterface

from distserve_kernels import grouped_matmul, sort_by_expert

EXPERTS = "distserve_grouped"
"""Name of our experts function in transformers' ExpertsInterface."""


def grouped_experts(experts: Any, hidden: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
    """What an experts module makes of hidden [T, size], of which row t goes to experts chosen [T, k], weighted [T, k].

    The module has ``gate_up_proj`` and ``down_proj`` [E, out, in] (or their transposes), as
    ``use_experts_implementation`` promises.
    """
    order, starts = sort_by_expert(chosen, experts.num_experts)
    expert_of = chosen.flatten().index_select(0, order) if experts.has_bias else None
    gate_up = grouped_matmul(hidden.index_select(0, order // chosen.shape[1]), _matrix(experts, "gate_up_proj"), starts)
    if expert_of is not None:
        gate_up += experts.gate_up_proj_bias.index_select(0, expert_of)
    product = grouped_matmul(experts._apply_gate(gate_up), _matrix(experts, "down_proj"), starts)  # noqa: SLF001
    if expert_of is not None:
        product += experts.down_proj_bias.index_select(0, expert_of)
    weighted = product * weights.flatten().index_select(0, order).unsqueeze(1)
    # Each token's products side by side again: their sum does not depend on the order of writes.
    together = torch.empty_like(weighted).index_copy_(0, order, weighted)
    return together.view(*chosen.shape, -1).sum(1).to(hidden.dtype)


def use_grouped_experts(module: PreTrainedModel) -> None:
    """Have the model's experts, if it has any that this covers, computed by :func:`grouped_experts`."""
    experts = [part for part in module.modules() if hasattr(part, "gate_up_proj") and hasattr(part, "is_transposed")]
    if experts and all(_is_covered(part) for part in experts):
        module.set_experts_implementation(EXPERTS)


def _is_covered(experts: nn.Module) -> bool:
    return bool(getattr(experts, "has_gate", False)) and not getattr(experts, "has_post_expert_norm", False)


def _matrix(experts: Any, name: str) -> Tensor:
    weight: Tensor = getattr(experts, name)
    return weight.transpose(1, 2) if experts.is_transposed else weight


ExpertsInterface.register(EXPERTS, grouped_experts)
